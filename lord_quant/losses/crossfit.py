# SPDX-License-Identifier: Apache-2.0
"""What truncation loses on text it was not chosen on.

Truncation keeps the directions that the calibration text needs and drops those that look small. Of many directions some
look small by chance, and they are the ones that are dropped: the tail of the spectrum, which is what the text that chose
loses, is too small for any other text. So the text is cut in two. Each half chooses, the other says what was lost, and the
mean of both is what is predicted. (It errs to the safe side: the truncation that will be run is chosen on both halves.)

In the metric of one half, G = SᵀS, the truncation to rank r drops what lies beyond the first r columns of V and rows of C
in W = V C, with V = S⁻¹ U and C = Uᵀ S W, U the eigenvectors of S W H Wᵀ Sᵀ. In the metric of the other half this costs

    ½ Σ_ij (Vᵀ G′ V)_ij (C H′ Cᵀ)_ij     over i, j ≥ r,

for all r at once. That is what the model's own predictions lose. By how much more the text's loss rises, at first order, is
the inner product of the error with the slope of the other half's loss, K = E[g (x − μ)ᵀ] where a bias takes up the mean:

    −Σ_i (Vᵀ K Cᵀ)_ii     over i ≥ r.

Chance moves it to both sides, but of real models the sum is positive, and often as large as the former: the small
directions are what a model had not finished learning. Cutting more is never counted as losing less.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lord_quant.decompose import output_spectrum
from lord_quant.halves import symmetric_product
from lord_quant.moments import Moments
from lord_quant.sensitivity import Steepness
from lord_quant.truncation import unit_metric, weigh


class Half(NamedTuple):
    """What half of the calibration text says of a layer.

    Attributes:
        moments: Of its inputs.
        sensitivity: G with shape (m, m), or None where all outputs count alike.
        slope: Of the text's loss; None counts it as flat.
        num_labels: Tokens whose gradients G is of; None takes it as it is.
    """

    moments: Moments
    sensitivity: torch.Tensor | None
    slope: Steepness | None = None
    num_labels: int | None = None


def crossed_tail(weight: torch.Tensor, halves: tuple[Half, Half], *, centred: bool) -> torch.Tensor:
    """Returns what truncation to rank 0, 1, …, k = min(m, n) loses where it was not chosen.

    Args:
        weight: W with shape (m, n).
        halves: Both halves.
        centred: Whether a bias takes up errors of the mean, that of the half that chooses.

    Returns:
        In nats per token, or halves of squared errors without sensitivities; float64, with shape (k + 1,).
    """
    first, second = halves
    pairs = zip(_chosen_on(weight, first, second, centred), _chosen_on(weight, second, first, centred), strict=True)
    curved, sloped = ((one + two) / 2 for one, two in pairs)
    return curved + sloped.clamp_min(0).flip(0).cummax(dim=0).values.flip(0)


def _chosen_on(weight: torch.Tensor, fitted: Half, other: Half, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what truncation to every rank, chosen on one half, loses on the other: at second order and at first."""
    metric = None if fitted.sensitivity is None else unit_metric(fitted.sensitivity.to(weight), fitted.num_labels)
    if metric is None and fitted.sensitivity is not None:
        nothing = torch.zeros(min(weight.shape) + 1, dtype=torch.float64)  # the loss does not depend on it
        return nothing, nothing
    seen, root = weigh(weight, metric)
    vectors = output_spectrum(seen, _seen(fitted.moments, fitted.moments, centred)).vectors
    right = vectors.T @ seen
    left = vectors if root is None else torch.linalg.solve_triangular(root, vectors, upper=True)
    minded = symmetric_product(left.T if other.sensitivity is None else left.T @ other.sensitivity.to(left), left)
    products = symmetric_product(right @ _seen(other.moments, fitted.moments, centred), right.T).double() * minded
    curved = 0.5 * products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    sloped = torch.zeros_like(curved)
    if other.slope is not None:
        shift = fitted.moments.mean if centred else torch.zeros_like(fitted.moments.mean)
        slope = other.slope.weight.to(left) - torch.outer(other.slope.bias, shift).to(left)
        sloped = -((left.T @ slope) * right).sum(dim=1, dtype=torch.float64).flip(0).cumsum(0).flip(0)
    return _ending_at_zero(curved), _ending_at_zero(sloped)


def _ending_at_zero(sums: torch.Tensor) -> torch.Tensor:
    return torch.cat((sums, sums.new_zeros(1))).cpu()


def _seen(moments: Moments, bias_of: Moments, centred: bool) -> torch.Tensor:
    """Returns the second moment of inputs about the mean that a bias takes up, or about zero."""
    shift = moments.mean - bias_of.mean if centred else moments.mean
    return moments.covariance + torch.outer(shift, shift)
