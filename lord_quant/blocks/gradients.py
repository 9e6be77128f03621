# SPDX-License-Identifier: Apache-2.0
"""Gradients of losses at the outputs of layers, one block after another.

Those of a whole model would not fit in memory. So what is kept is the gradient at every block's output, found by going back
through the blocks one at a time, each being run again for it; gradients at a block's layers are made when the block's turn
comes, by going back through that block once more. Whoever has room for all that he makes of them takes them on the first
way back (`Visit`), and no block is run for them again. Several losses share what is run forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from lord_quant.blocks.residency import RESIDENT, Residency
from lord_quant.blocks.stream import BlockCall, Way, block_kinds, capture, passed_over, way_of
from lord_quant.errors import CalibrationError
from lord_quant.files.kept import Kept
from lord_quant.linalg import require_finite
from lord_quant.progress import Progress
from lord_quant.targets import find_blocks


ROWS = 512
"""Tokens whose probabilities are held at once."""
UNLABELLED = -1

_ByLoss = Sequence[torch.Tensor | None]
"""What each loss says; None where it says nothing."""
Labels = Callable[[int, torch.Tensor], torch.Tensor]
"""Labels of a batch, by its number and its logits with shape (tokens, vocabulary): with shape (tokens,), on the logits'
device, `UNLABELLED` where a token has none."""


class Rows(NamedTuple):
    """What one batch says of a layer.

    Attributes:
        inputs: With shape (tokens, in_features).
        gradients: Of every summed loss at the layer's outputs, with shape (tokens, out_features); zero where a loss does
            not depend on them.
    """

    inputs: torch.Tensor
    gradients: tuple[torch.Tensor, ...]


class Visit(NamedTuple):
    """What is looked at on the way back through the blocks.

    Attributes:
        names: Layers by path inside their block, per block.
        take: Is given every block's number, from the last to the first, and what each batch says of its layers, as
            `BlockGradients.through` yields it; must go through all of it.
    """

    names: Sequence[Sequence[str]]
    take: Callable[[int, Iterator[dict[str, Rows]]], None]


class BlockGradients:
    """Gradients of the losses of labels at a model's layers, one block after another.

    Args:
        stream: The windows on their way through the dense model, in front of its first block.
        gradients: Gradients of the summed losses at every block's output, per batch of the stream, with one dimension more
            in front: the losses.
        num_labels: Tokens that have a label, by loss.
    """

    def __init__(self, stream: list[BlockCall], gradients: list[Kept], num_labels: tuple[int, ...]) -> None:
        self._stream, self._gradients, self._next, self.num_labels = stream, gradients, 0, num_labels

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        batches: Sequence[torch.Tensor],
        losses: Sequence[Labels],
        title: str,
        residency: Residency = RESIDENT,
        progress: Progress | None = None,
    ) -> BlockGradients:
        """Runs a model forth and back; it is left as it was, and weights get no gradients.

        Args:
            model: A causal language model in evaluation mode.
            batches: Token windows with shape (batch, seq_len), all without padding; none is legal.
            losses: What each loss takes for right.
            title: What the pass is called.
            residency: Which blocks have their weights, and where hidden states and gradients wait, one per block.
            progress: Where it is told how far the pass is.

        Raises:
            CalibrationError: The model does not call every block once.
            NumericsError: Hidden states or gradients hold NaN or inf; the block is named.
            OutputError: They cannot be written to where they wait.
        """
        count = len(find_blocks(model).modules)
        if not batches:
            return cls([], [Kept(()) for _ in range(count)], (0,) * len(losses))
        return cls(*_forth_and_back(model, batches, losses, title, residency, progress))

    def through(self, index: int, block: nn.Module, kind: str, names: Sequence[str]) -> Iterator[dict[str, Rows]]:
        """Yields what every batch says of layers of a block, by name; layers that were not called are missing.

        Args:
            index: Which block; blocks must be asked for one after another, from the first, each once.
            block: The dense block.
            kind: Its kind, see `block_kinds`.
            names: Its layers, by path inside the block; none merely goes on to the next block.

        Raises:
            ValueError: It is another block's turn.
        """
        if index != self._next:
            raise ValueError(f"gradients of block {index}; wanted block {self._next}: each is made once, in order")
        for call, gradients in zip(self._stream, self._gradients[index].take(), strict=True):
            run = _Run.of(block, kind, call, call.hidden, names, graph=bool(names))
            call.hidden = run.leaving.detach()
            yield run.rows(run.back(gradients))
        self._next += 1


def visit(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    losses: Sequence[Labels],
    title: str,
    seen: Visit,
    residency: Residency = RESIDENT,
    progress: Progress | None = None,
) -> tuple[int, ...]:
    """Runs a model forth and back as `BlockGradients.measure` does and shows the gradients of layers on the way back.

    Returns:
        How many tokens have a label, by loss. Without batches nothing is shown.
    """
    if not batches:
        return (0,) * len(losses)
    return _forth_and_back(model, batches, losses, title, residency, progress, seen)[2]


def _forth_and_back(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    losses: Sequence[Labels],
    title: str,
    residency: Residency,
    progress: Progress | None,
    seen: Visit | None = None,
) -> tuple[list[BlockCall], list[Kept], tuple[int, ...]]:
    """Returns what a `BlockGradients` is made of; no gradients where they were seen."""
    progress, count = progress or Progress(), len(find_blocks(model).modules)
    with progress.phase(title, 2 * count - (seen is None)):
        return _passes(model, batches, losses, residency, progress, seen)


def _passes(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    losses: Sequence[Labels],
    residency: Residency,
    progress: Progress,
    seen: Visit | None,
) -> tuple[list[BlockCall], list[Kept], tuple[int, ...]]:
    path, blocks = find_blocks(model)
    kinds, last = block_kinds(model, len(blocks)), len(blocks) - 1
    with torch.no_grad():
        stream = capture(model, blocks, kinds, batches, residency)
    hidden = [call.hidden for call in stream]
    entering: list[Kept] = []
    ways: list[Way] = []
    for index, block in enumerate(blocks):
        entering.append(residency.keep(hidden))
        # The way back begins with the last block again, and whoever asks for gradients begins with the first.
        with residency.of(index, then=min(index + 1, last)), torch.no_grad(), way_of(block, ways):
            hidden = [call.run(block, kinds[index], each.clone()) for call, each in zip(stream, hidden, strict=True)]
        _require_finite(hidden, f"hidden states behind {path}.{index}")
        progress.block(f"{path}.{index}")
    ends = [
        _gradients_at_the_end(model, ways, batch, number, leaving, losses)
        for number, (batch, leaving) in enumerate(zip(batches, hidden, strict=True))
    ]
    gradient = [found for found, _ in ends]
    _require_finite(gradient, f"gradients of the loss behind {path}.{last}")
    gradients = [residency.keep(gradient)] if seen is None else []
    take = _pass_over if seen is None else seen.take
    for index in range(last, 0 if seen is None else -1, -1):
        arriving, names = entering.pop().take(), () if seen is None else seen.names[index]
        before: list[torch.Tensor] = []
        with residency.of(index, then=max(index - 1, 0)):  # whoever goes through the blocks next begins with the first
            rows = _going_back(blocks[index], kinds[index], zip(stream, arriving, gradient, strict=True), names, before)
            take(index, rows)
        gradient = before
        _require_finite(gradient, f"gradients of the loss in front of {path}.{index}")
        if seen is None:
            gradients.append(residency.keep(gradient))
        progress.block(f"{path}.{index}")
    return stream, gradients[::-1], tuple(map(sum, zip(*(counts for _, counts in ends), strict=True)))


def _require_finite(batches: Sequence[torch.Tensor], name: str) -> None:
    for batch in batches:
        require_finite(batch, f"{name} (the backward pass; --no-fisher does without)")


def _rows(inputs: torch.Tensor, outputs: torch.Tensor, gradients: _ByLoss) -> Rows:
    given = [torch.zeros_like(outputs) if gradient is None else gradient for gradient in gradients]
    flat = tuple(gradient.reshape(-1, gradient.shape[-1]) for gradient in given)
    return Rows(inputs.detach().reshape(-1, inputs.shape[-1]), flat)


def _gradients_at_the_end(
    model: nn.Module, ways: Sequence[Way], batch: torch.Tensor, number: int, leaving: torch.Tensor, losses: Sequence[Labels]
) -> tuple[torch.Tensor, list[int]]:
    """Returns the gradients of the losses at the last block's output, on top of each other, and how many labels each has.

    Args:
        model: The model.
        ways: How its blocks return what they return.
        batch: Tokens.
        number: Which batch it is.
        leaving: The last block's output.
        losses: What each takes for right.
    """
    leaf = leaving.detach().requires_grad_()
    blocks = find_blocks(model).modules
    with passed_over(blocks, ways, leaf) as passed, _weights_fixed(model), torch.enable_grad():
        logits = model(input_ids=batch.to(leaf.device), use_cache=False).logits.flatten(0, 1)
        if passed != list(range(len(blocks))):
            raise CalibrationError(
                f"{len(passed)} calls of {len(blocks)} blocks in one forward pass; wanted one each, in order: --no-fisher "
                "does without"
            )
        found, counts = list[torch.Tensor](), list[int]()
        for left, labels in zip(range(len(losses) - 1, -1, -1), losses, strict=True):
            own = labels(number, logits.detach())
            counts.append(int((own != UNLABELLED).sum()))
            found += torch.autograd.grad(logits, leaf, loss_gradient(logits.detach(), own), retain_graph=bool(left))
    return torch.stack(found), counts


def _pass_over(index: int, rows: Iterator[dict[str, Rows]]) -> None:
    for _ in rows:
        pass


class _Run(NamedTuple):
    """A block that ran on a batch.

    Attributes:
        entering: Its hidden states, a leaf.
        leaving: What left it.
        calls: Inputs and outputs of the layers that are looked at, by name.
    """

    entering: torch.Tensor
    leaving: torch.Tensor
    calls: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(
        cls, block: nn.Module, kind: str, call: BlockCall, hidden: torch.Tensor, names: Sequence[str], *, graph: bool
    ) -> _Run:
        """Runs a block; with its graph, if someone wants to go back."""
        entering = hidden.detach().requires_grad_(graph)
        with _weights_fixed(block), torch.set_grad_enabled(graph), _calls(block, names) as calls:
            leaving = call.run(block, kind, entering.clone())
        return cls(entering, leaving, calls)

    def back(self, gradients: torch.Tensor, *others: torch.Tensor) -> list[_ByLoss]:
        """Goes back once per loss and returns the gradients at the layers' outputs, then at other tensors."""
        places = [output for _, output in self.calls.values()] + list(others)
        live = [place for place in places if place.requires_grad]  # a router may cut its graph
        left = range(len(gradients) - 1, -1, -1)
        ways = [
            torch.autograd.grad(self.leaving, live, own, retain_graph=bool(more), allow_unused=True) if live else ()
            for more, own in zip(left, gradients, strict=True)
        ]
        found = iter(zip(*ways, strict=True))
        return [next(found) if place.requires_grad else (None,) * len(gradients) for place in places]

    def rows(self, gradients: Iterable[_ByLoss]) -> dict[str, Rows]:
        """Returns what the batch says of the layers, given the gradients at their outputs."""
        return {
            name: _rows(inputs, outputs, own)
            for (name, (inputs, outputs)), own in zip(self.calls.items(), gradients, strict=True)
        }


def _going_back(
    block: nn.Module,
    kind: str,
    batches: Iterable[tuple[BlockCall, torch.Tensor, torch.Tensor]],
    names: Sequence[str],
    before: list[torch.Tensor],
) -> Iterator[dict[str, Rows]]:
    """Yields what every batch says of layers of a block, and adds the gradients at the block's input to `before`.

    Args:
        block: The block.
        kind: Its kind.
        batches: What it is called with, the hidden states in front of it and the gradients at its output.
        names: Its layers, by path inside the block.
        before: What is added to.
    """
    for call, hidden, gradients in batches:
        run = _Run.of(block, kind, call, hidden, names, graph=True)
        *found, entering = run.back(gradients, run.entering)
        before.append(torch.stack([torch.zeros_like(hidden) if own is None else own for own in entering]))
        yield run.rows(found)


@contextmanager
def _calls(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Collects the inputs and outputs of layers while the body runs the block once."""
    calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            calls[name] = args[0], output
            return output.clone()  # a block may change it in place, which would move what is kept behind that

        return keep

    handles = [block.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield calls
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


def loss_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the gradient, with respect to logits, of the summed cross entropy: p − onehot, zero without a label.

    A few rows at a time: vocabularies are large, and probabilities are computed in float32.
    """
    gradient = torch.empty_like(logits)
    for rows, own, out in zip(logits.split(ROWS), labels.split(ROWS), gradient.split(ROWS), strict=True):
        p = rows.float().softmax(dim=-1)
        p[torch.arange(len(p), device=p.device), own.clamp_min(0)] -= 1
        p[own == UNLABELLED] = 0
        out.copy_(p)
    return gradient
