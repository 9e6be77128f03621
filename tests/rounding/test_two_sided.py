# SPDX-License-Identifier: Apache-2.0
"""Rounding in a metric on both sides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import F64, crude, exact, layer_of, problem

from lord_quant.config import GptqConfig
from lord_quant.errors import NumericsError
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.solver import Feedback, Gptq
from lord_quant.rounding.stack_forms import Polished
from lord_quant.rounding.two_sided import round_each, round_rows


seeds = st.integers(0, 2**16)


def coupled(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A metric of outputs of which a few directions are loud."""
    generator = torch.Generator().manual_seed(seed)
    loud = torch.randn(size, max(1, size // 4), generator=generator, dtype=dtype)
    return loud @ loud.T + 0.2 * torch.eye(size, dtype=dtype)


def cost(error: torch.Tensor, outputs: torch.Tensor, hessian: torch.Tensor) -> float:
    error = error.double()
    return float(((outputs.double() @ error @ hessian.double()) * error).sum())


def test_rows_take_the_optimum_for_those_that_are_fixed() -> None:
    """With only the first row rounded, the others take the place that least squares gives them."""
    generator = torch.Generator().manual_seed(0)
    rows, predictor = (torch.randn(5, n, generator=generator, dtype=F64) for n in (12, 7))
    metric = torch.eye(5, dtype=F64) + predictor @ predictor.T
    covariance = problem(3, 12).moments.covariance
    calls: list[torch.Tensor] = []

    def first_only(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
        assert torch.equal(hessian, covariance)
        calls.append(weight.clone())
        return (
            crude(2)(weight, hessian) if len(calls) == 1 else exact(weight, hessian)._replace(g_idx=GROUPS, **wide(weight))
        )

    GROUPS = crude(2)(rows, covariance).g_idx
    wide = lambda weight: {"scales": weight.new_ones(1, 2), "zeros": weight.new_zeros(1, 2)}  # noqa: E731
    found = round_rows(first_only, rows, covariance, metric, steps=5).weight()
    fixed = int((metric.diagonal() * (rows.square() @ covariance.diagonal())).argmax())
    assert torch.equal(calls[0], rows[[fixed]]) and not torch.equal(found[fixed], rows[fixed])
    root = torch.linalg.cholesky(metric).T  # ‖root (B̂ − B)‖² over the rows that are free
    free = [row for row in range(5) if row != fixed]
    change = torch.linalg.lstsq(root[:, free], -root[:, [fixed]] @ (found - rows)[[fixed]]).solution
    torch.testing.assert_close(found[free], rows[free] + change, rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(1, 9), seeds)
def test_the_cost_is_what_the_steps_say(rows: int, steps: int, seed: int) -> None:
    """tr G D H Dᵀ is the sum, over steps, of what each step's own rows missed in the metric that was still theirs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 8, generator=generator, dtype=F64)
    outputs, hessian = coupled(rows, seed, F64), torch.eye(8, dtype=F64)
    missed: list[torch.Tensor] = []

    def solve(part: torch.Tensor, metric: torch.Tensor) -> Quantized:
        done = crude(2)(part, metric)
        missed.append(done.weight() - part)
        return done

    error = round_rows(solve, weight, hessian, outputs, steps).weight() - weight
    order = torch.argsort(outputs.diagonal() * weight.square().sum(dim=1), descending=True, stable=True)
    inverse = torch.linalg.inv(outputs[order][:, order])
    first, expected = 0, 0.0
    for part in missed:  # of block LDLᵀ from the last row: the Schur complement of the rows behind
        last = first + len(part)
        expected += cost(part, torch.linalg.inv(inverse[:last, :last])[first:, first:], hessian)
        first = last
    assert len(missed) == min(steps, rows)
    assert cost(error, outputs, hessian) == pytest.approx(expected, rel=1e-4)


def test_outputs_that_are_not_coupled_are_quantized_as_if_alone() -> None:
    weight, hessian = layer_of(24, 64)
    outputs = torch.linspace(1, 9, 24).diag()
    solve = Gptq(GptqConfig(bits=3, damp_percent=1e-5), 32, 1)
    alone, apart = solve(weight, hessian), round_rows(solve, weight, hessian, outputs)
    assert torch.equal(apart.codes, alone.codes) and torch.equal(apart.scales, alone.scales)
    assert apart.loss == pytest.approx(cost(apart.weight() - weight, outputs, hessian), rel=1e-3)
    assert torch.equal(round_rows(solve, weight, hessian, None).codes, alone.codes)
    polished = Polished(solve, 2)  # scales of all rows go the same share of their way there
    one, two = polished(weight, hessian).weight(), round_rows(polished, weight, hessian, outputs).weight()
    assert cost(two - weight, outputs, hessian) == pytest.approx(cost(one - weight, outputs, hessian), rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_coupled_outputs_lose_less(bits: int) -> None:
    """In any number of steps: rows of a step know of each other."""
    alone, lost = 0.0, dict.fromkeys((1, 4, 48), 0.0)
    for seed in range(4):
        weight, hessian = layer_of(48, 64, seed)
        outputs, solve = coupled(48, seed), Polished(Gptq(GptqConfig(bits=bits), 32, 1), 1)
        alone += cost(solve(weight, hessian).weight() - weight, outputs, hessian)
        for steps in lost:
            error = round_rows(solve, weight, hessian, outputs, steps).weight() - weight
            lost[steps] += cost(error, outputs, hessian)
    assert max(lost.values()) < 0.4 * alone
    assert lost[1] < 1.3 * lost[48]


@pytest.mark.parametrize("steps", [1, 3, 48])
def test_the_loss_that_is_told_is_the_cost(steps: int) -> None:
    """tr G D H Dᵀ over the tokens, whichever rows move for which."""
    weight, hessian = layer_of(48, 64)
    outputs = coupled(48)
    done = round_rows(Gptq(GptqConfig(bits=3, damp_percent=1e-5), 32, 10), weight, hessian, outputs, steps)
    assert done.loss == pytest.approx(cost(done.weight() - weight, outputs, hessian) / 10, rel=1e-3)


def test_a_solver_that_knows_rows_only_gains_by_steps() -> None:
    lost = dict.fromkeys((1, 4, 16), 0.0)
    for seed in range(4):
        weight, hessian = layer_of(48, 64, seed)
        outputs = coupled(48, seed)
        for steps in lost:
            lost[steps] += cost(round_rows(crude(3), weight, hessian, outputs, steps).weight() - weight, outputs, hessian)
    assert lost[16] < lost[4] < 0.9 * lost[1]


def test_a_hessian_is_factored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer_of(32, 64)
    seen: list[int] = []
    of = Gptq.of

    def counted(self: Gptq, metric: torch.Tensor, like: object = None) -> object:
        seen.append(len(metric))
        return of(self, metric, like)

    monkeypatch.setattr(Gptq, "of", counted)
    round_rows(Polished(Gptq(GptqConfig(), 32, 1), 1), weight, hessian, coupled(32))
    assert seen == [64]


def test_several_bit_widths_share_factors_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is what it is alone; other groups mean another order of columns, and one more factor."""
    weight, hessian = layer_of(48, 64)
    outputs = coupled(48)
    solves = [
        Polished(Gptq(GptqConfig(bits=bits), size, 1), 1) for bits, size in ((2, 32), (3, 32), (4, 32), (3, 64), (2, 64))
    ]
    alone = [round_rows(solve, weight, hessian, outputs) for solve in solves]
    factored: list[int] = []
    of = Feedback.of
    counted = staticmethod(lambda metric, *rest: (factored.append(len(metric)), of(metric, *rest))[1])
    monkeypatch.setattr(Feedback, "of", counted)
    together = list(round_each(solves, weight, hessian, outputs))
    assert factored == [48, 64, 64]
    for one, same in zip(alone, together, strict=True):
        assert torch.equal(one.weight(), same.weight()) and (one.loss, one.bits) == (same.loss, same.bits)
    plain = list(round_each(solves[:2], weight, hessian, None))
    assert all(torch.equal(done.codes, solve(weight, hessian).codes) for done, solve in zip(plain, solves[:2], strict=True))


def test_codes_are_those_of_the_layer_in_its_own_order() -> None:
    """Rows are done costliest first and put back: permuting outputs permutes the result."""
    weight, hessian = layer_of(16, 64)
    outputs, solve = coupled(16), Gptq(GptqConfig(bits=3), 32, 1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    found = round_rows(solve, weight, hessian, outputs)
    moved = round_rows(solve, weight[order], hessian, outputs[order][:, order])
    torch.testing.assert_close(moved.weight(), found.weight()[order], rtol=0, atol=1e-4)
    assert found.codes.shape == (16, 64) and found.scales.shape == found.zeros.shape == (16, 2) and found.seconds > 0


def test_a_metric_without_a_factor_is_damped_or_refused() -> None:
    weight, hessian = layer_of(8, 64)
    solve = Gptq(GptqConfig(), 32, 1)
    one = torch.ones(8, 8)  # of rank 1
    assert torch.isfinite(round_rows(solve, weight, hessian, one).weight()).all()
    with pytest.raises(NumericsError, match="stayed indefinite"):
        round_rows(solve, weight, hessian, torch.eye(8) - 4 * (one - torch.eye(8)))
