# SPDX-License-Identifier: Apache-2.0
"""LoRD: the low-rank decomposition of one linear layer from the statistics of its inputs.

The problem. Replace y = W x + b, W (m, n), by y = up (down x) + b̂ with down (r, n), up (m, r), so that outputs on
calibration data change least: minimise E‖(W x + b) − (up down x + b̂)‖².

The solution (LoRD, arXiv 2309.14021, §3; Atomic Feature Mimicking, AAAI 2023). Let S = W Σ Wᵀ be the covariance of the
outputs, Σ that of the inputs, and U the eigenvectors of its r largest eigenvalues λ₁ ≥ … ≥ λ_r. Then

    up = U        down = Uᵀ W        b̂ = b + (W − up down) μ

is optimal, and the error is the sum of the discarded eigenvalues; divided by the sum of all it is the share of the
outputs' variance that is lost. The bias correction makes the mean exact, so only variance is approximated. The product
equals whitened SVD's wherever that is defined, but needs neither a Cholesky factor nor an inverse, so singular
covariances are no special case. One eigendecomposition serves every rank.

The pivoted form (PIFA, arXiv 2501.19090). A product of rank r has r (m + n) − r² degrees of freedom, r² fewer than two
factors hold. Choose r outputs P, the pivots, from which the others can be predicted, A = U_N U_P⁻¹ on the rows N not in P:

    down = U_P Uᵀ W (rows P of the product)        up = A        y_P = z, y_N = A z with z = down x

The product is the same. Pivots of locally maximal volume keep every entry of A at most about 1 (`linalg.choose_pivots`).

The column-pivoted form does that to the inputs. Of r of them, the pivots P, the bottleneck takes each as it is, and of the
others what they add in the same directions, C = (UᵀW)_P⁻¹ (UᵀW)_N on the columns N not in P:

    down = C        up = U (UᵀW)_P (columns P of the product)        y = up (x_P + down x_N)

It has as few weights. Which loses less to rounding is a matter of shape: with more outputs than inputs most weights are in
`up`, which here is refitted last, for what `down` has become (`stack.py`). (Interpolative decompositions, by rows and by
columns: Cheng et al., SIAM J. Sci. Comput. 26(4), 2005.)

Failure cases. When fewer tokens than features were seen, or channels are dead, eigenvalues beyond the effective rank
are rounding noise: the basis is still orthonormal and the layer still reproduces what it was calibrated on, but those
directions are arbitrary. `effective_rank` reports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from lord_quant.errors import RankError
from lord_quant.halves import symmetric_product, upper_product
from lord_quant.linalg import choose_pivots, require_finite, symmetric_eigen, thin_qr
from lord_quant.moments import Moments


class OutputSpectrum(NamedTuple):
    """Eigendecomposition of a layer's output covariance, k = min(out_features, in_features).

    Attributes:
        eigenvalues: Descending, not negative, float64, with shape (k,).
        vectors: Orthonormal columns, with shape (out_features, k).
        effective_rank: Number of eigenvalues above rounding noise.
        remedies: What the eigensolver needed; empty when nothing.
    """

    eigenvalues: torch.Tensor
    vectors: torch.Tensor
    effective_rank: int
    remedies: tuple[str, ...]

    def total(self) -> float:
        """Returns the output variance, that of all outputs together."""
        return float(self.eigenvalues.sum())

    def discarded_share(self, rank: int) -> float:
        """Returns the share of output variance lost at `rank`, which is the relative output error, in [0, 1]."""
        total = self.total()
        return float(self.eigenvalues[rank:].sum()) / total if total > 0 else 0.0

    def leading(self, rank: int) -> torch.Tensor:
        """Returns the eigenvectors of the `rank` largest eigenvalues, with shape (out_features, rank).

        Raises:
            RankError: There are not so many, or none is wanted.
        """
        outputs, limit = self.vectors.shape
        if not 1 <= rank <= limit:
            raise RankError(f"rank {rank} is illegal for a weight of {outputs} outputs; wanted 1 to {limit}")
        return self.vectors[:, :rank].contiguous()


class Factors(NamedTuple):
    """The two factors that replace a weight.

    Attributes:
        down: With shape (rank, in_features); in the column-pivoted form (rank, in_features − rank).
        up: With shape (out_features, rank); in the pivoted form (out_features − rank, rank).
        bias: With shape (out_features,), or None.
        pivots: In the pivoted form, which outputs `down` computes, in the column-pivoted one, which inputs pass it by:
            ascending indices with shape (rank,).
        of_inputs: Whether they are inputs.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    pivots: torch.Tensor | None = None
    of_inputs: bool = False

    @property
    def form(self) -> str:
        """The name of the form they are in."""
        return "two_factor" if self.pivots is None else "column_pivoted" if self.of_inputs else "pivoted"

    def others(self) -> torch.Tensor:
        """Returns the outputs that `up` predicts in the pivoted form, or the inputs that `down` takes: ascending indices.

        Raises:
            ValueError: The factors are not in a pivoted form.
        """
        if self.pivots is None:
            raise ValueError("two-factor form: `up` computes all outputs; wanted a pivoted form")
        size = len(self.pivots) + (self.down.shape[1] if self.of_inputs else len(self.up))
        mask = torch.ones(size, dtype=torch.bool, device=self.up.device)
        mask[self.pivots] = False
        return mask.nonzero()[:, 0]

    def largest_coefficient(self) -> float | None:
        """Returns the largest magnitude in the factor that pivots keep small; None where there are none."""
        return None if self.pivots is None else float((self.down if self.of_inputs else self.up).abs().max())

    def biases(self) -> dict[str, torch.Tensor]:
        """Returns the biases of the factors' layers, by factor; none where there is no bias."""
        if self.bias is None:
            return {}
        if self.pivots is None or self.of_inputs:
            return {"up": self.bias}
        # A pivot's bias goes on with z into the outputs predicted from it; theirs makes up for it.
        pivot_bias, other_bias = self.bias[self.pivots], self.bias[self.others()]
        return {"down": pivot_bias, "up": other_bias - self.up @ pivot_bias}

    def full_down(self) -> torch.Tensor:
        """Returns `down` of all inputs, with shape (rank, in_features): in the column-pivoted form with 1 at pivots."""
        if not self.of_inputs:
            return self.down
        full = self.down.new_zeros(len(self.down), len(self.down) + self.down.shape[1])
        full[:, self.pivots], full[:, self.others()] = torch.eye(len(self.down)).to(full), self.down
        return full

    def product(self) -> torch.Tensor:
        """Returns the weight the factors stand for, with shape (out_features, in_features)."""
        if self.pivots is None or self.of_inputs:
            return self.up @ self.full_down()
        weight = self.down.new_empty(len(self.down) + len(self.up), self.down.shape[1])
        weight[self.pivots], weight[self.others()] = self.down, self.up @ self.down
        return weight


def output_spectrum(weight: torch.Tensor, covariance: torch.Tensor) -> OutputSpectrum:
    """Decomposes the output covariance W Σ Wᵀ, from its smaller side.

    Args:
        weight: W with shape (out_features, in_features); computed in the dtype of `covariance`.
        covariance: Σ, centred, with shape (in_features, in_features), float32 or float64.

    Raises:
        NumericsError: Either holds NaN or inf.
    """
    require_finite(weight, "weight")
    require_finite(covariance, "input covariance")
    weight = weight.to(covariance)
    # Moving each channel's deviation from Σ into W keeps W Σ Wᵀ inside float32 whatever the units of weights and
    # activations, also where a loud channel meets small weights: with Σ = D P D, W Σ Wᵀ = (W D) P (W D)ᵀ.
    deviation = _deviation(covariance)
    weight_scale, deviation_scale = _one_for_zero(weight.abs().max()), deviation.max()
    loud = (weight / weight_scale) * (deviation / deviation_scale)
    loud_scale = _one_for_zero(loud.abs().max())
    tall = weight.shape[0] > weight.shape[1]
    basis, core = thin_qr(loud / loud_scale) if tall else (None, loud / loud_scale)
    shared = (covariance / deviation[:, None]).div_(deviation)
    gram = symmetric_product(upper_product(core, shared) if tall else core @ shared, core.T)
    eigen = symmetric_eigen(gram)
    vectors = eigen.vectors if basis is None else basis @ eigen.vectors
    noise = eigen.values.max() * len(eigen.values) * torch.finfo(eigen.values.dtype).eps
    return OutputSpectrum(
        eigenvalues=eigen.values.double() * (weight_scale.double() * deviation_scale.double() * loud_scale.double()) ** 2,
        vectors=vectors,
        effective_rank=int((eigen.values > noise).sum()),
        remedies=eigen.remedies,
    )


def _deviation(covariance: torch.Tensor) -> torch.Tensor:
    """Returns each channel's standard deviation; dead channels, whose scale is free, get the quietest live one's."""
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    live = deviation > 0
    return torch.where(live, deviation, deviation[live].min() if live.any() else torch.ones_like(deviation))


def _one_for_zero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def two_factor(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    spectrum: OutputSpectrum,
    rank: int,
    mean: torch.Tensor | None,
) -> Factors:
    """Truncates a layer to `rank`: up = U, down = UᵀW, bias corrected for the mean.

    Args:
        weight: W with shape (out_features, in_features).
        bias: With shape (out_features,), or None.
        spectrum: The layer's output spectrum.
        rank: Between 1 and min(out_features, in_features).
        mean: Mean input μ with shape (in_features,) to correct the bias with, or None to leave it.

    Returns:
        Factors in the spectrum's dtype. The bias exists if the layer had one or a mean was given.

    Raises:
        RankError: The rank is out of range.
    """
    up = spectrum.leading(rank)
    weight = weight.to(up)
    down = up.T @ weight
    corrected = None if bias is None else bias.to(weight)
    if mean is not None:
        mean = mean.to(weight)
        lost = weight @ mean - up @ (down @ mean)
        corrected = lost if corrected is None else corrected + lost
    return Factors(down, up, corrected)


def pivoted(factors: Factors) -> Factors:
    """Brings factors with orthonormal `up` into the pivoted form; the product stays the same.

    Raises:
        RankError: The rank is that of the outputs: nothing would be left to predict.
    """
    outputs, rank = factors.up.shape
    if rank >= outputs:
        raise RankError(f"the pivoted form at rank {rank} of {outputs} outputs is the layer itself; wanted a lower rank")
    pivots = choose_pivots(factors.up)
    result = Factors(factors.up[pivots] @ factors.down, factors.up[rank:], factors.bias, pivots)
    basis = factors.up.double()
    predictor = torch.linalg.solve(basis[pivots].T, basis[result.others()].T).T
    return result._replace(up=predictor.to(factors.up).contiguous())


def column_pivoted(factors: Factors) -> Factors:
    """Brings two factors into the column-pivoted form; the product stays the same.

    Raises:
        RankError: The rank is that of the inputs: `down` would have none to take.
    """
    rank, inputs = factors.down.shape
    if rank >= inputs:
        raise RankError(
            f"the column-pivoted form at rank {rank} of {inputs} inputs is the layer itself; wanted a lower rank"
        )
    basis = thin_qr(factors.down.T)[0]  # of the rows' space, also where `down` does not fill it
    pivots = choose_pivots(basis)
    result = Factors(factors.down[:, rank:], factors.up @ factors.down[:, pivots], factors.bias, pivots, of_inputs=True)
    wide = basis.double()
    predictor = torch.linalg.solve(wide[pivots].T, wide[result.others()].T)
    return result._replace(down=predictor.to(factors.down).contiguous())


def decompose(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    moments: Moments,
    rank: int,
    *,
    form: str = "two_factor",
    mean_correction: bool = True,
) -> tuple[Factors, OutputSpectrum]:
    """Runs LoRD on one layer, in the form asked for; see `output_spectrum`, `two_factor`, `pivoted` and so on."""
    spectrum = output_spectrum(weight, moments.covariance)
    factors = two_factor(weight, bias, spectrum, rank, moments.mean if mean_correction else None)
    return FORMS[form](factors), spectrum


FORMS: dict[str, Callable[[Factors], Factors]] = {
    "two_factor": lambda factors: factors,
    "pivoted": pivoted,
    "column_pivoted": column_pivoted,
}
"""How a truncated layer is stored, by the name that configurations and checkpoints use."""
