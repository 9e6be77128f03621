# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

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
