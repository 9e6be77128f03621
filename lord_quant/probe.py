# SPDX-License-Identifier: Apache-2.0
"""What one layer would lose: to truncation at any rank, and to rounding at any bit width.

The unit is the model's loss. An error D of a weight W (m, n) costs about ½ tr G D H Dᵀ nats per token, with H the second
moment of the inputs and G that of the loss's gradients at the outputs (`sensitivity.py`). With G scaled to a mean diagonal
of 1, as `stack.unit_metric` does, that is `unit` · tr G D H Dᵀ, unit = ½ mean diag G.

Truncation is exact: the best rank-r approximation loses the eigenvalues after the r-th; one decomposition serves every
rank.

Rounding has no formula that could be trusted, so a few real solves stand for all. Rows of a dense layer are independent:
some of them, solved at 2, 3 and 4 bits and at 3 bits in other groups, tell the noise of every bit width and group size,
taken as a product of the two. Of factors, one real stack at half rank and 4 bits is made. What it lost beyond truncation,
relative to the energy it kept, is taken to be the same share at every rank, and to go with bits and groups as the dense
layer's noise does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lord_quant.config import GptqConfig, JointConfig
from lord_quant.layer_bytes import PACK_MULTIPLE
from lord_quant.linalg import require_finite
from lord_quant.moments import Moments, PairedMoments
from lord_quant.refine import refine
from lord_quant.solver import make_solver
from lord_quant.stack import stack_layer, truncate, unit_metric


ROWS = 256
"""Rows of a weight that are solved for its noise."""
PROBED_BITS = (2, 3, 4)
PROBED_GROUPS = (32, 64, 128)
GROUP_BITS = 3
"""Bits at which group sizes are compared."""
FACTOR_BITS = 4
"""Bits at which factors are compared with the dense layer."""
FINER = 256.0
"""How much less noise 8 bits make than 4: a step 16 times finer, squared."""


class LayerLoss(NamedTuple):
    """What compressing a layer costs; all in nats per token but for `share`.

    Attributes:
        tail: Loss of truncation at rank 0, 1, …, k = min(m, n), float64, with shape (k + 1,), falling to 0.
        dense: Loss of rounding the dense layer, by bits, in groups of `group_size`.
        groups: Noise in groups of other sizes, relative to those of `group_size`.
        group_size: Group size of the probes.
        share: Loss of rounding two factors at 4 bits, relative to the energy they keep; None where no rank is legal.
    """

    tail: torch.Tensor
    dense: dict[int, float]
    groups: dict[int, float]
    group_size: int
    share: float | None

    def of_dense(self, bits: int, group_size: int) -> float:
        """Returns the loss of a layer that stays dense."""
        noise = self.dense[4] / FINER if bits == 8 else self.dense[bits]
        return noise * self.groups[group_size]

    def factor_noise(self, bits: int, group_size: int) -> float:
        """Returns the loss of rounding two factors, relative to the energy they keep."""
        reference = self.of_dense(FACTOR_BITS, self.group_size)
        return (self.share or 0.0) * (self.of_dense(bits, group_size) / reference if reference > 0 else 0.0)


def probe(
    weight: torch.Tensor,
    moments: Moments,
    sensitivity: torch.Tensor | None,
    *,
    has_bias: bool,
    mean_correction: bool = True,
    gptq: GptqConfig,
    options: JointConfig,
    seed: int = 0,
) -> LayerLoss:
    """Finds out what one layer would lose.

    Args:
        weight: W with shape (m, n).
        moments: Of its inputs in the dense model.
        sensitivity: G with shape (m, m), in nats² per unit of output²; zero for a layer the loss does not depend on, which
            loses nothing. None counts all outputs alike, with G = I: losses are squared output errors then.
        has_bias: Whether it has a bias.
        mean_correction: Whether its factors get one anyway.
        gptq: How it would be quantized; bits and group size are chosen here.
        options: How it would be stacked.
        seed: Of the choice of rows and of rotations.

    Raises:
        NumericsError: Something holds NaN or inf.
    """
    covariance, mean = moments.covariance, moments.mean
    weight = weight.to(covariance)
    require_finite(weight, "weight")
    metric = None if sensitivity is None else unit_metric(sensitivity.to(weight))
    unit = 0.5 * (1.0 if sensitivity is None else float(sensitivity.diagonal().double().mean()))
    seen = covariance if has_bias else covariance + torch.outer(mean, mean)  # a bias takes up errors of the mean
    fitting = [size for size in PROBED_GROUPS if weight.shape[1] % size == 0]
    usual = 64 if 64 in fitting else fitting[0]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(weight), generator=generator)[:ROWS].sort().values.to(weight.device)
    part, counts = weight[rows], 1.0 if metric is None else metric.diagonal()[rows].double()

    def noise(bits: int, group_size: int) -> float:
        solved = make_solver(replace(gptq, bits=bits), group_size, moments.num_tokens)(part, seen).to(part)
        error = refine(part, seen, solved, options.refine).weight() - part
        lost = ((error @ seen) * error).sum(dim=1).double() * counts
        return unit * float(lost.mean()) * len(weight)

    dense = {bits: noise(bits, usual) for bits in PROBED_BITS}
    floor = torch.finfo(torch.float32).tiny  # of a layer that loses nothing
    groups = {size: 1.0 if size == usual else noise(GROUP_BITS, size) / max(dense[GROUP_BITS], floor) for size in fitting}
    if weight.shape[1] % 256 == 0:
        groups[256] = groups[128] * groups[128] / groups[64]
    share, smaller = None, min(weight.shape)
    step = usual if smaller >= usual else PACK_MULTIPLE
    if smaller >= step:
        paired = PairedMoments(mean, mean, covariance, covariance, moments.num_tokens)
        rank = max(step, round(smaller / 2 / step) * step)
        solve = make_solver(replace(gptq, bits=FACTOR_BITS), step, moments.num_tokens)
        own: dict[str, Any] = {"sensitivity": sensitivity, "seed": seed, "mean_correction": has_bias or mean_correction}
        stacked = stack_layer(weight, None, paired, rank, "two_factor", solve, options, **own)
        assert stacked.spectrum is not None  # it has a rank
        spectrum, cut = stacked.spectrum, stacked.spectrum.discarded_share(rank)
        share = max(stacked.error - cut, 0.0) / (1 - cut) if cut < 1 else 0.0
    else:
        spectrum, _ = truncate(weight, covariance if has_bias or mean_correction else seen, smaller, metric)
    values = spectrum.eigenvalues.double().cpu()
    tail = torch.cat((values.flip(0).cumsum(0).flip(0), values.new_zeros(1)))
    return LayerLoss(unit * tail, dense, groups, usual, share)
