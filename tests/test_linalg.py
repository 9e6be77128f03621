# SPDX-License-Identifier: Apache-2.0
"""Eigenvectors, solves, rotations and pivots against plain formulas, and on matrices that are hard on them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_quant import linalg
from lord_quant.errors import NumericsError


def positive_semidefinite(size: int, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    factor = torch.randn(size, rank or size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


@pytest.mark.parametrize("rank", [12, 5, 1])
def test_symmetric_eigen_agrees_with_numpy_and_rebuilds_the_matrix(rank: int) -> None:
    matrix = positive_semidefinite(12, rank)
    values, vectors, remedies = linalg.symmetric_eigen(matrix)
    expected = np.linalg.eigvalsh(matrix.numpy())[::-1].clip(0)
    assert remedies == ()
    assert (values >= 0).all() and (values.diff() <= 0).all()
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-12 * expected[0])
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(12, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(vectors * values @ vectors.T, matrix, atol=1e-11, rtol=0)


def test_only_the_symmetric_part_counts_and_the_argument_is_left_alone() -> None:
    matrix = positive_semidefinite(6)
    skew = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lopsided = matrix + (skew - skew.T)
    before = lopsided.clone()
    values = linalg.symmetric_eigen(lopsided).values
    torch.testing.assert_close(values, linalg.symmetric_eigen(matrix).values, atol=1e-10, rtol=0)
    assert torch.equal(lopsided, before)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e36])
def test_values_keep_the_scale_of_the_matrix_in_float32(scale: float) -> None:
    matrix = positive_semidefinite(8)
    eigen = linalg.symmetric_eigen((matrix * scale).float())
    expected = linalg.symmetric_eigen(matrix).values * scale
    torch.testing.assert_close(eigen.values.double(), expected, rtol=1e-4, atol=1e-5 * float(expected[0]))


def test_zero_matrix_has_an_orthonormal_basis_and_says_so() -> None:
    values, vectors, remedies = linalg.symmetric_eigen(torch.zeros(5, 5))
    assert torch.equal(values, torch.zeros(5))
    assert torch.equal(vectors @ vectors.T, torch.eye(5))
    assert "zero matrix" in remedies[0]


@pytest.mark.parametrize(
    ("failures", "remedies"), [(0, ()), (1, ("float64",)), (2, ("float64", "shifted by 1e-10"))], ids=["0", "1", "2"]
)
@pytest.mark.parametrize("how", ["raises", "returns NaN"])
def test_a_failing_solver_is_helped_step_by_step(
    monkeypatch: pytest.MonkeyPatch, failures: int, remedies: tuple[str, ...], how: str
) -> None:
    solve, seen = torch.linalg.eigh, []

    def flaky(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(matrix.dtype)
        if len(seen) > failures:
            return solve(matrix)
        if how == "raises":
            raise torch.linalg.LinAlgError("did not converge")
        return torch.full((len(matrix),), torch.nan), torch.full_like(matrix, torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", flaky)
    matrix = positive_semidefinite(7).float()
    eigen = linalg.symmetric_eigen(matrix)
    assert eigen.remedies == remedies
    assert seen == [torch.float32, torch.float64, torch.float64][: failures + 1]
    assert eigen.values.dtype == eigen.vectors.dtype == torch.float32
    torch.testing.assert_close(eigen.vectors * eigen.values @ eigen.vectors.T, matrix, atol=1e-4, rtol=0)


def test_a_solver_that_never_converges_is_an_error_with_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.raises(NumericsError, match=r"\(4, 4\).*did not converge"):
        linalg.symmetric_eigen(torch.eye(4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_symmetric_eigen_refuses_what_is_not_finite(bad: float) -> None:
    matrix = torch.eye(3)
    matrix[0, 1] = bad
    with pytest.raises(NumericsError, match="1 of 9"):
        linalg.symmetric_eigen(matrix)


def test_require_finite_names_the_tensor_and_counts_all_offenders() -> None:
    tensor = torch.zeros(4, 5)
    tensor[0, 0], tensor[1, 1], tensor[2, 2] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(NumericsError, match="thing: 3 of 20 values are NaN or inf"):
        linalg.require_finite(tensor, "thing")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_require_finite_does_not_take_an_overflowing_sum_for_an_offender(dtype: torch.dtype) -> None:
    linalg.require_finite(torch.full((100,), torch.finfo(dtype).max, dtype=dtype), "large but finite")


@pytest.mark.parametrize("shape", [(9, 4), (4, 4)])
def test_thin_qr(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q, r = linalg.thin_qr(weight)
    assert q.shape == shape and r.shape == (4, 4)
    torch.testing.assert_close(q @ r, weight)
    torch.testing.assert_close(q.T @ q, torch.eye(4, dtype=torch.float64))
    assert torch.equal(r, r.triu())


def conditioned(exponent: float, seed: int = 3) -> torch.Tensor:
    """A tall matrix whose singular values fall evenly over so many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(size, 48, generator=generator, dtype=torch.float64)).Q for size in (200, 48))
    return ((left * torch.logspace(0, -exponent, 48, dtype=torch.float64)) @ right.T).float()


@pytest.mark.parametrize(
    ("exponent", "householder"), [(0, False), (1, False), (2.5, False), (3.2, False), (6, True), (30, True)]
)
def test_large_matrices_are_factored_by_way_of_their_gram_matrix_where_that_is_as_good(
    exponent: float, householder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, before = conditioned(exponent), conditioned(exponent)
    plain, called = torch.linalg.qr, []
    monkeypatch.setattr(linalg, "LARGE_QR", 48 * 200)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "qr", lambda *given, **asked: called.append(1) or plain(*given, **asked))
        q, r = linalg.thin_qr(weight)
    assert bool(called) == householder and torch.equal(weight, before)
    assert torch.equal(r, r.triu())
    torch.testing.assert_close(q @ r, weight, atol=2e-6, rtol=0)
    torch.testing.assert_close(q.T @ q, torch.eye(48), atol=2e-4, rtol=0)
    skew = torch.linalg.matrix_norm(q.double().T @ q.double() - torch.eye(48), 2)
    assert linalg._skewness(q) == pytest.approx(float(skew), rel=0.3, abs=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_columns_that_are_orthonormal_are_not_skew(size: int) -> None:
    assert linalg._skewness(torch.eye(5, size)) == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.integers(0, 10**9))
def test_random_orthogonal_is_orthogonal_and_the_seeds_own(size: int, seed: int) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    drawn = linalg.random_orthogonal(size, seed, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(drawn @ drawn.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.manual_seed(6)
    assert torch.equal(linalg.random_orthogonal(size, seed, drawn), drawn)
    assert torch.equal(linalg.random_orthogonal(size, seed, drawn.float()), drawn.float())
    assert size == 1 or not torch.allclose(linalg.random_orthogonal(size, seed + 1, drawn), drawn)


def test_random_orthogonal_is_uniform() -> None:
    """Haar: entries have mean 0 and variance 1/n, also on the diagonal, where a plain QR has one sign."""
    draws = torch.stack([linalg.random_orthogonal(4, seed, torch.zeros(1, dtype=torch.float64)) for seed in range(600)])
    assert draws.mean(dim=0).abs().max() < 4 * (1 / 4 / 600) ** 0.5
    assert (draws.square().mean(dim=0) - 1 / 4).abs().max() < 0.05


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 12), st.sampled_from([0.0, 1e-6, 1e-2, 1.0]), st.data())
def test_damped_right_solve_agrees_with_a_plain_solve(
    size: int, rows: int, rank: int, fraction: float, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 10**6))
    matrix = positive_semidefinite(size, max(rank, 1), seed) if rank else torch.zeros(size, size, dtype=torch.float64)
    right = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = right.clone(), matrix.clone()
    found = linalg.damped_right_solve(right, matrix, fraction)
    assert torch.equal(right, before[0]) and torch.equal(matrix, before[1])
    assert found.shape == right.shape and torch.isfinite(found).all()
    if not rank:
        assert torch.equal(found, torch.zeros_like(right))
    elif fraction >= 1e-6:  # less may have been raised
        damped = matrix + fraction * matrix.diagonal().mean() * torch.eye(size, dtype=torch.float64)
        expected = torch.linalg.solve(damped, right, left=False)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_damped_right_solve_does_not_mind_units_in_float32(scale: float) -> None:
    matrix, right = positive_semidefinite(8), torch.ones(3, 8, dtype=torch.float64)
    found = linalg.damped_right_solve((right * scale).float(), (matrix * scale).float(), 0.01)
    torch.testing.assert_close(found.double(), linalg.damped_right_solve(right, matrix, 0.01), rtol=1e-4, atol=1e-5)


def test_a_diagonal_whose_sum_overflows_is_solved_too() -> None:
    matrix = 1e36 * torch.eye(1000)
    found = linalg.damped_right_solve(matrix[:2], matrix, 0.01)
    torch.testing.assert_close(found, torch.eye(1000)[:2] / 1.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damping_is_raised_until_a_singular_matrix_can_be_solved(dtype: torch.dtype) -> None:
    matrix = positive_semidefinite(10, 3).to(dtype)
    matrix[0, 0] -= 1e-7 * float(matrix[0, 0])  # as rounding does: slightly indefinite
    right = matrix[:4].clone()  # a right-hand side in the range, of which a pseudo-inverse would make unit rows
    found = linalg.damped_right_solve(right, matrix, 0.0)
    assert found.dtype == dtype and torch.isfinite(found).all()
    torch.testing.assert_close(found @ matrix, right, rtol=0, atol=0.01 * float(right.abs().max()))


def test_a_loud_channel_does_not_overflow_the_factorization() -> None:
    matrix = torch.diag(torch.tensor([1e36, 1.0, 1.0]))
    found = linalg.damped_right_solve(torch.tensor([[1e36, 0.0, 0.0]]), matrix, 0.01)
    assert torch.isfinite(found).all() and found[0, 0] == pytest.approx(1, abs=0.02)


def test_an_indefinite_matrix_is_an_error_with_its_shape() -> None:
    matrix = torch.diag(torch.tensor([10.0, -9.0, 1.0]))
    with pytest.raises(NumericsError, match=r"\(3, 3\) matrix stayed indefinite"):
        linalg.damped_right_solve(torch.ones(2, 3), matrix, 0.01)


@pytest.mark.parametrize("where", ["right-hand side", "matrix"])
def test_damped_right_solve_refuses_what_is_not_finite(where: str) -> None:
    right, matrix = torch.ones(2, 3), torch.eye(3)
    {"right-hand side": right, "matrix": matrix}[where][0, 1] = torch.nan
    with pytest.raises(NumericsError, match=f"^{where} of a solve: 1 of"):
        linalg.damped_right_solve(right, matrix, 0.01)


def orthonormal(kind: str, rows: int, rank: int, seed: int) -> torch.Tensor:
    """Orthonormal bases on which it is easy, or hard, to choose rows."""
    draw = torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "few loud rows":
        draw *= torch.logspace(0, -8, rows, dtype=torch.float64)[:, None]
    elif kind == "rows alike":
        draw = draw[torch.arange(rows) % (rank + 1) % rows] + 1e-6 * draw
    elif kind == "integers":
        draw = (2 * draw).round() + torch.eye(rows, rank, dtype=torch.float64) / 8
    elif kind == "Kahan":  # greedy pivoting is misled by this one
        sine, cosine = 0.8**0.5, 0.2**0.5
        upper = torch.eye(rank, dtype=torch.float64) - cosine * torch.ones(rank, rank, dtype=torch.float64).triu(1)
        draw[:rank] = (sine ** torch.arange(rank, dtype=torch.float64)[:, None] * upper).T
        draw[rank:] *= 0.1
    return linalg.thin_qr(draw)[0]


KINDS = ["gaussian", "few loud rows", "rows alike", "integers", "Kahan"]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 20), st.integers(0, 12), st.sampled_from([1.05, 1.5]), st.data())
def test_pivots_predict_all_rows_with_bounded_coefficients(
    kind: str, rank: int, more: int, bound: float, data: st.DataObject
) -> None:
    basis = orthonormal(kind, rank + more, rank, data.draw(st.integers(0, 10**6)))
    for u in (basis, basis.float()):
        before = u.clone()
        pivots = linalg.choose_pivots(u, bound)
        assert torch.equal(u, before)
        assert pivots.dtype == torch.int64 and pivots.shape == (rank,)
        assert (pivots.diff() > 0).all() and pivots[0] >= 0 and pivots[-1] < rank + more
        predictor = torch.linalg.solve(u.double()[pivots], u.double(), left=False)
        assert predictor.abs().max() <= bound + 1e-6
        torch.testing.assert_close(predictor @ u.double()[pivots], u.double(), rtol=0, atol=1e-6)


def test_swaps_find_more_volume_than_greedy_pivoting() -> None:
    """Wherever greedy pivots break the bound, and they do often enough for the test above to mean something."""
    swapped = 0
    for seed in range(20):
        basis = orthonormal("gaussian", 40, 16, seed)
        greedy, chosen = linalg.choose_pivots(basis, bound=1e9), linalg.choose_pivots(basis)
        largest = [float(torch.linalg.solve(basis[rows], basis, left=False).abs().max()) for rows in (greedy, chosen)]
        assert largest[1] <= 1.05 + 1e-9
        if largest[0] > 1.05:
            swapped += 1
            assert basis[chosen].det().abs() > 1.05 * basis[greedy].det().abs()
        else:
            assert torch.equal(greedy, chosen)
    assert swapped >= 5


def test_the_larger_the_volume_the_smaller_the_amplification() -> None:
    basis = orthonormal("gaussian", 14, 5, 3)
    pivots = linalg.choose_pivots(basis)
    others = [row for row in range(14) if row not in pivots]
    predictor = torch.linalg.solve(basis[pivots], basis[others], left=False)
    amplification = torch.linalg.det(torch.eye(5, dtype=torch.float64) + predictor.T @ predictor)
    assert float(amplification) == pytest.approx(float(basis[pivots].det() ** -2), rel=1e-9)


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("size", [1, 7, 150])
def test_a_cholesky_factor_in_place_is_the_one_of_numpy(size: int, upper: bool) -> None:
    matrix = positive_semidefinite(size, size + 3)
    factor, exists = linalg.cholesky_(same := matrix.clone(), upper=upper)
    expected = np.linalg.cholesky(matrix.numpy())
    assert exists and factor.data_ptr() == same.data_ptr()
    np.testing.assert_allclose(factor.numpy(), expected.T if upper else expected, atol=1e-10 * size)
    assert not linalg.cholesky_(-matrix, upper=upper)[1]


@pytest.mark.parametrize("size", [1, 7, linalg.SMALL_TRIANGLE + 1, 700])
def test_a_lower_triangle_is_inverted_in_place(size: int) -> None:
    torch.manual_seed(size)
    matrix = torch.randn(size, size, dtype=torch.float64).tril() / size**0.5
    matrix.diagonal().abs_().add_(1)
    inverse = linalg.invert_lower_(same := matrix.clone())
    assert inverse is same and not inverse.triu(1).any()
    torch.testing.assert_close(inverse @ matrix, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-10)
