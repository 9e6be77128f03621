# SPDX-License-Identifier: Apache-2.0
"""What each idea of the joint stack brings: mean errors with a crude solver, with and without it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from layer_problems import F64, FORMS, crude, problem, product, run

from lord_quant.config import GptqConfig, JointConfig
from lord_quant.rounding import stack_forms
from lord_quant.rounding.solver import Gptq
from lord_quant.rounding.two_sided import round_rows


SHAPES = [(32, 16), (16, 32), (24, 24)]


def mean_error(
    form: str, shape: tuple[int, int], seeds: int = 10, bits: int = 3, *, coupled: bool = False, **options: Any
) -> float:
    """Average share of the output energy that rounding loses on top of truncation, with a crude solver.

    Outputs count alike, or `coupled` in a metric in which a few directions of theirs are loud; with GPTQ then, which can be
    told of it.
    """
    total, solve = 0.0, Gptq(GptqConfig(bits=bits), 8, 1) if coupled else crude(bits)
    for seed in range(seeds):
        chosen = JointConfig(**({"refine": 0} | options))
        loud = torch.randn(shape[0], shape[0] // 4, generator=torch.Generator().manual_seed(seed), dtype=F64)
        rest = {"sensitivity": loud @ loud.T} if coupled else {}
        result = run(problem(*shape, seed), 8, form, solve, chosen, seed=seed, **rest)
        assert result.spectrum is not None
        total += result.error - result.spectrum.discarded_share(8)
    return total / seeds


@pytest.mark.parametrize("order", ["down_first", "up_first"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_refitting_lowers_the_error(shape: tuple[int, int], form: str, order: str) -> None:
    assert mean_error(form, shape, order=order) < 0.9 * mean_error(form, shape, order=order, refit=False)


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (24, 24)])
def test_the_automatic_order_is_not_the_worse_one(shape: tuple[int, int]) -> None:
    auto, down, up = (mean_error("two_factor", shape, order=order) for order in ("auto", "down_first", "up_first"))
    assert auto in (down, up) and auto < 1.02 * min(down, up)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("idea", ["rotate", "deflate"])
def test_rotating_and_deflating_lower_the_error(idea: str, shape: tuple[int, int]) -> None:
    """With refinement, which knows the metric; rounding alone would not notice."""
    on, off = (mean_error("two_factor", shape, order="down_first", refine=2, **{idea: value}) for value in (True, False))
    assert on < 0.95 * off


@pytest.mark.parametrize("form", FORMS)
def test_refining_lowers_the_error(form: str) -> None:
    assert mean_error(form, (24, 24), refine=2) < 0.75 * mean_error(form, (24, 24), refine=0)


@pytest.mark.parametrize("rank", [8, None])
def test_anchoring_lowers_the_true_error(rank: int | None) -> None:
    """Not that of the target, but of the dense outputs from compressed inputs."""
    lost = {True: 0.0, False: 0.0}
    for seed in range(6):
        p = problem(20, 16, seed, drift=0.6)
        for anchor in lost:
            result = run(p, rank, "two_factor", crude(4), JointConfig(anchor=anchor))
            lost[anchor] += p.lost(product(result))
    assert lost[True] < 0.9 * lost[False]


@pytest.mark.parametrize("shape", SHAPES)
def test_feedback_between_pivoted_rows_lowers_the_error(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    fed = mean_error("pivoted", shape, seeds=20)
    monkeypatch.setattr(stack_forms, "round_rows", functools.partial(round_rows, steps=1))
    assert fed < 0.95 * mean_error("pivoted", shape, seeds=20)


@pytest.mark.parametrize(("form", "share"), [("two_factor", 0.5), ("pivoted", 0.97)])
def test_two_sided_rounding_lowers_the_error_where_outputs_are_coupled(form: str, share: float) -> None:
    """Pivoted layers know of their outputs without it, but for `up`."""
    one, two = (sum(mean_error(form, shape, coupled=True, two_sided=both) for shape in SHAPES) for both in (False, True))
    assert two < share * one
    shape = SHAPES[0]
    assert mean_error(form, shape, two_sided=True) == mean_error(form, shape, two_sided=False)  # nothing is known of them


@pytest.mark.parametrize("shape", SHAPES)
def test_pivoted_rows_count_with_what_is_predicted_from_them_whichever_factor_is_first(shape: tuple[int, int]) -> None:
    one, two = (mean_error("pivoted", shape, coupled=True, order="down_first", two_sided=both) for both in (False, True))
    assert two < 0.6 * one


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(16, 32), (24, 24)])
def test_what_the_refit_takes_back_need_not_be_avoided(shape: tuple[int, int], form: str) -> None:
    """`up` first, in a metric without what lies in its own range."""
    on, off = (mean_error(form, shape, 20, coupled=True, order="up_first", deflate=deflate) for deflate in (True, False))
    assert on < 0.98 * off


def test_a_dense_layer_is_rounded_on_both_sides() -> None:
    lost = {True: 0.0, False: 0.0}
    for seed in range(6):
        p, loud = problem(24, 32, seed), torch.randn(24, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)
        for both in lost:
            lost[both] += run(p, None, "", crude(3), JointConfig(two_sided=both), sensitivity=loud @ loud.T).error
    assert lost[True] < 0.8 * lost[False]
