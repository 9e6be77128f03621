# SPDX-License-Identifier: Apache-2.0
"""How much the model's loss minds errors in each layer's outputs, from one backward pass.

A small error e in a layer's output raises the model's loss, averaged over what the model itself would say next, by
½ eᵀ F e with F the Fisher information of its predictions. Averaged over tokens, with inputs and gradients
taken as independent and errors at different tokens as unrelated, an error D of the weight costs

    ½ tr G D H Dᵀ,    H = E[x xᵀ],    G = E[g gᵀ],    g = ∂ loss / ∂ output,

with the loss of labels *drawn from the model's own predictions*: those of the text would give the gradient of fit, which
vanishes on memorised text, and not the curvature. (Kronecker-factored Fisher: KFAC, arXiv 1503.05671. For truncation:
FWSVD, arXiv 2207.00112, weights rows by a diagonal Fisher, GFWSVD, arXiv 2505.17974, by both factors. For rounding: YAQA,
arXiv 2505.22988.) Labels are drawn once per token. The
gradient at one position sums what it changes at all later ones.

G has as many rows as the layer has outputs, so a few thousand tokens are enough; `stack.py` damps what they leave open.

The gradient of fit says something else: whether the text would rather have the weight as it is (`Slope`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lord_quant.distributed import ALONE, World
from lord_quant.gradients import ROWS, UNLABELLED, BlockGradients, Rows, Visit, visit
from lord_quant.halves import add_gram
from lord_quant.kept import Kept
from lord_quant.progress import Progress
from lord_quant.residency import RESIDENT, Residency
from lord_quant.targets import dense_weight, find_blocks


class Sensitivity:
    """Output sensitivities of a model's layers, one block after another.

    Args:
        gradients: Of the loss of labels drawn from the model's predictions; used up. Or the sums already made of them.
        world: The processes, each with gradients of its own windows.

    Attributes:
        num_labels: Tokens whose gradients were taken, over all processes.
    """

    def __init__(self, gradients: BlockGradients | _Sums, world: World = ALONE) -> None:
        self._gradients, self._world = gradients, world
        self.num_labels = sum(world.gather(gradients.num_labels))

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        batches: Sequence[torch.Tensor],
        *,
        seed: int = 0,
        names: Sequence[Sequence[str]] = (),
        dtype: torch.dtype = torch.float32,
        residency: Residency = RESIDENT,
        progress: Progress | None = None,
        world: World = ALONE,
    ) -> Sensitivity:
        """Runs a model forth and back; it is left as it was, and weights get no gradients.

        Args:
            model: A loaded causal language model in evaluation mode.
            batches: Token windows with shape (batch, seq_len), all without padding.
            seed: Of the labels drawn from the model's predictions: the same ones for a window whichever process has it.
            names: The layers that will be asked for, by path inside their block, per block. If the sensitivities of all of
                them may wait together they are made on the way back, and no block is run again for them.
            dtype: dtype in which they will be asked for, if `names` are given.
            residency: Which blocks have their weights, and where what is not needed yet waits.
            progress: Where it is told how far the run is.
            world: The processes that share the windows.

        Raises:
            CalibrationError: The model does not call every block once.
        """
        counts = [batch.numel() for batch in batches]
        generator = torch.Generator().manual_seed(seed)
        chances = torch.rand(sum(counts), generator=generator, dtype=torch.float64, device="cpu").split(counts)
        own = world.share([chance.view(batch.shape) for chance, batch in zip(chances, batches, strict=True)])

        def drawn(number: int, logits: torch.Tensor) -> torch.Tensor:
            return _draw(logits, own[number].flatten())

        arguments = model, world.share(batches), drawn, "sensitivity"
        if not names or _nbytes(model, names, dtype) > residency.spare_bytes:
            return cls(BlockGradients.measure(*arguments, residency, progress), world)
        sums = _Sums(names, dtype, residency)
        sums.num_labels = visit(*arguments, Visit(names, sums.take), residency, progress)
        return cls(sums, world)

    def of_block(
        self, index: int, block: nn.Module, kind: str, names: Sequence[str], dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """Returns G = E[g gᵀ] of layers of a block, the mean over tokens of the gradient's outer products.

        Args:
            index: Which block; blocks must be asked for one after another, from the first, each once.
            block: The dense block.
            kind: Its kind, see `block_kinds`.
            names: Its layers, by path inside the block; none merely goes on to the next block.
            dtype: dtype of the sums.

        Returns:
            Symmetric positive semidefinite matrices with shape (out_features, out_features), by name. Layers that were not
            called are missing; zero stands for a layer the loss does not depend on.

        Raises:
            ValueError: It is another block's turn, or layers or a dtype are asked for that `measure` was not told of.
        """
        if isinstance(self._gradients, _Sums):
            sums = self._gradients.of_block(index, names, dtype)
        else:
            sums = _summed(self._gradients.through(index, block, kind, names), dtype)
        totals = self._world.totals(sums, next(block.parameters()).device)
        return {name: total.div_(self.num_labels) for name, total in totals.items()}


class _Sums:
    """Sums of outer products of the gradients of all blocks, which wait for their turn.

    Args:
        names: Layers by path inside their block, per block.
        dtype: dtype of the sums.
        residency: Where they wait.

    Attributes:
        num_labels: Tokens that have a label.
    """

    def __init__(self, names: Sequence[Sequence[str]], dtype: torch.dtype, residency: Residency) -> None:
        self._names, self._dtype, self._residency, self.num_labels = names, dtype, residency, 0
        self._waiting: dict[int, tuple[list[str], Kept]] = {}
        self._next = 0

    def take(self, index: int, batches: Iterator[dict[str, Rows]]) -> None:
        """Sums up what the batches say of a block's layers, and lets it wait."""
        sums = _summed(batches, self._dtype)
        self._waiting[index] = list(sums), self._residency.keep(list(sums.values()))

    def of_block(self, index: int, names: Sequence[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Returns the sums of layers of a block, once, blocks in order."""
        if index != self._next:
            raise ValueError(f"sensitivities of block {index}; wanted block {self._next}: each is there once, in order")
        if set(names) - set(self._names[index]) or dtype != self._dtype:
            raise ValueError(f"sensitivities of {', '.join(names)} in {dtype}; wanted layers and dtype as measured")
        self._next += 1
        found, kept = self._waiting.pop(index, ([], Kept(())))
        return {name: total for name, total in zip(found, kept.take(), strict=True) if name in names}


def _summed(batches: Iterable[dict[str, Rows]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns the sums of g gᵀ over all tokens, by layer."""
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        for name, rows in batch.items():
            gradients = rows.gradients.to(dtype)
            features = gradients.shape[1]
            add_gram(sums.setdefault(name, gradients.new_zeros(features, features)), gradients)
    return sums


def _nbytes(model: nn.Module, names: Sequence[Sequence[str]], dtype: torch.dtype) -> int:
    """Returns how much all sums would take together."""
    blocks = find_blocks(model).modules
    layers = [block.get_submodule(name) for block, own in zip(blocks, names, strict=True) for name in own]
    return sum(len(dense_weight(layer)) ** 2 * dtype.itemsize for layer in layers)


class Steepness(NamedTuple):
    """First derivatives of the text's loss, in nats per token.

    Attributes:
        weight: With respect to a layer's weight, with shape (m, n).
        bias: With respect to its bias, or to the one it might have, with shape (m,).
    """

    weight: torch.Tensor
    bias: torch.Tensor


class Slope:
    """The slope of the text's own loss in a model's weights, one block after another.

    An error D of a weight costs ⟨∂ loss / ∂ W, D⟩ at first order. Of errors at random that would be a matter of chance.
    Those of truncation are not: it takes away small parts of what was learnt, and they are small for not having been learnt
    to the end. Text that was not learnt by heart would rather have them larger. Rounding does so too, by less, see
    `steepness.py`.

    Args:
        gradients: Of the loss of the text; used up.
    """

    def __init__(self, gradients: BlockGradients) -> None:
        self._gradients = gradients

    @property
    def num_labels(self) -> int:
        """Tokens whose loss it is of: all but the last of each window."""
        return self._gradients.num_labels

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        batches: Sequence[torch.Tensor],
        residency: Residency = RESIDENT,
        progress: Progress | None = None,
    ) -> Slope:
        """Runs a model forth and back, as `Sensitivity.measure` does."""

        def following(number: int, logits: torch.Tensor) -> torch.Tensor:
            return _following(batches[number]).to(logits.device)

        return cls(BlockGradients.measure(model, batches, following, "slope", residency, progress))

    def of_block(
        self, index: int, block: nn.Module, kind: str, names: Sequence[str], dtype: torch.dtype = torch.float32
    ) -> dict[str, Steepness]:
        """Returns the slopes of layers of a block, as `Sensitivity.of_block` does."""
        sums: dict[str, Steepness] = {}
        for batch in self._gradients.through(index, block, kind, names):
            for name, rows in batch.items():
                gradients = rows.gradients.to(dtype)
                own = Steepness(gradients.T @ rows.inputs.to(dtype), gradients.sum(dim=0))
                before = sums.get(name)
                sums[name] = own if before is None else Steepness(before.weight + own.weight, before.bias + own.bias)
        count = self.num_labels
        return {name: Steepness(total.weight / count, total.bias / count) for name, total in sums.items()}


def _following(batch: torch.Tensor) -> torch.Tensor:
    """Returns the next token of every token, flat; the last of a window has none."""
    return torch.nn.functional.pad(batch[:, 1:], (0, 1), value=UNLABELLED).flatten()


def _draw(logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Draws one label per row from softmax(logits), where its cumulated probability reaches `chance`, in [0, 1).

    So that a seed draws the same labels however the windows are batched, on whatever device, up to rounding. A few rows at
    a time: vocabularies are large, and probabilities are cumulated in float64.
    """
    labels = []
    for rows, own in zip(logits.split(ROWS), chance.to(logits.device).split(ROWS), strict=True):
        cumulated = rows.float().softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        reached = torch.searchsorted(cumulated, own[:, None] * cumulated[:, -1:], right=True)
        labels.append(reached[:, 0].clamp_max(logits.shape[-1] - 1))
    return torch.cat(labels)
