# SPDX-License-Identifier: Apache-2.0
"""`stack_layer` as a whole: mean outputs and biases, dtypes, repeated runs, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from layer_problems import F64, FORMS, PLAIN, Problem, crude, exact, moments_of, problem, product, run, squared

from lord_quant.config import JointConfig
from lord_quant.errors import NumericsError, RankError
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.solver import Solver
from lord_quant.stack import Stacked, anchored_target, stack_layer


def mean_output(result: Stacked, p: Problem) -> torch.Tensor:
    output = p.y.mean(0) @ product(result).double().T
    return output if result.bias is None else output + result.bias.double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solve", [None, exact, crude()], ids=["float", "exact", "crude"])
@pytest.mark.parametrize("rank", [5, None])
@pytest.mark.parametrize("biased", [True, False])
def test_the_mean_output_is_that_of_the_dense_model(
    biased: bool, rank: int | None, solve: Solver | None, form: str
) -> None:
    p = problem(9, 12)
    result = run(p, rank, form, solve, JointConfig(), bias=p.bias if biased else None)
    wanted = p.x.mean(0) @ p.weight.T + (p.bias if biased else 0)
    if biased or rank is not None:
        torch.testing.assert_close(mean_output(result, p), wanted, rtol=0, atol=1e-10)
        assert result.factors is None or result.factors.bias is result.bias
    else:
        assert result.bias is None  # a layer that stays dense is never given one


@pytest.mark.parametrize("form", FORMS)
def test_without_mean_correction_no_bias_is_added_and_moments_are_about_zero(form: str) -> None:
    p = problem(9, 12)
    seen = []

    def solve(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
        seen.append(hessian)
        return exact(weight, hessian)

    options = JointConfig(deflate=False, order="down_first", refine=0)
    for rank, mean_correction in ((5, False), (None, True), (None, False)):
        seen.clear()
        result = run(p, rank, form, solve, options, bias=None, mean_correction=mean_correction)
        assert result.bias is None and (result.factors is None or result.factors.bias is None)
        # In the column-pivoted form `down` takes some inputs only.
        taken = slice(None) if rank is None or form != "column_pivoted" else result.factors.others()
        assert torch.equal(seen[0], p.moments.raw().covariance[taken][:, taken])
        target = anchored_target(p.weight, p.moments.raw())
        expected = stack_layer(p.weight, torch.zeros(9, dtype=F64), p.moments, rank, form, solve, options)
        raw = squared(product(result) - target, p.moments.raw().covariance)
        assert raw <= squared(product(expected) - target, p.moments.raw().covariance) * (1 + 1e-6) + 1e-9
    for rank, bias in ((5, p.bias), (5, None), (None, p.bias)):
        seen.clear()
        result = run(p, rank, form, solve, options, bias=bias, mean_correction=bias is None)
        taken = slice(None) if rank is None or form != "column_pivoted" else result.factors.others()
        assert result.bias is not None and torch.equal(seen[0], p.moments.covariance[taken][:, taken])


def test_a_dense_layer_in_float_takes_its_target() -> None:
    p = problem(6, 8)
    result = run(p, None, "two_factor", None, JointConfig())
    assert result.factors is None and result.quantized == {} and result.spectrum is None
    torch.testing.assert_close(result.weight, anchored_target(p.weight, p.moments), rtol=0, atol=0)
    assert torch.equal(run(p, None, "two_factor", None, PLAIN).weight, p.weight)


@pytest.mark.parametrize("form", FORMS)
def test_arguments_are_left_alone_and_runs_repeat(form: str) -> None:
    p = problem(16, 24)
    before = [tensor.clone() for tensor in (*p[:2], *p.moments[:4])]
    one, other = (run(p, 8, form, crude(), JointConfig(), seed=3) for _ in range(2))
    assert all(torch.equal(old, new) for old, new in zip(before, (*p[:2], *p.moments[:4]), strict=True))
    assert torch.equal(product(one), product(other)) and one.error == other.error


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_weights_are_computed_in_the_dtype_of_the_moments(form: str) -> None:
    p = problem(16, 24)
    moments = moments_of(p.x, p.y, torch.float32)
    result = stack_layer(p.weight.bfloat16(), p.bias.bfloat16(), moments, 8, form, crude(), JointConfig())
    assert {tensor.dtype for tensor in (product(result), result.bias)} == {torch.float32}
    close = run(p._replace(weight=p.weight.bfloat16().double()), 8, form, crude(), JointConfig())
    assert result.error == pytest.approx(close.error, rel=0.2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("where", ["weight", "covariance", "cross"])
def test_what_is_not_finite_is_refused(where: str, rank: int | None, bad: float) -> None:
    p = problem(8, 8)
    tensor = p.weight if where == "weight" else getattr(p.moments, where)
    tensor[1, 2] = bad
    with pytest.raises(NumericsError, match="NaN or inf"):
        run(p, rank, "two_factor", crude(), JointConfig())


@pytest.mark.parametrize(("form", "rank"), [("two_factor", 0), ("two_factor", 9), ("pivoted", 8), ("pivoted", 9)])
def test_illegal_ranks_are_refused(form: str, rank: int) -> None:
    with pytest.raises(RankError, match=f"rank {rank} "):
        run(problem(8, 8), rank, form, exact, JointConfig())
