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

The gradient of fit says something else: whether the text would rather have the weight as it is (`Expansion`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lord_quant.blocks.gradients import ROWS, UNLABELLED, BlockGradients, Labels, Rows, Visit, visit
from lord_quant.blocks.residency import RESIDENT, Residency
from lord_quant.distributed import ALONE, World
from lord_quant.files.kept import Kept
from lord_quant.halves import add_gram
from lord_quant.progress import Progress
from lord_quant.targets import dense_weight, find_blocks


class Sensitivity:
    """Output sensitivities of a model's layers, one block after another.

    Args:
        sums: Made of the gradients of the loss of labels drawn from the model's predictions; used up.

    Attributes:
        num_labels: Tokens whose gradients were taken, over all processes.
    """

    def __init__(self, sums: _Sums) -> None:
        self._sums = sums
        (self.num_labels,) = sums.num_labels

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
        losses = [_drawn(world.share(_chances(batches, seed)))]
        asked = _Asked(_add_outer, lambda outputs, inputs: outputs**2, names, dtype)
        return cls(
            _Sums.measure(model, world.share(batches), losses, asked, residency.spare_bytes, residency, progress, world)
        )

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
        sums = self._sums.of_block(index, block, kind, names, dtype)
        return {name: total.div_(self.num_labels) for name, (total,) in sums.items()}


class Steepness(NamedTuple):
    """First derivatives of the text's loss, in nats per token.

    Attributes:
        weight: With respect to a layer's weight, with shape (m, n).
        bias: With respect to its bias, or to the one it might have, with shape (m,).
    """

    weight: torch.Tensor
    bias: torch.Tensor


class Derivatives(NamedTuple):
    """What a layer's errors cost at second order and at first.

    Attributes:
        sensitivity: G with shape (m, m), as `Sensitivity` has it.
        slope: That of the text's own loss.
    """

    sensitivity: torch.Tensor
    slope: Steepness


class Expansion:
    """The loss around a model's weights: output sensitivities, and the slope of the text's own loss, block after block.

    An error D of a weight costs ⟨∂ loss / ∂ W, D⟩ at first order. Of errors at random that would be a matter of chance.
    Those of truncation are not: it takes away small parts of what was learnt, and they are small for not having been learnt
    to the end. Text that was not learnt by heart would rather have them larger. Rounding does so too, by less, see
    `losses/steepness.py`.

    Both losses share what is run forward.

    Args:
        sums: Made of the gradients of both losses; used up.

    Attributes:
        num_labels: Tokens the sensitivities are of.
        num_following: Tokens the slopes are of: all but the last of each window.
    """

    def __init__(self, sums: _Sums) -> None:
        self._sums = sums
        self.num_labels, self.num_following = sums.num_labels

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
    ) -> Expansion:
        """Runs a model forth and back, as `Sensitivity.measure` does; two of these may wait at a time, one of each half."""
        own = world.share(batches)

        def following(number: int, logits: torch.Tensor) -> torch.Tensor:
            return _following(own[number]).to(logits.device)

        asked = _Asked(_add_both, lambda outputs, inputs: outputs**2 + outputs * inputs + outputs, names, dtype)
        losses = [_drawn(world.share(_chances(batches, seed))), following]
        return cls(_Sums.measure(model, own, losses, asked, residency.spare_bytes // 2, residency, progress, world))

    def of_block(
        self, index: int, block: nn.Module, kind: str, names: Sequence[str], dtype: torch.dtype = torch.float32
    ) -> dict[str, Derivatives]:
        """Returns the sensitivities and slopes of layers of a block, as `Sensitivity.of_block` does."""
        found = {}
        for name, (outer, weight, bias) in self._sums.of_block(index, block, kind, names, dtype).items():
            slope = Steepness(weight.div_(self.num_following), bias.div_(self.num_following))
            found[name] = Derivatives(outer.div_(self.num_labels), slope)
        return found


class _Asked(NamedTuple):
    """What is summed up over tokens, and of which layers it will be asked for.

    Attributes:
        add: Adds what a batch says of a layer to sums that begin as an empty list.
        size: How many values the sums of a layer with so many outputs and inputs have.
        names: Layers by path inside their block, per block; none if that is not known yet.
        dtype: dtype of the sums, likewise.
    """

    add: Callable[[list[torch.Tensor], Rows, torch.dtype], None]
    size: Callable[[int, int], int]
    names: Sequence[Sequence[str]]
    dtype: torch.dtype

    def nbytes(self, model: nn.Module) -> int:
        """Returns how much all sums take together."""
        blocks = find_blocks(model).modules
        layers = [block.get_submodule(name) for block, own in zip(blocks, self.names, strict=True) for name in own]
        return sum(self.size(*dense_weight(layer).shape) for layer in layers) * self.dtype.itemsize

    def summed(self, batches: Iterable[dict[str, Rows]], dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
        """Returns the sums over all tokens, by layer."""
        sums: dict[str, list[torch.Tensor]] = {}
        for batch in batches:
            for name, rows in batch.items():
                self.add(sums.setdefault(name, []), rows, dtype)
        return sums


class _Sums:
    """Sums over tokens of what gradients say of layers, a block after another: made in its turn, or waiting for it.

    Args:
        asked: What is summed up.
        residency: Where sums wait.
        world: The processes, each with gradients of its own windows.

    Attributes:
        num_labels: Tokens that have a label, over all processes, by loss.
    """

    def __init__(self, asked: _Asked, residency: Residency, world: World) -> None:
        self._asked, self._residency, self._world = asked, residency, world
        self._gradients: BlockGradients | None = None
        self._waiting: dict[int, tuple[list[str], Kept]] = {}
        self._next, self.num_labels = 0, tuple[int, ...]()

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        batches: Sequence[torch.Tensor],
        losses: Sequence[Labels],
        asked: _Asked,
        spare_bytes: int,
        residency: Residency,
        progress: Progress | None,
        world: World,
    ) -> _Sums:
        """Runs a model forth and back; sums that fit into so many bytes are made on the way."""
        arguments, sums = (model, batches, losses, "sensitivity"), cls(asked, residency, world)
        if not asked.names or asked.nbytes(model) > spare_bytes:
            sums._gradients = BlockGradients.measure(*arguments, residency, progress)
            own = sums._gradients.num_labels
        else:
            own = visit(*arguments, Visit(asked.names, sums._take), residency, progress)
        sums.num_labels = tuple(map(sum, zip(*world.gather(own), strict=True)))
        return sums

    def _take(self, index: int, batches: Iterator[dict[str, Rows]]) -> None:
        sums = self._asked.summed(batches, self._asked.dtype)
        self._waiting[index] = list(sums), self._residency.keep([total for each in sums.values() for total in each])

    def of_block(
        self, index: int, block: nn.Module, kind: str, names: Sequence[str], dtype: torch.dtype
    ) -> dict[str, list[torch.Tensor]]:
        """Returns the sums of layers of a block, over all processes, once, blocks in order."""
        own = self._own_of_block(index, block, kind, names, dtype)
        if self._world.size == 1:
            return own
        apart = {f"{name}:{at}": total for name, totals in own.items() for at, total in enumerate(totals)}
        sums: dict[str, list[torch.Tensor]] = {}
        for key, total in self._world.totals(apart, next(block.parameters()).device).items():  # by name
            sums.setdefault(key.rpartition(":")[0], []).append(total)
        return sums

    def _own_of_block(
        self, index: int, block: nn.Module, kind: str, names: Sequence[str], dtype: torch.dtype
    ) -> dict[str, list[torch.Tensor]]:
        if self._gradients is not None:
            return self._asked.summed(self._gradients.through(index, block, kind, names), dtype)
        if index != self._next:
            raise ValueError(f"sensitivities of block {index}; wanted block {self._next}: each is there once, in order")
        if set(names) - set(self._asked.names[index]) or dtype != self._asked.dtype:
            raise ValueError(f"sensitivities of {', '.join(names)} in {dtype}; wanted layers and dtype as measured")
        self._next += 1
        found, kept = self._waiting.pop(index, ([], Kept(())))
        totals = kept.take()
        each = len(totals) // max(1, len(found))
        return {name: totals[at * each : (at + 1) * each] for at, name in enumerate(found) if name in names}


def _add_outer(sums: list[torch.Tensor], rows: Rows, dtype: torch.dtype) -> None:
    """Adds g gᵀ of the first loss, over all tokens."""
    gradients = rows.gradients[0].to(dtype)
    if not sums:
        sums.append(gradients.new_zeros(gradients.shape[1], gradients.shape[1]))
    add_gram(sums[0], gradients)


def _add_both(sums: list[torch.Tensor], rows: Rows, dtype: torch.dtype) -> None:
    """Adds g gᵀ of the first loss, and what the second says of weight and bias."""
    _add_outer(sums, rows, dtype)
    gradients = rows.gradients[1].to(dtype)
    own = gradients.T @ rows.inputs.to(dtype), gradients.sum(dim=0)
    if len(sums) == 1:
        sums += own
        return
    for total, part in zip(sums[1:], own, strict=True):
        total += part


def _chances(batches: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Draws for every token where in the cumulated probabilities its label lies, float64, in the shape of its batch."""
    counts = [batch.numel() for batch in batches]
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(sum(counts), generator=generator, dtype=torch.float64, device="cpu").split(counts)
    return [chance.view(batch.shape) for chance, batch in zip(chances, batches, strict=True)]


def _drawn(chances: Sequence[torch.Tensor]) -> Labels:
    """Returns labels that are drawn from the model's predictions."""
    return lambda number, logits: _draw(logits, chances[number].flatten())


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
