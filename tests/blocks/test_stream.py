# SPDX-License-Identifier: Apache-2.0
"""Replaying finished parts of a block; capturing and running blocks is tested with the loops that do it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import families
import pytest
import torch
from torch import nn

from lord_quant.blocks.residency import Residency
from lord_quant.blocks.stream import Ending, Replay, block_kinds, capture
from lord_quant.targets import find_blocks


class Child(nn.Module):
    """Doubles its input and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.layer = nn.Identity()

    def forward(self, x: torch.Tensor, pair: bool = False) -> Any:
        self.calls += 1
        return (self.layer(2 * x), None, (3 * x,)) if pair else self.layer(2 * x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Child(), Child()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def batch(position: int) -> torch.Tensor:
    return torch.full((2, 3), float(position + 1))


def run(replay: Replay, block: nn.Module, modules: list[str], count: int = 2) -> list[torch.Tensor]:
    outputs = []
    with replay.of(modules):
        for position in range(count):
            replay.at(position)
            outputs.append(block(batch(position)))
    return outputs


def test_a_child_runs_once_per_batch_and_its_output_is_remembered() -> None:
    block = Block()
    replay = Replay(block)
    for calls in (2, 2, 2):
        outputs = run(replay, block, ["first"])
        assert all(torch.equal(output, 4 * batch(i)) for i, output in enumerate(outputs))
        assert block.first.calls == calls
    assert block.second.calls == 6
    run(replay, block, ["first"], count=3)
    assert block.first.calls == 3  # the third batch is new
    run(replay, block, [])
    assert block.first.calls == 5


def test_of_what_holds_others_only_its_own_output_is_remembered() -> None:
    block = Block()
    replay = Replay(block)
    run(replay, block, ["first.layer"])
    assert set(replay.kept["first.layer"]) == {0, 1}
    handle = block.first.layer.register_forward_hook(lambda module, args, output: calls.append(output))
    calls: list[torch.Tensor] = []
    outputs = run(replay, block, ["first", "first.layer"])  # first runs once more, on what its layer gave before
    assert not replay.kept["first.layer"] and set(replay.kept["first"]) == {0, 1} and len(calls) == 2
    again = run(replay, block, ["first", "first.layer"])
    assert block.first.calls == 4 and len(calls) == 2
    handle.remove()
    for i, (output, other) in enumerate(zip(outputs, again, strict=True)):
        assert torch.equal(output, 4 * batch(i)) and torch.equal(other, 4 * batch(i))


def test_children_are_themselves_again_afterwards_whatever_happened() -> None:
    block = Block()
    replay = Replay(block)
    run(replay, block, ["first", "second"])
    assert not [name for name, module in block.named_modules() if "forward" in vars(module)]
    with pytest.raises(ZeroDivisionError), replay.of(["first"]):
        raise ZeroDivisionError
    assert "forward" not in vars(block.first)


def test_a_forward_that_was_put_over_a_child_stays() -> None:
    block = Block()
    block.first.forward = lambda x: x + 100
    replay = Replay(block)
    for _ in range(2):
        assert torch.equal(run(replay, block, ["first"])[0], 2 * (batch(0) + 100))
    assert torch.equal(block(batch(0)), 2 * (batch(0) + 100))


def test_what_is_remembered_cannot_be_changed_by_those_who_get_it() -> None:
    class InPlace(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            doubled, nothing, (tripled,) = self.first(x, pair=True)
            assert nothing is None
            return doubled.add_(tripled.mul_(10))

    block = InPlace()
    replay = Replay(block)
    for _ in range(3):
        outputs = run(replay, block, ["first"])
        assert all(torch.equal(output, 32 * batch(i)) for i, output in enumerate(outputs))
    assert block.first.calls == 2


def test_a_child_that_is_called_twice_per_batch_is_not_replayed() -> None:
    class Twice(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(self.first(x) + 1))

    block = Twice()
    replay = Replay(block)
    for calls in (4, 8, 12):
        outputs = run(replay, block, ["first", "second"])
        assert all(torch.equal(output, 8 * batch(i) + 4) for i, output in enumerate(outputs))
        assert block.first.calls == calls
    assert block.second.calls == 2


def test_an_exception_leaves_nothing_half_remembered() -> None:
    block = Block()
    replay = Replay(block)
    handle = block.first.layer.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(replay, block, ["first"])
    handle.remove()
    assert torch.equal(run(replay, block, ["first"])[1], 4 * batch(1))


@pytest.mark.parametrize("others", [None, (None, ("kept",))])
def test_a_part_left_at_a_layer_is_entered_there_again(others: tuple[Any, ...] | None) -> None:
    block = Block()
    replay = Replay(block)
    replay.endings = {"first": Ending("first.layer", others)}
    replay.at(0)
    replay.leave("first.layer", batch(4))
    with replay.of(["first"]):
        for position, entered, calls in ((0, batch(4), 0), (0, batch(4), 0), (1, 2 * batch(1), 1)):
            replay.at(position)
            output = block.first(batch(position))
            if not position and others is not None:
                output, *rest = output
                assert tuple(rest) == others
            assert torch.equal(output, entered)
            assert block.first.calls == calls
    assert not replay.entered["first"]


def test_leaving_a_part_forgets_what_was_remembered_inside_it() -> None:
    block = Block()
    replay = Replay(block)
    replay.endings = {"first": Ending("first.layer", None)}
    run(replay, block, ["first.layer"])
    assert set(replay.kept["first.layer"]) == {0, 1}
    replay.at(1)
    replay.leave("first.layer", batch(4))
    assert set(replay.kept["first.layer"]) == {0}


def test_what_is_the_same_for_every_batch_is_kept_once() -> None:
    """CodeGen's attention takes a mask per batch, all of them equal."""
    model = families.build("codegen")
    blocks = find_blocks(model).modules
    batches = [torch.randint(1, 100, (size, 16)) for size in (2, 2, 2, 1)]
    calls = capture(model, blocks, block_kinds(model, len(blocks)), batches)
    masks = [call.calls["block"][1]["attention_mask"] for call in calls]
    assert [mask.shape for mask in masks] == [(2, 1, 16, 16)] * 3 + [(1, 1, 16, 16)]
    assert masks[0] is masks[1] is masks[2]
    with torch.no_grad():
        for batch, call in zip(batches, calls, strict=True):
            hidden = call.hidden
            for block in blocks:
                hidden = call.run(block, "block", hidden)
            assert torch.equal(
                model.lm_head(model.transformer.ln_f(hidden)), model(input_ids=batch, use_cache=False).logits
            )


class Counted(Residency):
    """Counts how many blocks have their weights at a time."""

    def __init__(self) -> None:
        self.now, self.most, self.filled = 0, 0, list[int]()

    @contextmanager
    def of(self, *blocks: int, then: int | None = None) -> Iterator[None]:
        self.filled += blocks
        self.now += len(blocks)
        self.most = max(self.most, self.now)
        yield
        self.now -= len(blocks)


def test_of_blocks_of_several_kinds_one_has_its_weights_at_a_time_and_calls_are_those_of_the_model() -> None:
    layers = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
    model = families.build("qwen2", use_sliding_window=True, sliding_window=4, **layers)
    blocks = find_blocks(model).modules
    kinds = block_kinds(model, len(blocks))
    batches, counted = [torch.randint(1, 100, (2, 16)) for _ in range(3)], Counted()
    with torch.no_grad():
        calls = capture(model, blocks, kinds, batches, counted)
        assert counted.most == 1 and counted.filled == [0, 1, 2, 3, 4]
        for batch, call in zip(batches, calls, strict=True):
            hidden = call.hidden
            for block, kind in zip(blocks, kinds, strict=True):
                hidden = call.run(block, kind, hidden)
            assert torch.equal(model.lm_head(model.model.norm(hidden)), model(input_ids=batch, use_cache=False).logits)
    assert not any("forward" in vars(block) for block in blocks)
