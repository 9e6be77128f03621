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

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lord_quant.errors import NumericsError


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


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises `NumericsError` naming `name` and the number of offenders when `tensor` holds NaN or inf."""
    # A sum is finite only if all terms are; it may overflow on finite terms, hence the exact count before raising.
    if torch.isfinite(tensor.sum()):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
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
    result = torch.linalg.qr(weight, mode="reduced")
    return result.Q, result.R
