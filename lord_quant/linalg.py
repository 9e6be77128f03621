# SPDX-License-Identifier: Apache-2.0
"""Dense linear algebra on tensors: no models, no layers.

The problem. A linear layer y = W x with weight W (m, n) sees inputs with covariance Σ (n, n). Its outputs have the
covariance S = W Σ Wᵀ (m, m). LoRD needs the eigenvectors of S, largest first, from whichever side is smaller:

* m ≤ n: S itself is decomposed.
* m > n: S has rank n at most, and an m × m problem would be mostly null space. With the thin factorization W = Q R
  (Q orthonormal (m, n), R (n, n)) one has S = Q (R Σ Rᵀ) Qᵀ, so the eigenvectors are Q V with V those of the n × n
  matrix R Σ Rᵀ. No inverse, no matrix square root, and U = Q V is orthonormal whatever the condition of W or Σ.

What can go wrong. Covariances of real activations are often singular (dead or duplicated channels, fewer tokens than
features) and badly scaled (one channel a thousand times louder than the rest). Neither matters to a symmetric
eigensolver as such, which always returns an orthonormal basis; rounding may return small negative eigenvalues, which
are clamped. The matrix is divided by its largest magnitude first, so that squares neither overflow nor underflow in
float32. A solver that still fails to converge is run again in float64, then with a small multiple of the identity
added; each remedy is reported by name.

dtype policy. Everything runs in the dtype asked for (float32 unless said otherwise, float64 on request), never in half
precision. Inputs are not modified.

Sources: LoRD, arXiv 2309.14021, §3; Golub & Van Loan, Matrix Computations, §5.2 (QR), §8.3 (symmetric QR algorithm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from lord_quant.errors import NumericsError
from lord_quant.halves import energy, symmetric_product


LARGE_QR = 2**25
"""From so many values on a tall matrix is factored by way of its Gram matrix: less time than Householder's QR takes. Those
of small layers take no time to speak of."""
SMALL_TRIANGLE = 256
"""Up to this size, triangular matrices are inverted at once."""

Note = Callable[[str], None]
"""Is told what the numerics needed."""


class SymmetricEigen(NamedTuple):
    """Eigendecomposition of a symmetric positive semidefinite matrix.

    Attributes:
        values: Eigenvalues, descending, not negative, with shape (k,).
        vectors: Orthonormal eigenvectors in columns, with shape (k, k).
        remedies: What had to be done for the solver to succeed; empty when nothing.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    remedies: tuple[str, ...]


def is_finite(tensor: torch.Tensor) -> bool:
    """Tells whether a tensor holds neither NaN nor inf."""
    # A sum is finite only if all terms are, and makes no copy; it may overflow on finite terms, hence the second look.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises `NumericsError` naming `name` and the number of offenders when `tensor` holds NaN or inf."""
    if not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NumericsError(f"{name}: {bad} of {tensor.numel()} values are NaN or inf; wanted finite values")


def symmetric_eigen(matrix: torch.Tensor) -> SymmetricEigen:
    """Decomposes a symmetric positive semidefinite matrix, surviving singular and badly scaled ones.

    Args:
        matrix: Symmetric, with shape (k, k), float32 or float64. Only its symmetric part counts.

    Returns:
        Eigenvalues in the scale of `matrix`, largest first.

    Raises:
        NumericsError: The matrix holds NaN or inf, or no remedy made the solver converge.
    """
    require_finite(matrix, "matrix of an eigendecomposition")
    scale = matrix.abs().max()
    if scale == 0:
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return SymmetricEigen(torch.zeros_like(matrix[0]), identity, ("zero matrix: arbitrary basis",))
    scaled = matrix / scale
    scaled = (scaled + scaled.T) / 2
    for remedy, attempt in _attempts(scaled):
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except torch.linalg.LinAlgError:
            continue
        if torch.isfinite(values).all() and torch.isfinite(vectors).all():
            values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
            return SymmetricEigen(values.to(matrix.dtype) * scale, vectors.to(matrix.dtype), remedy)
    raise NumericsError(f"eigendecomposition of a {tuple(matrix.shape)} matrix did not converge, with float64 or a shift")


def _attempts(scaled: torch.Tensor) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Yields what to try, made only when the attempt before failed: float64 copies of large matrices are expensive."""
    yield (), scaled
    yield ("float64",), scaled.double()
    shift = 1e-10 * torch.eye(len(scaled), dtype=torch.float64, device=scaled.device)
    yield ("float64", "shifted by 1e-10"), scaled.double() + shift


def thin_qr(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors a tall matrix (m, n), m ≥ n, into orthonormal Q (m, n) and upper triangular R (n, n), W = Q R."""
    large = _gram_qr(weight) if weight.numel() >= LARGE_QR else None
    if large is not None:
        return large
    result = torch.linalg.qr(weight, mode="reduced")
    return result.Q, result.R


def _gram_qr(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Does what `thin_qr` does with RᵀR = WᵀW and Q = W R⁻¹: products and a solve, but errors grow with cond(W)².

    So Q is measured. Where once was not enough its own factors do better, as its condition is near 1; None where these did
    not suffice either, or WᵀW has no Cholesky factor.

    Source: Cholesky QR, once or twice, Yamamoto et al., Electron. Trans. Numer. Anal. 44, 2015.
    """
    basis, core = weight, None
    for _ in range(2):
        factor, exists = cholesky_(symmetric_product(basis.T, basis), upper=True)
        if not exists:
            return None
        basis = torch.linalg.solve_triangular(factor, basis, upper=True, left=False)
        core = factor if core is None else factor @ core
        if _skewness(basis) <= 1000 * torch.finfo(basis.dtype).eps:
            return basis, core
    return None


def _skewness(basis: torch.Tensor) -> float:
    """Estimates ‖QᵀQ − I‖ in the spectral norm, by a few steps of power iteration."""
    vector = torch.randn(basis.shape[1], generator=torch.Generator().manual_seed(0)).to(basis)
    norm = vector.norm()
    for _ in range(8):
        if norm == 0:
            return 0.0
        unit = vector / norm
        vector = basis.T @ (basis @ unit) - unit
        norm = vector.norm()
    return float(norm)


def cholesky_(matrix: torch.Tensor, *, upper: bool = False) -> tuple[torch.Tensor, bool]:
    """Factors a symmetric matrix in place, M = L Lᵀ, or UᵀU if `upper`; no second matrix is made.

    LAPACK works on columns, so it is given the transpose, which is the same matrix.

    Args:
        matrix: M with shape (n, n), contiguous; afterwards the factor's transpose, or rubbish if there is no factor.
        upper: Which factor is wanted.

    Returns:
        The factor with zeros in its other half, which shares the memory of `matrix`, and whether it exists.
    """
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix.mT, upper=upper, out=(matrix.mT, failed))
    return matrix.mT, not failed


def invert_lower_(matrix: torch.Tensor) -> torch.Tensor:
    """Inverts a lower triangular matrix in place, with shape (n, n); what stands above its diagonal must be zero.

    By halves, [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]: products of half the size, and no second matrix.
    """
    half = len(matrix) // 2
    if len(matrix) <= SMALL_TRIANGLE:
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
    above, below = invert_lower_(matrix[:half, :half]), invert_lower_(matrix[half:, half:])
    matrix[half:, :half] = below @ (matrix[half:, :half] @ above).neg_()
    return matrix


def random_orthogonal(size: int, seed: int, like: torch.Tensor) -> torch.Tensor:
    """Draws an orthogonal matrix (size, size) uniformly (Haar), in the dtype and on the device of `like`.

    Drawn from an own generator on the CPU in float64, so that a seed means the same matrix everywhere. The signs of R's
    diagonal are moved into Q, without which QR does not draw uniformly (Mezzadri, Notices of the AMS 54, 2007).
    """
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).to(like)


def damped_right_solve(
    right: torch.Tensor, matrix: torch.Tensor, fraction: float, note: Note | None = None
) -> torch.Tensor:
    """Solves X (M + λ I) = R for X, with λ = fraction · mean(diag M).

    Args:
        right: R with shape (m, k).
        matrix: M, symmetric positive semidefinite, with shape (k, k).
        fraction: Damping; raised tenfold until a Cholesky factor exists.
        note: Is told when it had to be raised.

    Returns:
        X with shape (m, k), in the dtype of `matrix`; zero where M is zero.

    Raises:
        NumericsError: Either holds NaN or inf, or no damping up to 1 helped.
    """
    require_finite(right, "right-hand side of a solve")
    require_finite(matrix, "matrix of a solve")
    mean, asked = matrix.diagonal().double().mean(), fraction  # the sum of many loud channels overflows float32
    if mean <= 0:
        return torch.zeros_like(right)
    while fraction <= 1:
        damped = matrix / mean  # unit scale: squares of loud channels overflow float32 inside the factorization
        damped.diagonal().add_(fraction)
        factor, exists = cholesky_(damped)
        if exists:
            if note is not None and fraction > asked:
                note(f"damping of a solve raised from {asked:g} to {fraction:g}")
            half = torch.linalg.solve_triangular(factor, right.to(matrix).T / mean, upper=False)
            return torch.linalg.solve_triangular(factor.T, half, upper=True).T  # `cholesky_solve` would copy the factor
        fraction = max(10 * fraction, 1e-7)
    raise NumericsError(
        f"a {tuple(matrix.shape)} matrix stayed indefinite with its mean diagonal added; wanted a covariance"
    )


def relative_error(
    result: torch.Tensor,
    target: torch.Tensor,
    covariance: torch.Tensor,
    outputs: torch.Tensor | None,
    whole: float | None = None,
) -> float:
    """Returns ‖Ŵ − T‖² / ‖T‖² in the metric `outputs` ⊗ `covariance`; `whole` is ‖T‖² where a spectrum has told it."""
    whole = energy(target, covariance, outputs) if whole is None else whole
    return energy(result - target, covariance, outputs) / whole if whole > 0 else 0.0


def choose_pivots(basis: torch.Tensor, bound: float = 1.05) -> torch.Tensor:
    """Chooses r rows of an orthonormal basis from which all its rows can be predicted with bounded coefficients.

    Greedy pivoted QR picks rows of large volume; rows are then swapped while any coefficient of the predictor
    U U_P⁻¹ exceeds `bound` (each swap multiplies the volume by that coefficient, so this ends). At bound 1 the chosen rows
    have locally maximal volume, which also keeps det (I + AᵀA) = 1/vol², hence the amplification of rounding errors, small.

    Sources: Gu & Eisenstat, SIAM J. Sci. Comput. 17(4), 1996 (strong rank-revealing QR); Goreinov et al., *How to find a
    good submatrix*, 2010 (maxvol).

    Args:
        basis: U with orthonormal columns, with shape (m, r), m ≥ r.
        bound: Largest magnitude allowed in the predictor, above 1.

    Returns:
        Indices of the pivot rows, ascending, int64, with shape (r,).
    """
    u = basis.double()
    rank = u.shape[1]
    pivots = _greedy_pivots(u)
    predictor = torch.linalg.solve(u[pivots].T, u.T).T
    for _ in range(8 * rank):
        row, column = divmod(int(predictor.abs().argmax()), rank)
        if predictor[row, column].abs() <= bound:
            break
        pivots[column] = row
        ratio = predictor[:, column] / predictor[row, column]
        change = predictor[row].clone()
        change[column] -= 1
        predictor -= ratio[:, None] * change
    return pivots.sort().values


def _greedy_pivots(rows: torch.Tensor) -> torch.Tensor:
    """Chooses the row that is longest beside those chosen before, as often as there are columns: pivoted QR.

    Rows are not kept up to date, only their lengths: a pass over the matrix per choice instead of five.
    """
    rank = rows.shape[1]
    size, directions = rows.square().sum(dim=1), rows.new_empty(rank, rank)
    chosen = torch.empty(rank, dtype=torch.int64, device=rows.device)
    for count in range(rank):
        chosen[count] = pivot = size.argmax()
        direction, known = rows[pivot], directions[:count]
        for _ in range(2):  # twice: once leaves something where most of the row is known
            direction = direction - (known @ direction) @ known
        directions[count] = direction / direction.norm()
        size -= (rows @ directions[count]).square_()
        size[pivot] = -torch.inf
    return chosen
