# SPDX-License-Identifier: Apache-2.0
"""The algebra of the joint stack against explicit samples and least squares in float64, one idea at a time."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_quant import stack
from lord_quant.config import GptqConfig, JointConfig
from lord_quant.decompose import output_spectrum, two_factor
from lord_quant.errors import NumericsError, RankError
from lord_quant.moments import PairedMoments
from lord_quant.refine import Quantized
from lord_quant.stack import Solver, Stacked, anchored_target, deflated, refit_up, stack_layer


F64 = torch.float64
PLAIN = JointConfig(anchor=False, rotate=False, refit=False, order="down_first", deflate=False, refine=0)
FORMS = ["two_factor", "pivoted"]
ORDERS = ["down_first", "up_first", "auto"]
SHAPES = [(24, 10), (10, 24), (16, 16)]


class Problem(NamedTuple):
    """A layer and the inputs it sees in the dense model (x) and in the compressed one (y)."""

    weight: torch.Tensor
    bias: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    moments: PairedMoments

    def lost(self, weight: torch.Tensor) -> float:
        """Mean squared error of a weight's outputs from y, means apart."""
        x, y = self.x - self.x.mean(0), self.y - self.y.mean(0)
        return float((x @ self.weight.T - y @ weight.double().T).square().sum() / len(x))


def moments_of(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype = F64) -> PairedMoments:
    left, right = x - x.mean(0), y - y.mean(0)
    tensors = x.mean(0), y.mean(0), right.T @ right / len(y), left.T @ right / len(x)
    return PairedMoments(*(tensor.to(dtype) for tensor in tensors), num_tokens=len(x))


def problem(m: int, n: int, seed: int = 0, tokens: int | None = None, drift: float = 0.3) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    mix = draw(n, n) / n**0.5 * torch.logspace(0.5, -0.5, n, dtype=F64)
    x = draw(tokens or 12 * n, n) @ mix + draw(n)
    y = x @ (torch.eye(n, dtype=F64) + drift * draw(n, n) / n**0.5) + drift * draw(len(x), n) @ mix + drift * draw(n)
    return Problem(draw(m, n), draw(m), x, y, moments_of(x, y))


def squared(difference: torch.Tensor, covariance: torch.Tensor) -> float:
    """‖D‖²_H."""
    return float(((difference @ covariance) * difference).sum())


def exact(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
    """A solver that loses nothing: its codes are the weight."""
    scales = weight.new_ones(len(weight), 1)
    return Quantized(weight.clone(), scales, 0 * scales, torch.zeros(weight.shape[1], dtype=torch.int32), 8)


def crude(bits: int = 3, group: int = 8) -> Solver:
    """Round to nearest between each group's least and largest weight; blind to the metric."""

    def solve(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
        g_idx = torch.arange(weight.shape[1], dtype=torch.int32) // group
        parts = weight.split(group, dim=1)
        low = torch.stack([part.amin(dim=1).clamp_max(0) for part in parts], dim=1)
        high = torch.stack([part.amax(dim=1).clamp_min(0) for part in parts], dim=1)
        scales = ((high - low) / (2**bits - 1)).clamp_min(1e-6)
        zeros = (-low / scales).round()
        groups = g_idx.long()
        codes = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, 2**bits - 1)
        return Quantized(codes, scales, zeros, g_idx, bits)

    return solve


def run(p: Problem, rank: int | None, form: str, solve: Solver | None, options: JointConfig, **rest: Any) -> Stacked:
    bias = rest.pop("bias", p.bias)
    return stack_layer(p.weight, bias, p.moments, rank, form, solve, options, **rest)


def product(stacked: Stacked) -> torch.Tensor:
    if stacked.factors is None:
        assert stacked.weight is not None
        return stacked.weight
    return stacked.factors.product()


# 1. Anchor

dimensions = st.integers(1, 10)
seeds = st.integers(0, 10**6)


@settings(max_examples=25, deadline=None)
@given(dimensions, dimensions, seeds)
def test_the_anchored_target_is_least_squares(m: int, n: int, seed: int) -> None:
    p = problem(m, n, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "ANCHOR_DAMPING", 1e-13)
        target = anchored_target(p.weight, p.moments)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "ANCHOR_DAMPING", 1e-13)
        target = anchored_target(p.weight, p.moments)
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
    generator = torch.Generator().manual_seed(seed)
    for part in ("down", "up"):
        for step in (1e-3, 1e-1):
            old = getattr(result.factors, part)
            noise = step * old.abs().max() * torch.randn(old.shape, generator=generator, dtype=F64)
            moved = result.factors._replace(**{part: old + noise}).product()
            assert squared(moved - target, covariance) >= best - 1e-9 * whole


@pytest.mark.parametrize("options", [JointConfig(), PLAIN], ids=["all ideas", "none"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_both_forms_stand_for_the_same_weight_in_float(m: int, n: int, options: JointConfig) -> None:
    p = problem(m, n)
    for rank in (1, 4, min(m - 1, n)):
        two, one = (run(p, rank, form, None, options) for form in FORMS)
        assert one.factors is not None and two.factors is not None
        torch.testing.assert_close(product(one), product(two), rtol=0, atol=1e-9 * float(product(two).abs().max()))
        torch.testing.assert_close(one.bias, two.bias, rtol=0, atol=1e-9)
        assert one.factors.up.numel() + one.factors.down.numel() == rank * (m + n - rank)
        assert two.largest_coefficient is None and one.largest_coefficient is not None
        assert one.largest_coefficient == float(one.factors.up.abs().max()) <= 1.05 + 1e-9
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
    fitted = refit_up(p.weight, covariance, down, up, damping=1e-13)
    best = squared(fitted @ down - p.weight, covariance)
    gradient = (fitted @ down - p.weight) @ covariance @ down.T
    assert gradient.abs().max() <= 1e-6 * float((p.weight @ covariance @ down.T).abs().max())
    y = (p.y - p.y.mean(0)) @ down.T
    solved = torch.linalg.lstsq(y, (p.y - p.y.mean(0)) @ p.weight.T).solution.T
    assert best == pytest.approx(squared(solved @ down - p.weight, covariance), abs=1e-7 * whole)
    for step in (1e-3, 1e-1):
        noise = step * torch.randn(m, rank, generator=generator, dtype=F64)
        assert squared((fitted + noise) @ down - p.weight, covariance) >= best - 1e-9 * whole
    usual = squared(refit_up(p.weight, covariance, down, up) @ down - p.weight, covariance)
    assert best - 1e-9 * whole <= usual <= squared(up @ down - p.weight, covariance) * (1 + 1e-9)


def test_a_factor_that_is_its_optimum_already_is_left_alone() -> None:
    p = problem(9, 7)
    factors = two_factor(p.weight, None, output_spectrum(p.weight, p.moments.covariance), 4, None)
    again = refit_up(p.weight, p.moments.covariance, factors.down, factors.up)
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
    for rank in (1, 5, min(m - 1, n)):
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
@pytest.mark.parametrize("shape", [(32, 16), (16, 32), (24, 24)])
def test_refitting_lowers_the_error(shape: tuple[int, int], form: str, order: str) -> None:
    assert mean_error(form, shape, order=order) < 0.9 * mean_error(form, shape, order=order, refit=False)


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (24, 24)])
def test_the_automatic_order_is_not_the_worse_one(shape: tuple[int, int]) -> None:
    auto, down, up = (mean_error("two_factor", shape, order=order) for order in ("auto", "down_first", "up_first"))
    assert auto in (down, up) and auto < 1.02 * min(down, up)


@pytest.mark.parametrize("shape", [(32, 16), (16, 32), (24, 24)])
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


# Pivoted rows


@pytest.mark.parametrize("shape", [(32, 16), (16, 32), (24, 24)])
def test_feedback_between_pivoted_rows_lowers_the_error(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    fed = mean_error("pivoted", shape, seeds=20)
    monkeypatch.setattr(stack, "FEEDBACK_BLOCKS", 1)
    assert fed < 0.95 * mean_error("pivoted", shape, seeds=20)


def test_feedback_is_the_optimum_for_the_rows_that_are_fixed() -> None:
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
    found = stack._quantize_rows(rows, metric, covariance, first_only).weight()
    fixed = int((metric.diagonal() * ((rows @ covariance) * rows).sum(dim=1)).argmax())
    assert torch.equal(calls[0], rows[[fixed]]) and not torch.equal(found[fixed], rows[fixed])
    root = torch.linalg.cholesky(metric).T  # ‖root (B̂ − B)‖² over the rows that are free
    free = [row for row in range(5) if row != fixed]
    change = torch.linalg.lstsq(root[:, free], -root[:, [fixed]] @ (found - rows)[[fixed]]).solution
    torch.testing.assert_close(found[free], rows[free] + change, rtol=0, atol=1e-9)


# 6. Bias


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
        assert torch.equal(seen[0], p.moments.raw().covariance)
        target = anchored_target(p.weight, p.moments.raw())
        expected = stack_layer(p.weight, torch.zeros(9, dtype=F64), p.moments, rank, form, solve, options)
        raw = squared(product(result) - target, p.moments.raw().covariance)
        assert raw <= squared(product(expected) - target, p.moments.raw().covariance) * (1 + 1e-6) + 1e-9
    for rank, bias in ((5, p.bias), (5, None), (None, p.bias)):
        seen.clear()
        result = run(p, rank, form, solve, options, bias=bias, mean_correction=bias is None)
        assert result.bias is not None and torch.equal(seen[0], p.moments.covariance)


def test_a_dense_layer_in_float_takes_its_target() -> None:
    p = problem(6, 8)
    result = run(p, None, "two_factor", None, JointConfig())
    assert result.factors is None and result.quantized == {} and result.spectrum is None
    torch.testing.assert_close(result.weight, anchored_target(p.weight, p.moments), rtol=0, atol=0)
    assert torch.equal(run(p, None, "two_factor", None, PLAIN).weight, p.weight)


# Everything together


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


# Hard inputs, with the real solver


def hard(kind: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs in both streams, float32."""
    p = problem(1, n, tokens=4 * n)
    x, y = p.x.clone(), p.y.clone()
    for rows in (x, y):
        if kind == "duplicated channels":
            rows[:, 1::2] = rows[:, ::2]
        elif kind == "dead channels":
            rows[:, ::3] = 0
        elif kind == "a loud channel":
            rows[:, 5] *= 1e4
        elif kind == "no variance":
            rows[:] = rows[0].round()
        elif kind == "silence":
            rows[:] = 0
    if kind == "few tokens":
        x, y = x[: n // 4], y[: n // 4]
    if kind == "dead only in the compressed stream":
        y[:, ::3] = 0
    return x.float(), y.float()


HARD = [
    "few tokens",
    "duplicated channels",
    "dead channels",
    "a loud channel",
    "no variance",
    "silence",
    "dead only in the compressed stream",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n"), [(96, 64), (64, 96)])
@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs_are_survived(kind: str, m: int, n: int, form: str) -> None:
    from lord_quant.backends.gptq import make_solver

    x, y = hard(kind, n)
    moments = moments_of(x, y, torch.float32)
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    solve = make_solver(GptqConfig(bits=4), 32, len(x))
    full = min(m - 32, n) if form == "pivoted" else min(m, n)
    for rank in (32, full):
        result = stack_layer(weight, None, moments, rank, form, solve, JointConfig())
        assert result.factors is not None and result.bias is not None
        factors = result.factors
        assert factors.down.shape == (rank, n) and factors.up.shape == (m - rank * (form == "pivoted"), rank)
        assert all(torch.isfinite(tensor).all() for tensor in (product(result), result.bias))
        assert 0 <= result.error <= 1
        assert result.error < result.spectrum.discarded_share(rank) + 0.05
        if kind in ("no variance", "silence"):
            assert result.error == 0
        for item in result.quantized.values():
            assert item.codes.min() >= 0 and item.codes.max() <= 15 and torch.equal(item.codes, item.codes.round())
            assert torch.equal(item.scales, item.scales.half().float()) and (item.scales > 0).all()
        expected = x.mean(0) @ weight.T
        found = y.mean(0) @ product(result).T + result.bias
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()) + 1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"bits": 4, "desc_act": True}, 0.01),
        ({"bits": 4, "sym": True, "mse": 0.0}, 0.012),
        ({"bits": 4, "act_group_aware": False}, 0.01),
        ({"bits": 8}, 5e-5),
        ({"bits": 3}, 0.04),
        ({"bits": 2}, 0.15),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_every_setting_of_the_solver_serves_both_forms(settings: dict[str, Any], bound: float, form: str) -> None:
    """Rows of a pivoted `down` are solved in parts; they must agree on groups and come back to their places."""
    from lord_quant.backends.gptq import make_solver

    p = problem(96, 64)
    moments = moments_of(p.x, p.y, torch.float32)
    solve = make_solver(GptqConfig(**settings), 32, len(p.x))
    result = stack_layer(p.weight.float(), p.bias.float(), moments, 32, form, solve, JointConfig())
    assert result.spectrum is not None
    assert 0 < result.error - result.spectrum.discarded_share(32) < bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("loudness", "size"), [(1e-6, 1.0), (1e12, 1.0), (1e4, 1e-3)])
def test_units_of_weights_and_activations_do_not_matter(loudness: float, size: float, form: str) -> None:
    from lord_quant.backends.gptq import make_solver

    p = problem(64, 64)
    solve, errors = make_solver(GptqConfig(bits=4), 32, len(p.x)), []
    for units, factor in ((1.0, 1.0), (loudness, size)):
        moments = moments_of(p.x * units, p.y * units, torch.float32)
        result = stack_layer((p.weight * factor).float(), None, moments, 32, form, solve, JointConfig())
        errors.append(result.error)
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mean_correction", [True, False])
def test_one_token_is_reproduced(mean_correction: bool, form: str) -> None:
    from lord_quant.backends.gptq import make_solver

    p = problem(96, 64, tokens=1)
    moments = moments_of(p.x, p.y, torch.float32)
    solve = make_solver(GptqConfig(bits=4), 32, 1)
    result = stack_layer(p.weight.float(), None, moments, 32, form, solve, JointConfig(), mean_correction=mean_correction)
    wanted = p.x @ p.weight.T
    found = p.y @ product(result).double().T + (0 if result.bias is None else result.bias.double())
    # Without a bias the one direction has to pass through damping and rounding.
    atol = (1e-4 if mean_correction else 0.05) * float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("form", FORMS)
def test_float64_statistics_with_the_real_solver(form: str) -> None:
    from lord_quant.backends.gptq import make_solver

    p = problem(96, 64)
    result = run(p, 32, form, make_solver(GptqConfig(bits=4), 32, len(p.x)), JointConfig())
    assert result.error < result.spectrum.discarded_share(32) + 0.05
