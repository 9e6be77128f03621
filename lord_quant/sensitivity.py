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

G has as many rows as the layer has outputs, so a few thousand tokens are enough; `stack.py` damps what they leave open. The
matrices of a whole model would not fit in memory. So what is kept is the gradient at every block's output, found by going
back through the blocks one at a time, each being run again for it; G of a block's layers is made when the block's turn
comes, by going back through that block once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lord_quant.errors import CalibrationError
from lord_quant.moments import gram
from lord_quant.stream import BlockCall, block_kinds, capture, first_of
from lord_quant.targets import find_blocks


ROWS = 512
"""Tokens whose probabilities are held at once."""


class Sensitivity:
    """Output sensitivities of a model's layers, one block after another.

    Args:
        stream: The windows on their way through the dense model, in front of its first block.
        gradients: Gradient of the loss at every block's output, per batch of the stream.
    """

    def __init__(self, stream: list[BlockCall], gradients: list[list[torch.Tensor]]) -> None:
        self._stream, self._gradients, self._next = stream, gradients, 0

    @classmethod
    def measure(cls, model: nn.Module, batches: Sequence[torch.Tensor], *, seed: int = 0) -> Sensitivity:
        """Runs a model forth and back; it is left as it was, and weights get no gradients.

        Args:
            model: A loaded causal language model in evaluation mode.
            batches: Token windows with shape (batch, seq_len), all without padding.
            seed: Of the labels drawn from the model's predictions.

        Raises:
            CalibrationError: The model does not call every block once.
        """
        blocks = find_blocks(model).modules
        kinds = block_kinds(model, len(blocks))
        count = sum(batch.numel() for batch in batches)
        generator = torch.Generator().manual_seed(seed)
        chances = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            stream = capture(model, blocks, kinds, batches)
        parts = chances.split([batch.numel() for batch in batches])
        gradients = []
        for batch, call, chance in zip(
            tqdm(batches, "sensitivity", unit="batch", disable=None), stream, parts, strict=True
        ):
            inputs, gradient = _gradient_at_the_end(model, blocks, batch, chance)
            steps = [gradient]
            for index in range(len(blocks) - 1, 0, -1):
                gradient = _back(blocks[index], kinds[index], call, inputs.pop(), gradient)
                steps.append(gradient)
            gradients.append(steps[::-1])
        return cls(stream, [list(block) for block in zip(*gradients, strict=True)])

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
            ValueError: It is another block's turn.
        """
        if index != self._next:
            raise ValueError(f"sensitivities of block {index}; wanted block {self._next}: each is made once, in order")
        sums: dict[str, torch.Tensor] = {}
        tokens = 0
        for call, gradient in zip(self._stream, self._gradients[self._next], strict=True):
            with _weights_fixed(block), torch.set_grad_enabled(bool(names)), _outputs(block, names) as outputs:
                leaving = call.run(block, kind, call.hidden.detach().requires_grad_(bool(names)).clone())
            live = [name for name, output in outputs.items() if output.requires_grad]  # a router may cut its graph
            seen = [outputs[name] for name in live]
            found = torch.autograd.grad(leaving, seen, gradient, allow_unused=True) if seen else ()
            parts = dict(zip(live, found, strict=True))
            for name, output in outputs.items():
                part = parts.get(name)
                rows = torch.zeros_like(output) if part is None else part
                rows = rows.reshape(-1, rows.shape[-1]).to(dtype)
                sums[name] = sums.get(name, 0) + gram(rows)
            tokens += gradient.numel() // gradient.shape[-1]
            call.hidden = leaving.detach()
        self._gradients[self._next] = []  # not needed any more
        self._next += 1
        return {name: total / tokens for name, total in sums.items()}


def _gradient_at_the_end(
    model: nn.Module, blocks: Sequence[nn.Module], batch: torch.Tensor, chance: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns the hidden states entering every block, and the gradient of the loss at the last one's output."""
    inputs: list[torch.Tensor] = []
    leaf: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        leaf.append(first_of(output).detach().requires_grad_())
        leaving = leaf[0].clone()  # a leaf may not be changed in place, and what follows might
        return type(output)((leaving, *output[1:])) if isinstance(output, tuple | list) else leaving

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(cut))
    try:
        with _weights_fixed(model), torch.enable_grad():
            logits = model(input_ids=batch.to(next(model.parameters()).device), use_cache=False).logits
            logits = logits.flatten(0, 1)
            (gradient,) = torch.autograd.grad(logits, leaf, _loss_gradient(logits.detach(), chance))
    finally:
        for handle in handles:
            handle.remove()
    if len(inputs) != len(blocks):
        raise CalibrationError(
            f"{len(inputs)} calls of {len(blocks)} blocks in one forward pass; wanted one each: use --no-fisher"
        )
    return inputs, gradient


def _back(block: nn.Module, kind: str, call: BlockCall, entering: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Returns the gradient at a block's input, given that at its output."""
    entering = entering.detach().requires_grad_()
    with _weights_fixed(block), torch.enable_grad():
        leaving = call.run(block, kind, entering.clone())
    return torch.autograd.grad(leaving, entering, gradient)[0]


@contextmanager
def _outputs(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collects the outputs of layers while the body runs the block once."""
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            outputs[name] = output
            return output.clone()  # a block may change it in place, which would move what is kept behind that

        return keep

    handles = [block.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _weights_fixed(model: nn.Module) -> Iterator[None]:
    """Gradients of activations are wanted; remembering what those of weights need would hold the whole model's."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _loss_gradient(logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Returns the gradient, with respect to logits, of the summed cross entropy of labels drawn from them: p − onehot.

    A few rows at a time: vocabularies are large, and probabilities are computed in float32 and cumulated in float64.
    """
    gradient = torch.empty_like(logits)
    for rows, own, out in zip(logits.split(ROWS), chance.split(ROWS), gradient.split(ROWS), strict=True):
        p = rows.float().softmax(dim=-1)
        p[torch.arange(len(p), device=p.device), _draw(rows.float(), own)] -= 1
        out.copy_(p)
    return gradient


def _draw(logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Draws one label per row from softmax(logits), where its cumulated probability reaches `chance`, in [0, 1).

    So that a seed draws the same labels however the windows are batched, on whatever device, up to rounding.
    """
    cumulated = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    reached = torch.searchsorted(cumulated, chance.to(logits.device)[:, None] * cumulated[:, -1:], right=True)
    return reached[:, 0].clamp_max(logits.shape[-1] - 1)
