# SPDX-License-Identifier: Apache-2.0
"""Truncation in the metric of the model's loss.

Not all outputs of a layer matter alike. With the metric G on them (`sensitivity.py`) and H on the inputs, an error D of a
weight T (m, n) costs tr G D H Dᵀ. With G = SᵀS that is ‖S D‖²_H: the best rank-r approximation of T is LoRD on S T, with
S⁻¹ in front. One decomposition serves every rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lord_quant.decompose import FORMS, Factors, OutputSpectrum, output_spectrum, two_factor
from lord_quant.errors import NumericsError
from lord_quant.halves import upper_product
from lord_quant.linalg import cholesky_, require_finite, thin_qr


SENSITIVITY_DAMPING = 0.05
"""Fraction of its mean diagonal added to G: true for small errors only."""
HEAVY_TAILS = 32.0
"""How much more gradients scatter than normal ones do: so many times the tokens are needed. Chosen on two small models: 8
loses 1.5 % of perplexity with 8192 tokens, and is as good with 24576."""


def unit_metric(sensitivity: torch.Tensor, num_tokens: int | None = None) -> torch.Tensor | None:
    """Returns G damped and with a mean diagonal of 1, or None if it is zero.

    What couples outputs is partly chance if G was measured on few tokens: of normal vectors in d dimensions,
    d = (tr G)² / ‖G‖², the entries off the diagonal have d / N of their squares from it. They are made smaller by about
    that share (the idea of Ledoit & Wolf, J. Multivariate Analysis 88, 2004).

    Args:
        sensitivity: G with shape (m, m).
        num_tokens: On how many tokens it was measured; None takes it as it is.

    Raises:
        NumericsError: It holds NaN or inf.
    """
    require_finite(sensitivity, "output sensitivity (gradients of the loss; --no-fisher does without)")
    mean = sensitivity.diagonal().mean()
    if not mean > 0:
        return None
    metric = sensitivity / mean
    if num_tokens is not None:
        own, spread = metric.diagonal().clone(), HEAVY_TAILS * len(metric) ** 2 / metric.square().sum()
        metric.mul_(num_tokens / (num_tokens + spread)).diagonal().copy_(own)
    metric.diagonal().add_(SENSITIVITY_DAMPING)
    return metric.div_(1 + SENSITIVITY_DAMPING)


class Weighed(NamedTuple):
    """A weight in units of what its outputs do to the loss.

    Attributes:
        weight: S T with shape (m, n); T itself where all outputs count alike.
        root: S, upper triangular, with shape (m, m), SᵀS = G; or None.
    """

    weight: torch.Tensor
    root: torch.Tensor | None


def weigh(target: torch.Tensor, outputs: torch.Tensor | None) -> Weighed:
    """Returns T, with shape (m, n), in units of the metric G of its outputs; None counts them alike.

    Raises:
        NumericsError: G is not positive definite.
    """
    if outputs is None:
        return Weighed(target, None)
    root, exists = cholesky_(outputs.clone(), upper=True)
    if not exists:
        raise NumericsError("the output sensitivity stayed indefinite with damping; --no-fisher does without")
    return Weighed(upper_product(root, target), root)


def truncate(weighed: Weighed, covariance: torch.Tensor, rank: int) -> tuple[OutputSpectrum, Factors]:
    """Returns the best factors of T in the metric G ⊗ H, `up` orthonormal in units of √diag G."""
    spectrum = output_spectrum(weighed.weight, covariance)
    return spectrum, factors_of(weighed, spectrum, rank)


def factors_of(weighed: Weighed, spectrum: OutputSpectrum, rank: int) -> Factors:
    """Returns the factors that `truncate` does, from the spectrum, which serves all ranks."""
    even, root = two_factor(weighed.weight, None, spectrum, rank, None), weighed.root
    if root is None:
        return even
    scale = torch.linalg.vector_norm(root, dim=0)[:, None]
    even = _orthonormal(even._replace(up=scale * torch.linalg.solve_triangular(root, even.up, upper=True)))
    return even._replace(up=even.up / scale)


def in_form(factors: Factors, form: str, outputs: torch.Tensor | None) -> Factors:
    """Brings what `factors_of` returns into a form; `outputs` is the metric it was made in. A group's factors are two."""
    if form == "pivoted" and outputs is not None:
        factors = _orthonormal(factors)
    return FORMS[form](factors) if form in FORMS else factors


def _orthonormal(factors: Factors) -> Factors:
    """Returns the same product with orthonormal columns of `up`."""
    up, mix = thin_qr(factors.up)
    return factors._replace(up=up, down=mix @ factors.down)
