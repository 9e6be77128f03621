# SPDX-License-Identifier: Apache-2.0
"""Counted operations against those torch itself counts, and closed forms for what it does not count."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lord_quant.config import GptqConfig, JointConfig, LowrankConfig
from lord_quant.moments import PairedAccumulator, PairedMoments
from lord_quant.plan import LayerPlan, Plan, build_plan
from lord_quant.rounding.solver import COLUMNS, exact
from lord_quant.rounding.two_sided import GPU_STEPS
from lord_quant.runs.operations import (
    COUPLED_LOOPS,
    FISHER_PASSES,
    HEAD_PASSES,
    JOINT_PASSES,
    Work,
    Workload,
    anchor_work,
    cholesky_flops,
    count_phases,
    paired_moment_flops,
    qr_flops,
    stack_work,
    truncation_work,
)
from lord_quant.stack import anchored_target, stack_layer
from lord_quant.targets import LinearSite
from lord_quant.truncation import truncate, weigh


LOAD = Workload(num_tokens=5000, itemsize=2, joint=True, seq_len=100, fisher_tokens=800, head_weights=7000)
TALL, WIDE, SQUARE = (768, 512), (512, 768), (512, 512)


def plan_of(*shapes: tuple[int, int], blocks: int = 1, bits: int = 4, ratio: float = 0.5) -> Plan:
    sites = [
        LinearSite(f"h.{block}.{at}", block, inputs, outputs, True)
        for block in range(blocks)
        for at, (outputs, inputs) in enumerate(shapes)
    ]
    lowrank = LowrankConfig(rank_ratio=ratio, force_rank=True)
    return build_plan(sites, lowrank, GptqConfig(bits=bits, group_size=32), itemsize=2, other_bytes=30_000)


def layer_of(shape: tuple[int, int]) -> LayerPlan:
    return plan_of(shape).layers[0]


def matrices(shape: tuple[int, int]) -> tuple[torch.Tensor, PairedMoments, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = shape

    def moment(size: int) -> torch.Tensor:
        rows = torch.randn(2 * size, size, generator=generator)
        return rows.T @ rows / len(rows)

    h, zero = moment(inputs), torch.zeros(inputs)
    return torch.randn(shape, generator=generator), PairedMoments(zero, zero, h, h.clone(), 9), moment(outputs)


def counted(work: object) -> int:
    """Operations of matrix products alone, which is what torch counts."""
    with FlopCounterMode(display=False) as counter:
        work()  # type: ignore[operator]
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_moments_are_counted_as_torch_does(shape: tuple[int, int]) -> None:
    inputs, seen = shape[1], min(shape)  # the dense side at the narrower end
    dense, ours = torch.randn(64, seen), torch.randn(64, inputs)
    found = counted(lambda: PairedAccumulator(inputs, dense_features=seen).update(dense, ours))
    in_place = 2 * seen * inputs * 64  # of C, which torch leaves out
    assert paired_moment_flops(layer_of(shape), 64) == found + in_place


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_anchor_is_counted_as_torch_does(shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    weight, moments, _ = matrices(shape)
    products = counted(lambda: anchored_target(weight, moments))
    solve = cholesky_flops(inputs) + 2 * outputs * inputs**2  # by LAPACK, which torch leaves out
    assert anchor_work(layer_of(shape)).products == pytest.approx(products + solve)


@pytest.mark.parametrize("of_loss", [False, True])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_truncation_is_counted_as_torch_does(shape: tuple[int, int], of_loss: bool) -> None:
    m, n = shape
    layer = layer_of(shape)
    r = layer.rank
    assert r is not None
    weight, moments, metric = matrices(shape)
    products = counted(lambda: truncate(weigh(weight, metric if of_loss else None), moments.covariance, r))
    lapack = (qr_flops(m, n) if m > n else 0) + of_loss * (cholesky_flops(m) + m**2 * r + qr_flops(m, r))
    found = truncation_work(layer, of_loss)
    assert found.products == pytest.approx(products + lapack)
    assert found.eigen == 10 * min(m, n) ** 3


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_gauge_and_refit_are_counted_as_torch_does(shape: tuple[int, int], coupled: bool) -> None:
    m, n = shape
    layer = layer_of(shape)
    r = layer.rank
    assert r is not None
    weight, moments, metric = matrices(shape)
    options = JointConfig(anchor=False, refine=0, two_sided=coupled)

    def stacked(solve: object) -> int:
        return counted(
            lambda: stack_layer(weight, None, moments, r, "two_factor", solve, options, metric=metric)  # type: ignore[arg-type]
        )

    own = stacked(exact) - stacked(None)
    shapes = layer.factor_shapes().values()
    solves = sum(10 * inputs**2 * outputs for inputs, outputs in shapes)  # polishing, two sweeps
    solved_by_lapack = cholesky_flops(r) + 2 * r**2 * (n if m < n else m)
    if m >= n + coupled:
        solved_by_lapack += cholesky_flops(r) + 2 * r**2 * n  # of the deflated metric
    elif coupled:
        solved_by_lapack += cholesky_flops(r) + 2 * r**2 * m
    if coupled:
        solved_by_lapack += sum(2 * cholesky_flops(outputs) for _, outputs in shapes)  # factors, and what inverts them
    found = stack_work(layer, coupled)
    assert found.products == pytest.approx(own + solves + solved_by_lapack, rel=0.1 if coupled else 0.02)
    assert found.rotations == pytest.approx(8 / 3 * r**3)
    assert found.turns == 3 * (n + r) / COLUMNS * (GPU_STEPS if coupled else 1)  # a solve and two sweeps
    assert found.solves == sum(2 * i**2 * o + i**3 for i, o in shapes)
    assert found.looped == (COUPLED_LOOPS if coupled else 1) * sum(i * o for i, o in shapes)


def test_passes_count_weights_attention_and_head() -> None:
    plan = plan_of(SQUARE, TALL, blocks=3)
    dense = sum(layer.dense_weights for layer in plan.layers)
    kept = sum(layer.weights for layer in plan.layers)
    attention = 3 * 4 * LOAD.seq_len * 512  # three blocks, scores and their product with values
    found = count_phases(plan, LOAD)
    assert found["forward, both streams"] == Work(
        passes=5000 * (2 * dense + attention + JOINT_PASSES * (2 * kept + attention))
    )
    sensitivity = found["sensitivity"]
    assert sensitivity.passes == 800 * (FISHER_PASSES * (2 * dense + attention) + HEAD_PASSES * 2 * 7000)
    assert sensitivity.files == 2 * 2 * dense
    assert found["pack"] == Work(packed=kept)
    assert found["files"].files == 2 * dense + 30_000 + 2 * 5000 * 512 * 2 * 3 + 3 * plan.tensor_bytes


def test_phases_that_do_nothing_are_left_out() -> None:
    both = {"forward, both streams", "moments", "anchor", "decompose", "files"}
    assert set(count_phases(plan_of(TALL, bits=16), LOAD._replace(fisher_tokens=0))) == both
    assert "quantize" not in count_phases(plan_of(TALL, bits=16), LOAD._replace(joint=False))
    naive = count_phases(plan_of(TALL), LOAD._replace(joint=False))
    assert list(naive) == ["forward", "moments", "decompose", "files", "quantize", "pack"]


def test_work_adds_up_field_by_field() -> None:
    assert Work(passes=1, files=2) + Work(passes=3, turns=4) == Work(passes=4, files=2, turns=4)
