# SPDX-License-Identifier: Apache-2.0
"""Predicted cost: what must grow with what, at a fixed speed of the machine."""

from __future__ import annotations

import math

import pytest
import torch

from lord_quant.config import GptqConfig, LowrankConfig
from lord_quant.plan import Plan, build_plan
from lord_quant.runs import estimate as module
from lord_quant.runs.estimate import Estimate, estimate, matrix_flops, seconds_of
from lord_quant.runs.operations import Workload, count_phases, total
from lord_quant.targets import LinearSite


CPU = torch.device("cpu")


def plan_of(blocks: int = 4, width: int = 256, bits: int = 4, rank_ratio: float = 0.5) -> Plan:
    shapes = {"attn": (width, width), "fc": (width, 4 * width), "proj": (4 * width, width)}
    sites = [
        LinearSite(f"h.{block}.{name}", block, inputs, outputs, True)
        for block in range(blocks)
        for name, (inputs, outputs) in shapes.items()
    ]
    lowrank = LowrankConfig(rank_ratio=rank_ratio, force_rank=True)
    return build_plan(sites, lowrank, GptqConfig(bits=bits, group_size=32), itemsize=2, other_bytes=10**6)


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "matrix_flops", lambda device: 1e10)


def predict(plan: Plan, tokens: int = 10_000, joint: bool = True, fisher_tokens: int = 0) -> Estimate:
    return estimate(plan, Workload(tokens, 2, joint, fisher_tokens=fisher_tokens), CPU)


@pytest.mark.parametrize("joint", [True, False])
def test_time_is_linear_in_blocks_and_grows_with_tokens(joint: bool) -> None:
    one, two = (predict(plan_of(blocks), joint=joint).seconds for blocks in (4, 8))
    assert two == pytest.approx(2 * one, rel=1e-6)
    assert predict(plan_of(), 20_000, joint).seconds > 1.1 * one


def test_solving_takes_time_and_float_runs_have_none() -> None:
    assert predict(plan_of(bits=4)).seconds > predict(plan_of(bits=16)).seconds


def test_time_is_that_of_the_phases_at_their_speeds() -> None:
    """Eigendecompositions reach 15 percent of matrix speed; loops 0.12 µs a weight, beside a GPU 10 ns, a turn 200 µs."""
    plan, load = plan_of(), Workload(10_000, 2, True, seq_len=500, fisher_tokens=2_000, head_weights=10**6)
    work = count_phases(plan, load).values()
    straight = sum(one.passes + one.products + one.rotations + one.solves + one.eigen / 0.15 for one in work) / 1e10
    looped, turns = sum(one.looped for one in work), sum(one.turns for one in work)
    assert looped > 0 and turns > 0
    coupled = sum(one.coupled for one in work) / 1e10  # rows know of each other on a CPU alone
    assert coupled > 0
    assert estimate(plan, load, CPU).seconds == pytest.approx(straight + coupled + 1.2e-7 * looped)
    assert seconds_of(total(work), torch.device("cuda")) == pytest.approx(straight + 1e-8 * looped + 2e-4 * turns)


def test_the_backward_pass_takes_time_and_memory() -> None:
    """A gradient per block and token, where all that waits is little."""
    plan, tokens = plan_of(), 500
    without, with_it = (predict(plan, tokens, fisher_tokens=fisher) for fisher in (0, tokens))
    assert with_it.seconds > without.seconds + 2 * tokens * 5 * sum(layer.dense_weights for layer in plan.layers) / 1e10
    deeper = [predict(plan_of(blocks=8), tokens, fisher_tokens=fisher).memory_bytes for fisher in (0, tokens)]
    less = with_it.memory_bytes - without.memory_bytes
    assert deeper[1] - deeper[0] - less == 4 * 2 * 256 * tokens * 4  # four blocks more: inputs and gradients in 4 bytes


def test_much_text_and_many_blocks_wait_in_files() -> None:
    long, longer = (predict(plan_of(), tokens, fisher_tokens=tokens // 2).memory_bytes for tokens in (10**6, 10**7))
    assert long == longer == predict(plan_of(blocks=40), 10**7, fisher_tokens=10**6).memory_bytes


def test_memory_holds_at_least_the_model_or_of_a_streamed_one_two_blocks() -> None:
    four, eight = plan_of(), plan_of(blocks=8)
    weights = 4 * sum(layer.dense_weights for layer in four.layers)
    assert predict(four, joint=False).memory_bytes > weights
    assert predict(eight, joint=False).memory_bytes - predict(four, joint=False).memory_bytes == weights
    assert predict(eight).memory_bytes == predict(four).memory_bytes > weights / 2


def test_the_speed_of_the_machine_is_measured() -> None:
    assert 1e7 < matrix_flops(CPU, size=64) < 1e15 and math.isfinite(matrix_flops(CPU, size=64))
