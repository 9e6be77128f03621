# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors of one layer against numpy, hand calculation and the laws of least squares."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_quant.decompose import FORMS, Factors, column_pivoted, decompose, output_spectrum, pivoted, two_factor
from lord_quant.errors import NumericsError, RankError
from lord_quant.moments import MomentAccumulator, Moments


SHAPES = [(24, 10), (10, 24), (16, 16)]


class Problem(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor
    inputs: torch.Tensor
    moments: Moments


def moments_of(inputs: torch.Tensor) -> Moments:
    rows = inputs.double().numpy()
    covariance = np.atleast_2d(np.cov(rows, rowvar=False, bias=True))
    return Moments(torch.from_numpy(rows.mean(0)), torch.from_numpy(covariance), len(rows))


def problem(m: int, n: int, tokens: int = 400, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = draw(tokens, n) @ draw(n, n) * torch.logspace(-1, 1, n, dtype=torch.float64) + 3 * draw(n)
    return Problem(draw(m, n), draw(m), inputs, moments_of(inputs))


def outputs(factors: Factors, inputs: torch.Tensor) -> torch.Tensor:
    result = inputs @ factors.product().T
    return result if factors.bias is None else result + factors.bias


def as_double(factors: Factors) -> Factors:
    bias = None if factors.bias is None else factors.bias.double()
    return factors._replace(down=factors.down.double(), up=factors.up.double(), bias=bias)


def tensors(factors: Factors) -> list[torch.Tensor]:
    return [part for part in factors if isinstance(part, torch.Tensor)]


def squared_error(p: Problem, factors: Factors) -> float:
    return float(((p.inputs @ p.weight.T + p.bias - outputs(factors, p.inputs)) ** 2).sum())


def variance(p: Problem) -> float:
    dense = p.inputs @ p.weight.T
    return float(((dense - dense.mean(0)) ** 2).sum())


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_error_on_the_calibration_data_is_the_discarded_share(m: int, n: int) -> None:
    p = problem(m, n)
    for rank in range(1, min(m, n) + 1):
        factors, spectrum = decompose(p.weight, p.bias, p.moments, rank)
        measured = squared_error(p, factors) / variance(p)
        assert measured == pytest.approx(spectrum.discarded_share(rank), abs=1e-9)
        assert spectrum.remedies == ()


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_eigenvalues_are_those_of_the_output_covariance(m: int, n: int) -> None:
    p = problem(m, n)
    spectrum = output_spectrum(p.weight, p.moments.covariance)
    covariance = np.cov((p.inputs @ p.weight.T).numpy(), rowvar=False, bias=True)
    expected = np.linalg.eigvalsh(covariance)[::-1][: min(m, n)]
    np.testing.assert_allclose(spectrum.eigenvalues.numpy(), expected, atol=1e-11 * expected[0])
    assert spectrum.effective_rank == min(m, n)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_product_equals_that_of_whitened_svd(m: int, n: int) -> None:
    rng = np.random.default_rng(0)
    k, rank = min(m, n), 4
    inputs = rng.standard_normal((300, n)) @ (np.eye(n) + 0.3 * rng.standard_normal((n, n)))
    covariance = np.cov(inputs, rowvar=False, bias=True)
    whitener = np.linalg.cholesky(covariance)
    left, right = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    singular = np.r_[np.linspace(8, 5, rank), np.linspace(1, 0.5, k - rank)]  # a wide gap at the rank
    weight = (left * singular) @ right.T @ np.linalg.inv(whitener)

    u, s, vt = np.linalg.svd(weight @ whitener, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(whitener)
    moments = moments_of(torch.from_numpy(inputs))
    factors, _ = decompose(torch.from_numpy(weight), None, moments, rank)
    assert np.abs((factors.up @ factors.down).numpy() - expected).max() < 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_full_rank_is_the_layer_itself(m: int, n: int) -> None:
    p = problem(m, n)
    factors, spectrum = decompose(p.weight, p.bias, p.moments, min(m, n))
    torch.testing.assert_close(factors.up @ factors.down, p.weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(factors.bias, p.bias, rtol=0, atol=1e-10)
    assert spectrum.discarded_share(min(m, n)) == 0


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_corrected_bias_makes_the_mean_output_exact(m: int, n: int) -> None:
    p = problem(m, n)
    dense = (p.inputs @ p.weight.T).mean(0)
    corrected, _ = decompose(p.weight, p.bias, p.moments, 3)
    torch.testing.assert_close(outputs(corrected, p.inputs).mean(0), dense + p.bias, rtol=0, atol=1e-10)
    added, _ = decompose(p.weight, None, p.moments, 3)
    torch.testing.assert_close(outputs(added, p.inputs).mean(0), dense, rtol=0, atol=1e-10)
    kept, _ = decompose(p.weight, p.bias, p.moments, 3, mean_correction=False)
    assert torch.equal(kept.bias, p.bias)
    assert (outputs(kept, p.inputs).mean(0) - dense - p.bias).abs().max() > 1e-3
    assert decompose(p.weight, None, p.moments, 3, mean_correction=False)[0].bias is None


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 10**6), st.data())
def test_nothing_of_the_same_rank_is_better(m: int, n: int, seed: int, data: st.DataObject) -> None:
    p = problem(m, n, tokens=3 * n, seed=seed)
    rank = data.draw(st.integers(1, min(m, n)))
    factors, _ = decompose(p.weight, p.bias, p.moments, rank)
    best = squared_error(p, factors)
    slack = 1e-9 * variance(p)

    u, s, vt = torch.linalg.svd(p.weight, full_matrices=False)
    plain = Factors(s[:rank, None] * vt[:rank], u[:, :rank], None)
    missing = (p.inputs @ p.weight.T + p.bias - outputs(plain, p.inputs)).mean(0)
    assert best <= squared_error(p, plain._replace(bias=missing)) + slack

    generator = torch.Generator().manual_seed(seed)
    for part in ("down", "up", "bias"):
        old = getattr(factors, part)
        noise = 1e-2 * old.abs().max() * torch.randn(old.shape, generator=generator, dtype=old.dtype)
        assert best <= squared_error(p, factors._replace(**{part: old + noise})) + slack


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_up_has_orthonormal_columns_and_shapes_are_right(m: int, n: int) -> None:
    p = problem(m, n)
    for rank in (1, 4, min(m, n)):
        factors, _ = decompose(p.weight, p.bias, p.moments, rank)
        assert factors.down.shape == (rank, n) and factors.up.shape == (m, rank) and factors.bias.shape == (m,)
        assert factors.up.is_contiguous() and factors.down.is_contiguous()
        torch.testing.assert_close(factors.up.T @ factors.up, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_the_discarded_share_falls_from_one_to_zero(m: int, n: int, seed: int) -> None:
    p = problem(m, n, tokens=40, seed=seed)
    spectrum = output_spectrum(p.weight, p.moments.covariance)
    shares = [spectrum.discarded_share(rank) for rank in range(min(m, n) + 1)]
    assert shares[0] == pytest.approx(1) and shares[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(shares))


def singular_inputs(kind: str, n: int) -> torch.Tensor:
    inputs = problem(4, n, tokens=60, seed=5).inputs.clone()
    if kind == "dead channels":
        inputs[:, ::3] = 0
    elif kind == "duplicated channels":
        inputs[:, 1::2] = inputs[:, ::2]
    elif kind == "fewer tokens than features":
        inputs = inputs[:5]
    elif kind == "constant inputs":
        inputs[:] = inputs[0].round()  # sums of equal whole numbers are exact, so the covariance is exactly zero
    elif kind == "one token":
        inputs = inputs[:1]
    else:
        inputs[:] = 0
    return inputs


SINGULAR = {  # and how many directions the inputs vary in
    "dead channels": lambda n: n - len(range(0, n, 3)),
    "duplicated channels": lambda n: n // 2,
    "fewer tokens than features": lambda n: 4,
    "constant inputs": lambda n: 0,
    "one token": lambda n: 0,
    "zero": lambda n: 0,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize(("m", "n"), [(24, 10), (10, 24), (16, 16)])
def test_singular_covariances_are_no_special_case(m: int, n: int, kind: str, dtype: torch.dtype) -> None:
    inputs = singular_inputs(kind, n)
    p = Problem(*problem(m, n)[:2], inputs, moments_of(inputs))
    moments = Moments(p.moments.mean.to(dtype), p.moments.covariance.to(dtype), len(inputs))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    size = float((p.inputs @ p.weight.T).abs().max()) + 1
    for rank in (1, 4, min(m, n)):
        factors, spectrum = decompose(p.weight, p.bias, moments, rank)
        assert all(torch.isfinite(tensor).all() for tensor in tensors(factors))
        factors = as_double(factors)
        identity = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(factors.up.T @ factors.up, identity, rtol=0, atol=tolerance)
        expected = spectrum.discarded_share(rank) * variance(p)
        assert squared_error(p, factors) == pytest.approx(expected, abs=tolerance * size**2 * len(inputs) * m)
    assert spectrum.effective_rank == min(m, SINGULAR[kind](n))
    torch.testing.assert_close(factors.up @ factors.down, p.weight, rtol=0, atol=10 * tolerance)


def unit_inputs(p: Problem) -> Problem:
    """Inputs near 1, so that 64 squares of them, times 1e36, are still within float32."""
    inputs = p.inputs / p.inputs.std(0)
    inputs = inputs - inputs.mean(0) + 0.5
    return p._replace(inputs=inputs, moments=moments_of(inputs))


@pytest.mark.parametrize(("m", "n"), [(16, 8), (8, 16)])
@pytest.mark.parametrize("decades", [0, 3, 9, 18])
@pytest.mark.parametrize("opposed", [True, False], ids=["loud channels, small weights", "loud channels, equal weights"])
def test_badly_scaled_channels_in_float32(m: int, n: int, decades: int, opposed: bool) -> None:
    p = problem(m, n, tokens=64)
    p = unit_inputs(p)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    scale = torch.logspace(-decades, decades, n, dtype=torch.float64)[order]
    weight, inputs = (p.weight / scale if opposed else p.weight), p.inputs * scale
    accumulator = MomentAccumulator(n)
    accumulator.update(inputs)
    factors, spectrum = decompose(weight.float(), None, accumulator.result(), 4)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(factors))
    assert torch.isfinite(spectrum.eigenvalues).all() and spectrum.remedies == ()
    covariance = weight @ moments_of(inputs).covariance @ weight.T
    up = factors.up.double()
    measured = 1 - float(torch.trace(up.T @ covariance @ up) / covariance.trace())
    expected = output_spectrum(weight, moments_of(inputs).covariance).discarded_share(4)
    assert measured == pytest.approx(expected, abs=1e-5)
    assert spectrum.discarded_share(4) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("m", "n"), [(16, 8), (8, 16)])
@pytest.mark.parametrize("inputs_scale", [1e-18, 1.0, 1e18])
@pytest.mark.parametrize("weight_scale", [1e-18, 1.0, 1e18])
def test_units_of_weights_and_activations_do_not_matter_in_float32(
    m: int, n: int, weight_scale: float, inputs_scale: float
) -> None:
    p = unit_inputs(problem(m, n, tokens=64))
    accumulator = MomentAccumulator(n)
    accumulator.update(p.inputs * inputs_scale)
    spectrum = output_spectrum((p.weight * weight_scale).float(), accumulator.result().covariance)
    expected = output_spectrum(p.weight, p.moments.covariance)
    units = weight_scale**2 * inputs_scale**2
    noise = 1e-5 * float(expected.eigenvalues[0])
    torch.testing.assert_close(spectrum.eigenvalues / units, expected.eigenvalues, rtol=0, atol=noise)
    assert spectrum.discarded_share(3) == pytest.approx(expected.discarded_share(3), abs=1e-5)
    factors = two_factor(p.weight * weight_scale, None, spectrum, 3, accumulator.result().mean)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(factors))


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_float32_is_close_to_float64(m: int, n: int) -> None:
    p = problem(m, n)
    single = Moments(p.moments.mean.float(), p.moments.covariance.float(), p.moments.num_tokens)
    ours, spectrum = decompose(p.weight.float(), p.bias.float(), single, 4)
    exact, exact_spectrum = decompose(p.weight, p.bias, p.moments, 4)
    assert ours.up.dtype == torch.float32 and exact.up.dtype == torch.float64
    excess = squared_error(p, as_double(ours)) - squared_error(p, exact)
    assert abs(excess) < 1e-5 * variance(p)
    assert spectrum.discarded_share(4) == pytest.approx(exact_spectrum.discarded_share(4), abs=1e-5)


def test_half_precision_weights_are_computed_in_the_dtype_of_the_statistics() -> None:
    p = problem(8, 8)
    factors, _ = decompose(p.weight.bfloat16(), p.bias.bfloat16(), p.moments, 8)
    assert factors.up.dtype == factors.bias.dtype == torch.float64
    torch.testing.assert_close(factors.up @ factors.down, p.weight.bfloat16().double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["weight", "input covariance"])
def test_what_is_not_finite_is_named(where: str, bad: float) -> None:
    p = problem(6, 6)
    tensor = {"weight": p.weight, "input covariance": p.moments.covariance}[where]
    tensor[1, 2] = bad
    with pytest.raises(NumericsError, match=f"^{where}: 1 of 36"):
        decompose(p.weight, p.bias, p.moments, 2)


def test_arguments_are_left_alone() -> None:
    p = problem(12, 7)
    before = [tensor.clone() for tensor in (*p[:3], *p.moments[:2])]
    decompose(p.weight, p.bias, p.moments, 3)
    assert all(torch.equal(old, new) for old, new in zip(before, (*p[:3], *p.moments[:2]), strict=True))


@pytest.mark.parametrize("rank", [-1, 0, 8])
def test_an_illegal_rank_names_the_legal_ones(rank: int) -> None:
    p = problem(12, 7)
    with pytest.raises(RankError, match=rf"rank {rank} .*12 outputs.*1 to 7"):
        decompose(p.weight, p.bias, p.moments, rank)


def test_one_spectrum_serves_every_rank() -> None:
    p = problem(9, 12)
    spectrum = output_spectrum(p.weight, p.moments.covariance)
    for rank in (2, 5, 9):
        once, _ = decompose(p.weight, p.bias, p.moments, rank)
        again = two_factor(p.weight, p.bias, spectrum, rank, p.moments.mean)
        assert once.pivots is again.pivots is None
        assert all(torch.equal(a, b) for a, b in zip(tensors(once), tensors(again), strict=True))


# The pivoted form


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 14), st.integers(1, 14), st.integers(0, 10**6), st.data())
def test_the_pivoted_form_is_the_same_map(m: int, n: int, seed: int, data: st.DataObject) -> None:
    p = problem(m, n, tokens=3 * n + 5, seed=seed)
    rank = data.draw(st.integers(1, min(m - 1, n)))
    two, _ = decompose(p.weight, p.bias, p.moments, rank)
    parts, spectrum = decompose(p.weight, p.bias, p.moments, rank, form="pivoted")
    assert parts.down.shape == (rank, n) and parts.up.shape == (m - rank, rank) and parts.pivots.shape == (rank,)
    assert two.up.numel() + two.down.numel() - parts.up.numel() - parts.down.numel() == rank**2
    size = float(two.product().abs().max())
    torch.testing.assert_close(parts.product(), two.product(), rtol=0, atol=1e-9 * size)
    assert torch.equal(parts.bias, two.bias)
    assert parts.up.abs().max() <= 1.05 + 1e-9
    torch.testing.assert_close(parts.product()[parts.pivots], parts.down, rtol=0, atol=0)
    measured = squared_error(p, parts) / variance(p)
    assert measured == pytest.approx(spectrum.discarded_share(rank), abs=1e-9)
    outputs_of_each = sorted([*parts.pivots.tolist(), *parts.others().tolist()])
    assert outputs_of_each == list(range(m)) and (parts.others().diff() > 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(2, 14), st.integers(0, 10**6), st.data())
def test_the_column_pivoted_form_is_the_same_map(m: int, n: int, seed: int, data: st.DataObject) -> None:
    p = problem(m, n, tokens=3 * n + 5, seed=seed)
    rank = data.draw(st.integers(1, min(m, n - 1)))
    two, _ = decompose(p.weight, p.bias, p.moments, rank)
    parts, spectrum = decompose(p.weight, p.bias, p.moments, rank, form="column_pivoted")
    assert parts.form == "column_pivoted" and two.form == "two_factor"
    assert parts.down.shape == (rank, n - rank) and parts.up.shape == (m, rank) and parts.pivots.shape == (rank,)
    assert two.up.numel() + two.down.numel() - parts.up.numel() - parts.down.numel() == rank**2
    size = float(two.product().abs().max())
    torch.testing.assert_close(parts.product(), two.product(), rtol=0, atol=1e-9 * size)
    assert torch.equal(parts.bias, two.bias)
    assert parts.largest_coefficient() == float(parts.down.abs().max()) <= 1.05 + 1e-9
    torch.testing.assert_close(parts.product()[:, parts.pivots], parts.up, rtol=0, atol=0)
    measured = squared_error(p, parts) / variance(p)
    assert measured == pytest.approx(spectrum.discarded_share(rank), abs=1e-9)
    inputs_of_each = sorted([*parts.pivots.tolist(), *parts.others().tolist()])
    assert inputs_of_each == list(range(n)) and (parts.others().diff() > 0).all()


def test_columns_are_pivoted_as_rows_of_the_transpose_are() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 5, generator=generator, dtype=torch.float64)).Q
    other = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    rows, columns = pivoted(Factors(other, basis, None)), column_pivoted(Factors(basis.T, other.T, None))
    assert torch.equal(columns.pivots, rows.pivots) and columns.of_inputs and not rows.of_inputs
    torch.testing.assert_close(columns.down, rows.up.T)
    torch.testing.assert_close(columns.up, rows.down.T)


@pytest.mark.parametrize("form", ["pivoted", "column_pivoted"])
@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_pivoted_forms_survive_singular_covariances_in_float32(m: int, n: int, kind: str, form: str) -> None:
    """Also weights of a lower rank than is asked for: their rows do not fill the bottleneck."""
    moments = moments_of(singular_inputs(kind, n))
    moments = Moments(moments.mean.float(), moments.covariance.float(), moments.num_tokens)
    full = problem(m, n).weight.float()
    for weight in (full, full[:, :2] @ torch.ones(2, n), torch.zeros(m, n)):
        for rank in (1, 4, min(m - (form == "pivoted"), n - (form == "column_pivoted"))):
            two, _ = decompose(weight, None, moments, rank)
            parts, _ = decompose(weight, None, moments, rank, form=form)
            assert all(torch.isfinite(tensor).all() for tensor in tensors(parts))
            assert parts.largest_coefficient() <= 1.05 + 1e-5
            size = float(two.product().abs().max())
            torch.testing.assert_close(parts.product(), two.product(), rtol=0, atol=1e-4 * size)


def test_pivoting_needs_an_output_that_is_left() -> None:
    p = problem(6, 8)
    with pytest.raises(RankError, match="rank 6 of 6 outputs is the layer itself"):
        decompose(p.weight, p.bias, p.moments, 6, form="pivoted")
    narrow = problem(8, 6)
    with pytest.raises(RankError, match="rank 6 of 6 inputs is the layer itself"):
        decompose(narrow.weight, narrow.bias, narrow.moments, 6, form="column_pivoted")
    factors, _ = decompose(p.weight, p.bias, p.moments, 5)
    before = [tensor.clone() for tensor in tensors(factors)]
    assert FORMS["two_factor"](factors) is factors
    assert (pivoted(factors).form, column_pivoted(factors).form) == ("pivoted", "column_pivoted")
    assert all(torch.equal(old, new) for old, new in zip(before, tensors(factors), strict=True))


def test_the_product_of_pivoted_factors_by_hand() -> None:
    down, up = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 100.0]])
    parts = Factors(down, up, None, torch.tensor([0, 2]))
    assert parts.others().tolist() == [1]
    assert parts.product().tolist() == [[1, 2], [310, 420], [3, 4]]
    assert Factors(down, torch.eye(2), None).product().tolist() == down.tolist()
    inputs = Factors(
        torch.tensor([[10.0], [100.0]]), torch.tensor([[1.0, 2.0]]), None, torch.tensor([0, 2]), of_inputs=True
    )
    assert inputs.others().tolist() == [1]
    assert inputs.full_down().tolist() == [[1, 10, 0], [0, 100, 1]] and inputs.product().tolist() == [[1, 210, 2]]
