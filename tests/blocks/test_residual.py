# SPDX-License-Identifier: Apache-2.0
"""Which layers write to the residual stream, what it is in front of them, and what making up for it brings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_runs import BATCHES, plan_of, rounding, run_joint
from models import tiny_model
from torch import nn

from lord_quant import stack
from lord_quant.blocks.residual import watched
from lord_quant.blocks.stream import block_kinds, capture
from lord_quant.config import JointConfig
from lord_quant.targets import find_blocks


WRITERS = {
    "gpt2": {"attn.c_proj": "attn", "mlp.c_proj": "mlp"},
    "bigcode": {"attn.c_proj": "attn", "mlp.c_proj": "mlp"},
    "codegen": {"attn.out_proj": "attn", "mlp.fc_out": "mlp"},
    "llama": {"self_attn.o_proj": "self_attn", "mlp.down_proj": "mlp"},
    "qwen2": {"self_attn.o_proj": "self_attn", "mlp.down_proj": "mlp"},
    "gemma2": {},  # norms behind attention and MLP
}


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_layers_that_write_are_found_in_calling_order(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    blocks = find_blocks(model).modules
    kinds = block_kinds(model, len(blocks))
    call = capture(model, blocks, kinds, BATCHES[:1])[0]
    for block, kind in zip(blocks, kinds, strict=True):
        with watched(block) as passed:
            left = call.run(block, kind)
        found = passed.writers(left)
        assert list(found.items()) == list(WRITERS[family].items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


class Part(nn.Module):
    """Two layers, of which the last one's output is returned."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


class Block(nn.Module):
    """Two parts; how they are added is said by a function of the stream and what a part returns."""

    def __init__(self, width: int, add: Any) -> None:
        super().__init__()
        self.one, self.two, self.add = Part(width), Part(width), add

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.add(hidden, self.one(hidden))
        return self.add(hidden, self.two(hidden))


def block_of(add: Any, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block(16, add)


def add_in_place(hidden: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return part.add_(hidden)


@pytest.mark.parametrize(
    ("add", "writers"),
    [
        (torch.add, True),
        (add_in_place, True),
        (lambda hidden, part: hidden + 0.22 * part, False),
        (lambda hidden, part: hidden + 0.97 * part, False),
        (lambda hidden, part: hidden - part, False),
        (lambda hidden, part: hidden + torch.nn.functional.layer_norm(part, part.shape[-1:]), False),
        (lambda hidden, part: part, False),
        (lambda hidden, part: hidden, False),
    ],
    ids=["sum", "in place", "scaled", "hardly scaled", "taken off", "norm behind", "no residual", "unused"],
)
@pytest.mark.parametrize("loud", [1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_blocks_that_add_otherwise_have_no_writers(add: Any, writers: bool, loud: float, dtype: torch.dtype) -> None:
    """Also where the stream is so much larger than what is added to it that rounding would hide a factor."""
    block = block_of(add).to(dtype)
    block.one.first.weight.div_(loud)
    hidden = loud * torch.randn(16, 512, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    with watched(block) as passed:
        left = block(hidden.clone())
    assert passed.writers(left) == ({"one.last": "one", "two.last": "two"} if writers else {})


@torch.no_grad()
def test_the_stream_is_that_in_front_of_the_addition() -> None:
    block, writers = block_of(add_in_place), {"one.last": "one", "two.last": "two"}
    with watched(block, writers) as passed:
        for seed in range(2):  # nothing of the batch before stays
            hidden = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(seed))
            block(hidden.clone())
            middle = hidden + block.one(hidden)
            assert torch.equal(passed.in_front("one.last"), hidden)
            torch.testing.assert_close(passed.in_front("two.last"), middle)
            torch.testing.assert_close(passed.behind("two.last"), middle + block.two(middle))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("family", ["bigcode", "codegen", "gpt2", "llama", "qwen2"])
def test_the_stream_comes_closer_to_the_dense_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to nearest, the stream behind the last block has half the error if layers make up for what it lacks."""
    monkeypatch.setattr(stack, "OUTPUT_DAMPING", 0.0)  # the tokens are few, and all that are asked about
    lost = {residual: lost_with(family, JointConfig(residual=residual, refine=0)) for residual in (True, False)}
    assert 0 < lost[True] < 0.5 * lost[False]


def test_layers_compressed_at_once_or_for_their_own_outputs_do_not_make_up_for_it() -> None:
    at_once = [
        lost_with("bigcode", JointConfig(residual=residual, refine=0), sequential=False) for residual in (True, False)
    ]
    own = [lost_with("bigcode", JointConfig(anchor=False, residual=residual, refine=0)) for residual in (True, False)]
    assert at_once[0] == at_once[1] and own[0] == own[1]


def lost_with(family: str, options: JointConfig, sequential: bool = True) -> float:
    """The squared error of the stream behind the last block with all layers rounded."""
    model = tiny_model(family)
    dense = stream_behind(model)
    run_joint(model, plan_of(model, rank_ratio=1, bits=4), rounding, options, true_sequential=sequential)
    return float((stream_behind(model) - dense).square().sum())


@torch.no_grad()
def stream_behind(model: nn.Module) -> torch.Tensor:
    """What leaves the last block on the calibration tokens."""
    blocks = find_blocks(model).modules
    kinds = block_kinds(model, len(blocks))
    left = []
    for call in capture(model, blocks, kinds, BATCHES):
        hidden = call.hidden
        for block, kind in zip(blocks, kinds, strict=True):
            hidden = call.run(block, kind, hidden)
        left.append(hidden)
    return torch.cat(left)
