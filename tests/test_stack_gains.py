# SPDX-License-Identifier: Apache-2.0
"""What each idea of the joint stack brings: mean errors with a crude solver, with and without it."""

from __future__ import annotations

from typing import Any

import pytest
from layer_problems import FORMS, crude, problem, product, run

from lord_quant import stack
from lord_quant.config import JointConfig
from lord_quant.two_sided import round_rows


SHAPES = [(32, 16), (16, 32), (24, 24)]


def mean_error(form: str, shape: tuple[int, int], seeds: int = 10, bits: int = 3, **options: Any) -> float:
    """Average share of the output energy that rounding loses on top of truncation, with a crude solver."""
    total = 0.0
    for seed in range(seeds):
        result = run(problem(*shape, seed), 8, form, crude(bits), JointConfig(**({"refine": 0} | options)), seed=seed)
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
    monkeypatch.setattr(stack, "round_rows", lambda *arguments: round_rows(*arguments[:4], steps=1))
    assert fed < 0.95 * mean_error("pivoted", shape, seeds=20)
