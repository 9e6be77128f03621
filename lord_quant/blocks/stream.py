# SPDX-License-Identifier: Apache-2.0
"""Batches on their way through the transformer blocks: what the blocks are called with, captured from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from lord_quant.blocks.residency import RESIDENT, Residency
from lord_quant.files.kept import Keep, Kept


class StopForward(Exception):
    """Ends a forward pass once the blocks' inputs are known. Not a ValueError: hosts swallow those."""


class BlockCall:
    """One batch on its way through the blocks: the hidden states and what else each kind of block is called with.

    Args:
        hidden: The hidden states, with shape (batch, seq_len, features).
        keep: Keeps them while other batches are at work.
    """

    def __init__(self, hidden: torch.Tensor, keep: Keep) -> None:
        self._keep = keep
        self.hidden = hidden
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states in front of the next block; not to be written into."""
        return self._hidden.get()[0]

    @hidden.setter
    def hidden(self, states: torch.Tensor) -> None:
        self._hidden = self._keep([states])

    def run(self, block: nn.Module, kind: str, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Runs a block on `hidden`, or on the batch's own hidden states, and returns the hidden states that leave it."""
        args, kwargs = self.calls[kind]
        return first_of(block(self.hidden if hidden is None else hidden, *args, **kwargs))


def capture(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    kinds: Sequence[str],
    batches: Sequence[torch.Tensor],
    residency: Residency = RESIDENT,
) -> list[BlockCall]:
    """Runs the model up to its first blocks and keeps what they are called with, once per kind of block.

    Blocks in front of the last that is looked at run for the first batch; all that this shows is how they return hidden
    states. What the others are called with does not depend on these.
    """
    first_of_kind = {kind: kinds.index(kind) for kind in kinds}
    device, last = next(model.parameters()).device, max(first_of_kind.values())
    captured: list[BlockCall] = []
    ways: list[Way] = []

    def store(index: int, kind: str) -> Any:
        def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            hidden, args = (args[0], args[1:]) if args else (kwargs["hidden_states"], args)
            if index == 0:
                captured.append(BlockCall(hidden, residency.keep))
            before = captured[-2].calls.get(kind) if len(captured) > 1 else None
            captured[-1].calls[kind] = (args, others) if before is None else _shared((args, others), before)
            if index == last:
                raise StopForward

        return pre_hook

    handles = [
        blocks[index].register_forward_pre_hook(store(index, kind), with_kwargs=True)
        for kind, index in first_of_kind.items()
    ]
    try:
        for batch in batches:
            ahead = blocks[:last]
            passing = passed_over(ahead, ways) if ways else one_at_a_time(ahead, residency, ways)
            with passing, suppress(StopForward):
                model(input_ids=batch.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return captured


def _shared(value: Any, before: Any) -> Any:
    """Returns a value with `before` in place of every tensor that equals it: masks take memory, batch by batch."""
    if isinstance(value, torch.Tensor):
        alike = isinstance(before, torch.Tensor) and (value.device, value.dtype) == (before.device, before.dtype)
        return before if alike and torch.equal(value, before) else value
    if isinstance(value, dict) and isinstance(before, dict):
        return {key: _shared(item, before.get(key)) for key, item in value.items()}
    if type(value) is tuple and type(before) is tuple and len(value) == len(before):
        return tuple(map(_shared, value, before))
    return value


def block_kinds(model: nn.Module, count: int) -> list[str]:
    """Labels blocks that are called with different masks (sliding and full attention); usually all alike."""
    kinds = getattr(getattr(model, "config", None), "layer_types", None)
    return list(kinds) if kinds and len(kinds) == count else ["block"] * count


def first_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple | list) else output


class Ending(NamedTuple):
    """How a part of a block ends: it returns what one of its layers does, as it is.

    Attributes:
        layer: The layer, by path inside the block.
        others: What else the part returns, None in place of tensors; None if it returns the one tensor alone.
        whole: Whether nothing is left out, as there are no other tensors.
    """

    layer: str
    others: tuple[Any, ...] | None
    whole: bool = True

    @classmethod
    def of(cls, layer: str, output: Any) -> Ending:
        """Describes what a part returned that ends in a layer."""
        if not isinstance(output, tuple):
            return cls(layer, None)
        others = tree_map_only(torch.Tensor, lambda _: None, output[1:])
        return cls(layer, others, not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(output[1:])))

    def around(self, tensor: torch.Tensor) -> Any:
        """Returns what the part does, given what its layer returns."""
        return tensor if self.others is None else (tensor, *self.others)


@contextmanager
def returning(block: nn.Module, layers: Sequence[str], told: Callable[[str, Any, list[str]], None]) -> Iterator[None]:
    """Tells of parts of a block whenever they return, inner ones first: which of its layers' outputs that is, as it is.

    Args:
        block: The block.
        layers: Layers, by path inside it; parts are the modules in it that are none of them.
        told: Is called with a part's path, what it returned, and the layers whose latest output is the tensor in that.
    """
    latest: dict[str, tuple[torch.Tensor, int]] = {}

    def leaving(layer: str) -> Any:
        def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            latest[layer] = output, output._version

        return note

    def closing(part: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            first = first_of(output)
            told(part, output, [name for name, (x, version) in latest.items() if x is first and first._version == version])

        return note

    with ExitStack() as hooks:
        for name, module in block.named_modules():
            if name:
                hook = leaving(name) if name in layers else closing(name)
                hooks.callback(module.register_forward_hook(hook).remove)
        yield


class Remembered(NamedTuple):
    """What a module returned.

    Attributes:
        tensors: The tensors in it.
        leaves: Whatever it holds, None in place of tensors.
        places: Where among the leaves the tensors belong.
        structure: How the leaves hang together.
    """

    tensors: Kept
    leaves: list[Any]
    places: list[int]
    structure: TreeSpec

    @classmethod
    def of(cls, output: Any, keep: Keep) -> Remembered:
        """Remembers an output."""
        leaves, structure = tree_flatten(output)
        found = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        others = [None if place in found else leaf for place, leaf in enumerate(leaves)]
        return cls(keep(list(found.values())), others, list(found), structure)

    def again(self) -> Any:
        """Returns the same again; a caller may write into it."""
        tensors = dict(zip(self.places, self.tensors.get(), strict=True))
        leaves = [tensors[place].clone() if place in tensors else leaf for place, leaf in enumerate(self.leaves)]
        return tree_unflatten(leaves, self.structure)


class Replay:
    """Remembers what parts of a block return for every batch, so that they run once and not again.

    For modules whose output cannot change any more: the block's inputs are fixed, and so is everything that comes before
    them in it. A module that is called more than once per batch is never replayed.

    A part that ends in a layer (attention, MLP) is left where that layer's input is known, and entered there again once
    the layer is compressed: nothing in front of it runs twice.

    Args:
        block: The block whose parts are meant.
        keep: Keeps what is remembered of one batch while others are at work.

    Attributes:
        endings: Which parts end in which layer, by path inside the block.
    """

    def __init__(self, block: nn.Module, keep: Keep = Kept) -> None:
        self.block, self.keep = block, keep
        self.endings: dict[str, Ending] = {}
        self.entered: dict[str, dict[int, Kept]] = {}
        self.kept: dict[str, dict[int, Remembered]] = {}
        self.called_again: set[str] = set()
        self.calls: set[str] = set()
        self.position = 0

    def at(self, position: int) -> None:
        """Says which batch comes next."""
        self.position = position
        self.calls.clear()

    def leave(self, layer: str, x: torch.Tensor) -> None:
        """Says that the batch went as far as a layer's input and will go no further before the layer is compressed."""
        for part, ending in self.endings.items():
            if ending.layer == layer:
                self.entered.setdefault(part, {})[self.position] = self.keep([x])
                self._forget_inside(part)

    @contextmanager
    def of(self, modules: Iterable[str]) -> Iterator[None]:
        """Replays these modules, named by path, while the body runs; what was not seen yet runs once and is remembered.

        Of a module that holds others only its own output is remembered, once it has one.
        """
        replaced = {name: self.block.get_submodule(name) for name in modules if name not in self.called_again}
        own = {name: vars(module)["forward"] for name, module in replaced.items() if "forward" in vars(module)}
        for name, module in replaced.items():
            module.forward = self._remembering(name, module.forward)
        try:
            yield
        finally:
            for name, module in replaced.items():
                if name in own:  # put there by a host, as accelerate does
                    module.forward = own[name]
                else:
                    del module.forward

    def _remembering(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        kept = self.kept.setdefault(name, {})

        def remembered(*args: Any, **kwargs: Any) -> Any:
            if name in self.calls:
                self.called_again.add(name)
                kept.clear()
            self.calls.add(name)
            if name in self.called_again:
                return forward(*args, **kwargs)
            if self.position in kept:
                return kept[self.position].again()
            x = self.entered.get(name, {}).pop(self.position, None)
            output = forward(*args, **kwargs) if x is None else self._end(self.endings[name], *x.take())
            kept[self.position] = Remembered.of(output, self.keep)
            self._forget_inside(name)
            return tree_map_only(torch.Tensor, torch.clone, output)  # a caller may add into it

        return remembered

    def _end(self, ending: Ending, x: torch.Tensor) -> Any:
        return ending.around(self.block.get_submodule(ending.layer)(x))

    def _forget_inside(self, name: str) -> None:
        for other in (other for other in (*self.kept, *self.entered) if other.startswith(name + ".")):
            self.kept.get(other, {}).pop(self.position, None)
            self.entered.get(other, {}).pop(self.position, None)


class Way(NamedTuple):
    """How a block returns its hidden states: in front of so many other values in a tuple or list, or alone."""

    container: type | None
    others: int

    def back(self, hidden: torch.Tensor) -> Any:
        """Returns hidden states as the block would, without its other values."""
        return hidden if self.container is None else self.container((hidden, *(None,) * self.others))


def _way(output: Any) -> Way:
    return Way(type(output), len(output) - 1) if isinstance(output, tuple | list) else Way(None, 0)


@contextmanager
def way_of(block: nn.Module, ways: list[Way]) -> Iterator[None]:
    """Notes how a block returns its hidden states: alone, or in front of something else."""
    seen: list[Way] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(_way(output))

    handle = block.register_forward_hook(keep)
    try:
        yield
        ways.append(seen[-1])
    finally:
        handle.remove()


@contextmanager
def passed_over(
    blocks: Sequence[nn.Module], ways: Sequence[Way], leaving: torch.Tensor | None = None
) -> Iterator[list[int]]:
    """Lets a model run while its blocks do nothing, but the last return `leaving` if given; yields which were called."""
    called: list[int] = []

    def stand_in(index: int, block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            called.append(index)
            hidden = args[0] if args else kwargs["hidden_states"]
            # A leaf may not be changed in place, and what follows might.
            return ways[index].back(hidden if leaving is None or index < len(blocks) - 1 else leaving.clone())

        return forward

    with _other_forwards(blocks, stand_in):
        yield called


@contextmanager
def one_at_a_time(blocks: Sequence[nn.Module], residency: Residency, ways: list[Way]) -> Iterator[None]:
    """Lets each of the first blocks have its weights only while it runs, and notes how it returns its hidden states."""

    def stand_in(index: int, block: nn.Module) -> Callable[..., Any]:
        own = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with residency.of(index):
                output = own(*args, **kwargs)
            ways.append(_way(output))
            return output

        return forward

    with _other_forwards(blocks, stand_in):
        yield


@contextmanager
def _other_forwards(blocks: Sequence[nn.Module], make: Callable[[int, nn.Module], Callable[..., Any]]) -> Iterator[None]:
    own = {index: vars(block)["forward"] for index, block in enumerate(blocks) if "forward" in vars(block)}
    for index, block in enumerate(blocks):
        block.forward = make(index, block)
    try:
        yield
    finally:
        for index, block in enumerate(blocks):
            if index in own:  # put there by a host, as accelerate does
                block.forward = own[index]
            else:
                del block.forward
