# SPDX-License-Identifier: Apache-2.0
"""The joint stack in the metric of the loss: truncation, gauge and refits are optimal in G ⊗ H."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import F64, FORMS, PLAIN, Problem, crude, exact, full_rank, perturbed, problem, product, run

from lord_quant.config import JointConfig
from lord_quant.errors import NumericsError
from lord_quant.rounding.refine import Quantized
from lord_quant.stack import anchored_target
from lord_quant.truncation import SENSITIVITY_DAMPING, unit_metric


SHAPES = [(24, 10), (10, 24), (16, 16)]
seeds = st.integers(0, 10**6)


def sensitivity(m: int, seed: int = 0, tokens: int = 100) -> torch.Tensor:
    """That of outputs which matter very differently, and together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(m, m, generator=generator, dtype=F64) * torch.logspace(1, -1, m, dtype=F64)
    rows = torch.randn(tokens, m, generator=generator, dtype=F64) @ mix
    return 1e-7 * rows.T @ rows / tokens


def cost(difference: torch.Tensor, g: torch.Tensor, p: Problem) -> float:
    """tr G D H Dᵀ."""
    return float(((g @ difference @ p.moments.covariance) * difference).sum())


def metric(g: torch.Tensor) -> torch.Tensor:
    found = unit_metric(g)
    assert found is not None
    return found


def test_the_metric_has_unit_mean_and_is_damped() -> None:
    g = sensitivity(12, tokens=3)  # singular
    found = metric(g)
    assert float(found.diagonal().mean()) == pytest.approx(1, rel=1e-12)
    assert torch.linalg.eigvalsh(found)[0] == pytest.approx(SENSITIVITY_DAMPING / (1 + SENSITIVITY_DAMPING), rel=1e-9)
    torch.testing.assert_close(metric(1e9 * g), found, rtol=1e-12, atol=1e-12)
    assert unit_metric(torch.zeros(3, 3)) is None


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10), st.integers(2, 10), seeds, st.sampled_from(FORMS), st.data())
def test_nothing_of_the_same_rank_costs_less(m: int, n: int, seed: int, form: str, data: st.DataObject) -> None:
    p, g = problem(m, n, seed), sensitivity(m, seed)
    rank = data.draw(st.integers(1, full_rank(m, n, form)))
    result = run(p, rank, form, None, JointConfig(), sensitivity=g)
    target, g = anchored_target(p.weight, p.moments), metric(g)
    assert result.factors is not None and result.spectrum is not None
    best, whole = cost(product(result) - target, g, p), cost(target, g, p)
    assert best == pytest.approx(float(result.spectrum.eigenvalues[rank:].sum()), abs=1e-8 * whole)
    assert result.error == pytest.approx(best / whole, abs=1e-8)
    for moved in perturbed(result.factors, seed):
        assert cost(moved - target, g, p) >= best - 1e-8 * whole
    blind = product(run(p, rank, form, None, JointConfig()))
    assert best <= cost(blind - target, g, p) + 1e-8 * whole


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_all_forms_stand_for_the_same_weight(m: int, n: int) -> None:
    p, g = problem(m, n), sensitivity(m)
    for rank, form in itertools.product((1, 4, min(m, n) - 1), ("pivoted", "column_pivoted")):
        two, one = (run(p, rank, each, None, JointConfig(), sensitivity=g) for each in ("two_factor", form))
        torch.testing.assert_close(product(one), product(two), rtol=0, atol=1e-8 * float(product(two).abs().max()))
        assert one.largest_coefficient is not None and one.largest_coefficient <= 1.05 + 1e-9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_outputs_that_count_alike_are_as_without(m: int, n: int, form: str) -> None:
    p = problem(m, n)
    plain = run(p, 5, form, None, JointConfig())
    same = run(p, 5, form, None, JointConfig(), sensitivity=1e-6 * torch.eye(m, dtype=F64))
    torch.testing.assert_close(product(same), product(plain), rtol=0, atol=1e-9 * float(product(plain).abs().max()))
    nothing = run(p, 5, form, crude(), JointConfig(), sensitivity=torch.zeros(m, m, dtype=F64))
    expected = run(p, 5, form, crude(), JointConfig())
    assert torch.equal(product(nothing), product(expected)) and nothing.error == expected.error


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_rows_of_up_are_even_in_units_of_what_they_cost(m: int, n: int) -> None:
    """Aᵀ diag(G) A is a multiple of I, before rounding; and the product stays."""
    p, g = problem(m, n), sensitivity(m)
    for options in (PLAIN, dataclasses.replace(PLAIN, rotate=True)):
        result = run(p, 6, "two_factor", exact, options, sensitivity=g)
        up = result.quantized[".up"].weight()
        gram = up.T @ (metric(g).diagonal()[:, None] * up)
        torch.testing.assert_close(gram / gram[0, 0], torch.eye(6, dtype=F64), rtol=0, atol=1e-9)
        expected = product(run(p, 6, "two_factor", None, options, sensitivity=g))
        torch.testing.assert_close(product(result), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["two_factor", "pivoted"])
def test_a_down_refitted_to_a_rounded_up_is_optimal_in_the_loss(form: str) -> None:
    """The gradient of tr G D H Dᵀ over `down`, Pᵀ G (P B − T) H, vanishes; without G in the refit it does not."""
    p, g = problem(20, 24), sensitivity(20)
    options = JointConfig(order="up_first", refine=0, anchor=False)

    def solve(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
        return (exact if weight.shape[1] == 24 else crude())(weight, hessian)  # rounds `up` alone

    steepness = {}
    for label, known in (("known", g), ("unknown", None)):
        factors = run(p, 4, form, solve, options, sensitivity=known).factors
        assert factors is not None
        spread = factors._replace(down=torch.eye(4, dtype=F64)).product()
        left = spread.T @ metric(g)
        gradient = left @ (spread @ factors.down - p.weight) @ p.moments.covariance
        steepness[label] = float(gradient.norm() / (left @ p.weight @ p.moments.covariance).norm())
    assert steepness["known"] < 1e-5 < 1e-2 < steepness["unknown"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_it_lowers_what_rounding_and_truncation_cost(m: int, n: int, form: str) -> None:
    total = {True: 0.0, False: 0.0}
    for seed in range(10):
        p, g = problem(m, n, seed), sensitivity(m, seed)
        for used in total:
            result = run(p, 8, form, crude(4), JointConfig(anchor=False), sensitivity=g if used else None, seed=seed)
            total[used] += cost(product(result) - p.weight, metric(g), p) / cost(p.weight, metric(g), p)
    assert total[True] < 0.9 * total[False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_sensitivity_is_refused(value: float) -> None:
    g = sensitivity(8)
    g[0, 0] = value
    with pytest.raises(NumericsError, match=r"output sensitivity .*--no-fisher"):
        run(problem(8, 8), 4, "two_factor", None, JointConfig(), sensitivity=g)


@pytest.mark.parametrize("tokens", [64, 4096])
def test_what_couples_outputs_counts_less_where_it_was_measured_on_few_tokens(tokens: int) -> None:
    """Entries off the diagonal shrink by N / (N + 32 d), d = (tr G)² / ‖G‖²; the diagonal stays."""
    g = sensitivity(12)
    plain, shrunk = unit_metric(g), unit_metric(g, tokens)
    assert plain is not None and shrunk is not None
    unit = g / g.diagonal().mean()
    share = tokens / (tokens + 32 * 12**2 / unit.square().sum())
    off = ~torch.eye(12, dtype=torch.bool)
    torch.testing.assert_close(shrunk[off], share * plain[off])
    torch.testing.assert_close(shrunk.diagonal(), plain.diagonal())
    assert torch.linalg.eigvalsh(shrunk)[0] > 0


def test_a_metric_of_few_tokens_is_nearer_the_truth_when_it_is_shrunk() -> None:
    """Of heavy-tailed gradients, as real ones are: a few tokens are loud."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=generator, dtype=F64) / 32**0.5
    size = torch.randn(20000, 1, generator=generator, dtype=F64).exp()
    rows = size * (torch.randn(20000, 32, generator=generator, dtype=F64) @ mix)
    truth, few = rows.T @ rows / 20000, rows[:128].T @ rows[:128] / 128
    wanted, raw, shrunk = metric(truth), metric(few), unit_metric(few, 128)
    assert shrunk is not None and (shrunk - wanted).norm() < 0.9 * (raw - wanted).norm()
