# SPDX-License-Identifier: Apache-2.0
"""The algebra of the joint stack against explicit samples and least squares in float64, one idea at a time."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import (
    F64,
    FORMS,
    PLAIN,
    Problem,
    exact,
    full_rank,
    moments_of,
    perturbed,
    problem,
    product,
    run,
    squared,
)

from lord_quant import stack
from lord_quant.config import JointConfig
from lord_quant.decompose import output_spectrum, two_factor
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.stack_forms import deflated, refit_up
from lord_quant.stack import anchored_target


ORDERS = ["down_first", "up_first", "auto"]
SHAPES = [(24, 10), (10, 24), (16, 16)]


# 1. Anchor

dimensions = st.integers(1, 10)
seeds = st.integers(0, 10**6)


def undamped_target(p: Problem) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "ANCHOR_DAMPING", 1e-13)
        return anchored_target(p.weight, p.moments)


@settings(max_examples=25, deadline=None)
@given(dimensions, dimensions, seeds)
def test_the_anchored_target_is_least_squares(m: int, n: int, seed: int) -> None:
    p = problem(m, n, seed)
    target = undamped_target(p)
    formula = p.weight @ p.moments.cross @ torch.linalg.inv(p.moments.covariance)
    x, y = p.x - p.x.mean(0), p.y - p.y.mean(0)
    solved = torch.linalg.lstsq(y, x @ p.weight.T).solution.T
    size = float(solved.abs().max())
    torch.testing.assert_close(target, solved, rtol=0, atol=1e-7 * size)
    torch.testing.assert_close(formula, solved, rtol=0, atol=1e-7 * size)
    best = p.lost(target)
    generator = torch.Generator().manual_seed(seed)
    for step in (1e-3, 1e-1, 1.0):
        noise = step * torch.randn(m, n, generator=generator, dtype=F64)
        assert p.lost(target + noise) >= best * (1 - 1e-9)


@settings(max_examples=25, deadline=None)
@given(dimensions, dimensions, seeds, st.integers(1, 40))
def test_damping_only_pulls_towards_the_weight(m: int, n: int, seed: int, tokens: int) -> None:
    """Least squares with a penalty for leaving W is never worse than W, however few the tokens."""
    p = problem(m, n, seed, tokens=tokens)
    target = anchored_target(p.weight, p.moments)
    assert p.lost(target) <= p.lost(p.weight) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize(("tokens", "damping"), [(10_000, 0.01), (1_000, 0.12), (500, 0.48), (12, 1.0)])
def test_what_is_learnt_from_outputs_is_damped_where_tokens_are_few(
    tokens: int, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against ridge regression on the samples themselves."""
    monkeypatch.setattr(stack, "FEW_TOKENS", 4_000)
    p = problem(4, 6, tokens=tokens)
    outputs = p.x @ p.weight.T + 0.3 * p.y @ torch.ones(6, 4, dtype=F64)  # not the layer's own: a stream's
    x, y = outputs - outputs.mean(0), p.y - p.y.mean(0)
    moments = moments_of(outputs, p.y)._replace(of_outputs=True)
    penalty = (damping * moments.covariance.diagonal().mean() * len(y)).sqrt() * torch.eye(6, dtype=F64)
    aims = torch.cat((x - y @ p.weight.T, torch.zeros(6, 4, dtype=F64)))
    solved = p.weight + torch.linalg.lstsq(torch.cat((y, penalty)), aims).solution.T
    torch.testing.assert_close(anchored_target(p.weight, moments), solved, rtol=1e-9, atol=1e-9)


def test_equal_streams_need_no_anchor_and_unseen_directions_keep_the_weight() -> None:
    p = problem(5, 6)
    same = p.moments._replace(cross=p.moments.covariance, dense_mean=p.moments.mean)
    assert torch.equal(anchored_target(p.weight, same), p.weight)
    y = p.y.clone()
    y[:, [1, 4]] = 7.0  # channels that went dead
    target = anchored_target(p.weight, moments_of(p.x, y))
    torch.testing.assert_close(target[:, [1, 4]], p.weight[:, [1, 4]], rtol=0, atol=1e-12)
    nothing = moments_of(p.x[:1], p.y[:1])
    assert torch.equal(anchored_target(p.weight, nothing), p.weight)


@settings(max_examples=25, deadline=None)
@given(dimensions, dimensions, seeds)
def test_from_the_target_on_the_covariance_is_the_only_metric(m: int, n: int, seed: int) -> None:
    """E‖W x − Ŵ x′‖² = ‖Ŵ − T‖²_H + const, whatever Ŵ."""
    p = problem(m, n, seed)
    target = undamped_target(p)
    constant = p.lost(target)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        other = torch.randn(m, n, generator=generator, dtype=F64)
        expected = squared(other - target, p.moments.covariance) + constant
        assert p.lost(other) == pytest.approx(expected, rel=1e-8)


# 2. Truncate


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10), st.integers(2, 10), seeds, st.data())
def test_nothing_of_the_same_rank_is_nearer_to_the_target(m: int, n: int, seed: int, data: st.DataObject) -> None:
    p = problem(m, n, seed)
    rank = data.draw(st.integers(1, min(m, n)))
    result = run(p, rank, "two_factor", None, JointConfig())
    target, covariance = anchored_target(p.weight, p.moments), p.moments.covariance
    assert result.factors is not None and result.spectrum is not None
    best, whole = squared(product(result) - target, covariance), squared(target, covariance)
    assert best == pytest.approx(float(result.spectrum.eigenvalues[rank:].sum()), abs=1e-9 * whole)
    assert result.error == pytest.approx(best / whole, abs=1e-9)
    assert result.error == pytest.approx(result.spectrum.discarded_share(rank), abs=1e-9)
    for moved in perturbed(result.factors, seed):
        assert squared(moved - target, covariance) >= best - 1e-9 * whole


@pytest.mark.parametrize("options", [JointConfig(), PLAIN], ids=["all ideas", "none"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_all_forms_stand_for_the_same_weight_in_float(m: int, n: int, options: JointConfig) -> None:
    p = problem(m, n)
    for rank, form in itertools.product((1, 4, min(m, n) - 1), ("pivoted", "column_pivoted")):
        two, one = (run(p, rank, each, None, options) for each in ("two_factor", form))
        assert one.factors is not None and two.factors is not None
        torch.testing.assert_close(product(one), product(two), rtol=0, atol=1e-9 * float(product(two).abs().max()))
        torch.testing.assert_close(one.bias, two.bias, rtol=0, atol=1e-9)
        assert one.factors.up.numel() + one.factors.down.numel() == rank * (m + n - rank)
        assert two.largest_coefficient is None and one.largest_coefficient is not None
        kept_small = one.factors.up if form == "pivoted" else one.factors.down
        assert one.largest_coefficient == float(kept_small.abs().max()) <= 1.05 + 1e-9
        assert one.quantized == two.quantized == {}
        plain = output_spectrum(anchored_target(p.weight, p.moments) if options.anchor else p.weight, p.moments.covariance)
        torch.testing.assert_close(one.spectrum.eigenvalues, plain.eigenvalues, rtol=1e-9, atol=0)


# 3. Gauge


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_rotation_and_balance_leave_the_product_alone(m: int, n: int) -> None:
    p = problem(m, n)
    plain = product(run(p, 6, "two_factor", None, PLAIN))
    rotated = {}
    for seed in (0, 1):
        options = dataclasses.replace(PLAIN, rotate=True)
        result = run(p, 6, "two_factor", exact, options, seed=seed)
        torch.testing.assert_close(product(result), plain, rtol=0, atol=1e-10 * float(plain.abs().max()))
        rotated[seed] = {part: item.weight() for part, item in result.quantized.items()}
        assert rotated[seed][".down"].square().mean() == pytest.approx(float(rotated[seed][".up"].square().mean()))
        gram = rotated[seed][".up"].T @ rotated[seed][".up"]
        torch.testing.assert_close(gram / gram[0, 0], torch.eye(6, dtype=F64), rtol=0, atol=1e-10)
        z = rotated[seed][".down"] @ p.moments.covariance @ rotated[seed][".down"].T
        spread = z.diagonal().max() / z.diagonal().min()
        eigen = run(p, 6, "two_factor", exact, PLAIN).quantized[".down"].weight()
        loud = (eigen @ p.moments.covariance @ eigen.T).diagonal()
        assert spread < 0.7 * loud.max() / loud.min()
    assert not torch.allclose(rotated[0][".down"], rotated[1][".down"])
    again = run(p, 6, "two_factor", exact, dataclasses.replace(PLAIN, rotate=True), seed=1)
    assert torch.equal(again.quantized[".down"].weight(), rotated[1][".down"])


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1e3, 1e20])
def test_balance_survives_weights_of_any_size(size: float) -> None:
    p = problem(8, 8)
    result = run(p._replace(weight=p.weight * size), 4, "two_factor", exact, PLAIN)
    expected = product(run(p, 4, "two_factor", None, PLAIN)) * size
    torch.testing.assert_close(product(result), expected, rtol=1e-9, atol=0)


# 4. Order and refit


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 10), st.integers(2, 10), seeds, st.data())
def test_the_refitted_up_is_least_squares(m: int, n: int, seed: int, data: st.DataObject) -> None:
    p = problem(m, n, seed)
    rank = data.draw(st.integers(1, min(m, n)))
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((rank, n), (m, rank)))
    covariance = p.moments.covariance
    whole = squared(p.weight, covariance)
    fitted, seen = refit_up(p.weight, covariance, down, up, damping=1e-13)
    torch.testing.assert_close(seen, down @ covariance @ down.T)
    best = squared(fitted @ down - p.weight, covariance)
    gradient = (fitted @ down - p.weight) @ covariance @ down.T
    assert gradient.abs().max() <= 1e-6 * float((p.weight @ covariance @ down.T).abs().max())
    y = (p.y - p.y.mean(0)) @ down.T
    solved = torch.linalg.lstsq(y, (p.y - p.y.mean(0)) @ p.weight.T).solution.T
    assert best == pytest.approx(squared(solved @ down - p.weight, covariance), abs=1e-7 * whole)
    for step in (1e-3, 1e-1):
        noise = step * torch.randn(m, rank, generator=generator, dtype=F64)
        assert squared((fitted + noise) @ down - p.weight, covariance) >= best - 1e-9 * whole
    usual = squared(refit_up(p.weight, covariance, down, up)[0] @ down - p.weight, covariance)
    assert best - 1e-9 * whole <= usual <= squared(up @ down - p.weight, covariance) * (1 + 1e-9)


def test_a_factor_that_is_its_optimum_already_is_left_alone() -> None:
    p = problem(9, 7)
    factors = two_factor(p.weight, None, output_spectrum(p.weight, p.moments.covariance), 4, None)
    again, _ = refit_up(p.weight, p.moments.covariance, factors.down, factors.up)
    torch.testing.assert_close(again, factors.up, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [JointConfig(refine=0), PLAIN], ids=["all ideas", "none"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_solver_that_loses_nothing_gives_the_float_decomposition(
    m: int, n: int, form: str, order: str, options: JointConfig
) -> None:
    p = problem(m, n)
    options = dataclasses.replace(options, order=order)
    for rank in (1, 5, full_rank(m, n, form)):
        expected, found = run(p, rank, form, None, options), run(p, rank, form, exact, options)
        scale = float(product(expected).abs().max())
        torch.testing.assert_close(product(found), product(expected), rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(found.bias, expected.bias, rtol=0, atol=1e-4)
        assert found.error == pytest.approx(expected.error, abs=1e-7)
        assert found.quantized.keys() == {".down", ".up"}
        for part, item in found.quantized.items():
            assert torch.equal(item.weight(), getattr(found.factors, part.removeprefix(".")))


@pytest.mark.parametrize(("m", "n", "first"), [(24, 10, ".down"), (10, 24, ".up"), (16, 16, ".down")])
def test_the_factor_with_fewer_free_dimensions_goes_first(m: int, n: int, first: str) -> None:
    p = problem(m, n)
    seen: list[tuple[int, ...]] = []

    def solve(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
        assert torch.linalg.eigvalsh(hessian)[0] > -1e-9 * hessian.abs().max()
        seen.append(tuple(weight.shape))
        return exact(weight, hessian)

    for order, expected in (("auto", first), ("down_first", ".down"), ("up_first", ".up")):
        seen.clear()
        run(p, 4, "two_factor", solve, JointConfig(order=order, refine=0))
        assert seen == [{".down": (4, n), ".up": (m, 4)}[part] for part in sorted([".down", ".up"], key=expected.__ne__)]
    seen.clear()
    run(p, 4, "pivoted", solve, JointConfig(refine=0))
    assert seen[0] == (m - 4, 4) and seen[1:] == [(1, n)] * 4  # `down` row by row: four rows in at most eight blocks
    seen.clear()
    run(p, 4, "pivoted", solve, JointConfig(order="down_first", refine=0))
    assert seen == [(4, n), (m - 4, 4)]


# 5. Deflation


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10), seeds, st.data())
def test_the_deflated_metric_is_what_the_bottleneck_cannot_predict(n: int, seed: int, data: st.DataObject) -> None:
    p = problem(2, n, seed)
    rank = data.draw(st.integers(1, n))
    down = torch.randn(rank, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    covariance = p.moments.covariance
    found = deflated(covariance, down, 0.0)
    # Regression of the input on the bottleneck, with the slight damping that keeps it solvable.
    y = p.y - p.y.mean(0)
    z = y @ down.T
    damping = 1e-6 * (down @ covariance @ down.T).diagonal().mean()
    damped = torch.cat([z, (len(y) * damping).sqrt() * torch.eye(rank, dtype=F64)])
    coefficients = torch.linalg.lstsq(damped, torch.cat([y, torch.zeros(rank, n, dtype=F64)])).solution
    size = float(covariance.abs().max())
    torch.testing.assert_close(found, y.T @ (y - z @ coefficients) / len(y), rtol=0, atol=1e-9 * size)
    assert torch.equal(found, found.T)
    assert torch.linalg.eigvalsh(found)[0] > -1e-9 * size
    torch.testing.assert_close(deflated(covariance, down, 1.0), covariance, rtol=0, atol=1e-12 * size)
    torch.testing.assert_close(deflated(covariance, down, 0.3), 0.7 * found + 0.3 * covariance, rtol=0, atol=1e-9 * size)


def test_the_deflated_metric_is_the_schur_complement() -> None:
    """Of the joint covariance of input and bottleneck; nothing is left in the directions of the bottleneck."""
    p = problem(2, 8)
    down = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    covariance = p.moments.covariance
    seen = down @ covariance
    schur = covariance - seen.T @ torch.linalg.solve(seen @ down.T, seen)
    size = float(covariance.abs().max())
    torch.testing.assert_close(deflated(covariance, down, 0.0), schur, rtol=0, atol=1e-5 * size)
    assert (deflated(covariance, down, 0.0) @ down.T).abs().max() < 1e-5 * size
    left = p.y - p.y.mean(0) - (p.y - p.y.mean(0)) @ down.T @ torch.linalg.solve(seen @ down.T, seen)
    torch.testing.assert_close(left.T @ left / len(left), schur, rtol=0, atol=1e-9 * size)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_deflation_survives_singular_covariances(dtype: torch.dtype) -> None:
    p = problem(2, 12, tokens=5)
    down = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), dtype=F64)
    for covariance in (p.moments.covariance, torch.zeros(12, 12, dtype=F64)):
        found = deflated(covariance.to(dtype), down.to(dtype))
        assert torch.isfinite(found).all() and torch.equal(found, found.T)
        assert torch.linalg.eigvalsh(found.double())[0] >= -1e-4 * float(covariance.abs().max())
