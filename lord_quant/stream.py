# SPDX-License-Identifier: Apache-2.0
"""Batches on their way through the transformer blocks: what the blocks are called with, captured from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lord_quant.residency import RESIDENT, Residency


class StopForward(Exception):
    """Ends a forward pass once the blocks' inputs are known. Not a ValueError: hosts swallow those."""


@dataclass
class BlockCall:
    """One batch on its way through the blocks: the hidden states and what else each kind of block is called with."""

    hidden: torch.Tensor
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]

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
    """Runs the model up to its first blocks and keeps what they are called with, once per kind of block."""
    first_of_kind = {kind: kinds.index(kind) for kind in kinds}
    device = next(model.parameters()).device
    captured: list[BlockCall] = []

    def store(index: int, kind: str) -> Any:
        def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            hidden, args = (args[0], args[1:]) if args else (kwargs["hidden_states"], args)
            if index == 0:
                captured.append(BlockCall(hidden, {}))
            captured[-1].calls[kind] = (args, others)
            if index == max(first_of_kind.values()):
                raise StopForward

        return pre_hook

    handles = [
        blocks[index].register_forward_pre_hook(store(index, kind), with_kwargs=True)
        for kind, index in first_of_kind.items()
    ]
    try:
        with residency.of(*range(max(first_of_kind.values()))):  # those in front of the last that is looked at
            for batch in batches:
                try:
                    model(input_ids=batch.to(device), use_cache=False)
                except StopForward:
                    continue
    finally:
        for handle in handles:
            handle.remove()
    return captured


def block_kinds(model: nn.Module, count: int) -> list[str]:
    """Labels blocks that are called with different masks (sliding and full attention); usually all alike."""
    kinds = getattr(getattr(model, "config", None), "layer_types", None)
    return list(kinds) if kinds and len(kinds) == count else ["block"] * count


def first_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple | list) else output


class Replay:
    """Remembers what parts of a block return for every batch, so that they run once and not again.

    For modules whose output cannot change any more: the block's inputs are fixed, and so is everything that comes before
    them in it. A module that is called more than once per batch is never replayed.

    Args:
        block: The block whose parts are meant.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.kept: dict[str, dict[int, Any]] = {}
        self.called_again: set[str] = set()
        self.calls: set[str] = set()
        self.position = 0

    def at(self, position: int) -> None:
        """Says which batch comes next."""
        self.position = position
        self.calls.clear()

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
            if self.position not in kept:
                kept[self.position] = forward(*args, **kwargs)
                for other, inner in self.kept.items():
                    if other.startswith(name + "."):
                        inner.pop(self.position, None)
            return _copied(kept[self.position])  # a caller may add into it

        return remembered


def _copied(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_copied(part) for part in output)
    return output.clone() if isinstance(output, torch.Tensor) else output
