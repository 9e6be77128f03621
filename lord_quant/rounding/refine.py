# SPDX-License-Identifier: Apache-2.0
"""Improving a quantized weight after the solver: scales and codes in turn, each step exact.

A GPTQ solver fixes scales before it knows the codes, and every code before it knows the later ones. With the result in
hand both can be looked at again. Write Ŵ = s (q − z), scale s per row and group, codes q, zeros z, and measure

    f(Ŵ) = tr (Ŵ − W) H (Ŵ − W)ᵀ.

Scales. For fixed codes Ŵ is linear in the scales: row i is Σ_g s_ig u_ig with u_ig = q − z inside group g, zero outside.
The minimum solves a small system per row, M_gg′ = u_ig H u_ig′ᵀ, right-hand side u_ig H wᵢᵀ; all rows at once cost one
matrix product. (Coupled rows have one system between them; a step towards its solution does.)

Codes. For fixed scales, coordinate descent: with R = (Ŵ − W) H the best value of column j, all else fixed, is
ŵ_j − R_j / H_jj; it is rounded to its grid, and R follows. One sweep costs what the solver costs. (Coordinate descent on
the GPTQ objective: QuantEase, arXiv 2309.01885.)

Neither step can increase f but for the rounding of scales to float16, in which they are stored, and for scales that keep
their old value because the best one is far off, which happens in groups of a few columns. H is damped a little (`DAMPING`),
so that directions the calibration never saw do not run away.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from lord_quant.linalg import require_finite
from lord_quant.rounding.coupling import Coupling
from lord_quant.rounding.kernels import descend_columns, descend_coupled


DAMPING = 0.003
"""Fraction of the mean Hessian diagonal added to it."""
COLUMNS = 64
"""Columns per block; residuals of later blocks are updated by one product per block."""
TOGETHER = 512
"""Columns whose products with a group are made at a time: few enough to stay in the processor's cache."""


class Quantized(NamedTuple):
    """A weight on its grid, with what the solver said of it.

    Attributes:
        codes: Integers 0 to 2^bits − 1, float while at work and uint8 at rest, with shape (out_features, in_features).
        scales: Values of float16 precision, with shape (out_features, groups).
        zeros: Integers in float, with shape (out_features, groups).
        g_idx: Group of every column, with shape (in_features,).
        bits: Width of a code.
        loss: The solver's own figure, or None where it fell back to plain rounding.
        damp_percent: Damping the solver ended with.
        seconds: Wall time of the solve.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    bits: int
    loss: float | None = None
    damp_percent: float = 0.0
    seconds: float = 0.0

    def weight(self) -> torch.Tensor:
        """Returns the weight as it will be read back, with shape (out_features, in_features)."""
        groups = self.g_idx.long()
        return self.scales[:, groups] * (self.codes - self.zeros[:, groups])

    def to(self, like: torch.Tensor) -> Quantized:
        """Returns the same with codes, scales and zeros in the dtype of `like`; the values do not change."""
        return self._replace(codes=self.codes.to(like), scales=self.scales.to(like), zeros=self.zeros.to(like))

    def at_rest(self) -> Quantized:
        """Returns the same in a quarter of the memory; a whole model's codes wait to be packed."""
        return self._replace(codes=self.codes.to(torch.uint8))


def refine(
    weight: torch.Tensor, hessian: torch.Tensor, quantized: Quantized, sweeps: int, coupling: Coupling | None = None
) -> Quantized:
    """Improves codes and scales towards `weight` in the metric of `hessian`.

    Args:
        weight: W with shape (m, n), float32.
        hessian: H with shape (n, n), symmetric positive semidefinite.
        quantized: Where to start from.
        sweeps: How often scales and codes are visited; 0 returns the start.
        coupling: The metric of the rows, on the CPU; None takes them as independent.

    Raises:
        NumericsError: Weight, Hessian or a scale that came out hold NaN or inf.
    """
    require_finite(weight, "weight to be refined")
    require_finite(hessian, "Hessian to refine in")
    if not sweeps or not hessian.diagonal().mean() > 0:
        return quantized
    perm = torch.argsort(quantized.g_idx, stable=True)  # groups lie together, whatever the activation order
    back = torch.argsort(perm)
    groups = quantized.g_idx[perm].long()
    sorted_already = torch.equal(groups, quantized.g_idx.long())  # usually; wide Hessians are not copied then
    metric = _Damped.of(hessian if sorted_already else hessian[perm[:, None], perm])
    # All transposed, so that a column of the weight is contiguous.
    target, codes = weight.T[perm], quantized.codes.T[perm]
    scales, zeros = quantized.scales.T.contiguous(), quantized.zeros.T.contiguous()
    if coupling is None:
        fit = functools.partial(_fit_scales, metric.times(target), metric)
    else:
        fit = functools.partial(_fit_coupled_scales, coupling.metric, target, metric)
    for _ in range(sweeps):
        scales = _stored(fit(codes - zeros[groups], scales, groups), scales)
        _descend_(codes, target, metric, scales, zeros, groups, 2**quantized.bits - 1, coupling)
    return quantized._replace(codes=codes[back].T.contiguous(), scales=scales.T.contiguous())


SYSTEM_VALUES = 2**25
"""Values of the systems for scales, (groups, groups, rows), at a time: some 700 MB with what solving them takes."""


class _Damped(NamedTuple):
    """H / μ + `DAMPING` · I with μ the mean of H's diagonal; no copy of H is made unless 1 / μ is not finite in its dtype.

    Attributes:
        hessian: H with shape (n, n).
        unit: 1 / μ.
    """

    hessian: torch.Tensor
    unit: float

    @classmethod
    def of(cls, hessian: torch.Tensor) -> _Damped:
        mean = float(hessian.diagonal().double().mean())
        if 1 / mean > torch.finfo(hessian.dtype).max:
            return cls((hessian.double() / mean).to(hessian), 1.0)
        return cls(hessian, 1 / mean)

    def times(self, right: torch.Tensor) -> torch.Tensor:
        """Returns the product with a matrix with shape (n, k)."""
        return torch.addmm(right, self.hessian, right, beta=DAMPING, alpha=self.unit)

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Returns what stands on the diagonal from row `start` to before `stop`."""
        own = self.hessian[start:stop, start:stop] * self.unit
        own.diagonal().add_(DAMPING)
        return own


def _fit_scales(
    pull: torch.Tensor, metric: _Damped, steps: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """Returns the best scales, with shape (groups, m), for steps q − z with shape (n, m), in float64."""
    count, height = scales.shape
    at_once = max(1, SYSTEM_VALUES // count**2)
    if height > at_once:
        parts = zip(*(each.split(at_once, dim=1) for each in (pull, steps, scales)), strict=True)
        return torch.cat([_fit_scales(own, metric, step, scale, groups) for own, step, scale in parts], dim=1)
    ranges = list(_ranges(groups.tolist()))
    system, right = steps.new_zeros(count, count, height), torch.zeros_like(scales)
    for place, (group, (start, stop)) in enumerate(ranges):
        right[group] = (pull[start:stop] * steps[start:stop]).sum(dim=0)
        for first, last, begin, end in _runs(ranges[place:]):  # M is symmetric: earlier groups have been here
            shared = (metric.hessian[begin:end, start:stop] @ steps[start:stop]).mul_(steps[begin:end])
            system[group, first:last] = shared.unflatten(0, (last - first, -1)).sum(dim=1).mul_(metric.unit)
        system[group, group] += DAMPING * steps[start:stop].square().sum(dim=0)
        system[group + 1 :, group] = system[group, group + 1 :]
    whole = system.permute(2, 0, 1).double()
    ridge = 1e-6 * whole.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)
    whole.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    start_from = scales.T.double()
    fitted = torch.linalg.solve(whole, right.T.double() + ridge[:, None] * start_from).T
    return fitted


def _fit_coupled_scales(
    rows: torch.Tensor,
    target: torch.Tensor,
    metric: _Damped,
    steps: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
) -> torch.Tensor:
    """Returns better scales for coupled rows, with shape (groups, m): towards the best of each row, as far as it pays.

    What is best for a row while the others stay is a fit to a target that has moved; all rows go there at once, by the
    share of the way that is best for all.
    """
    now = steps * scales[groups]
    missed = metric.times(target - now) @ rows
    aims = metric.times(now).add_(missed / rows.diagonal())
    way = _fit_scales(aims, metric, steps, scales, groups).to(scales) - scales
    wide = steps * way[groups]
    bend = (wide * (metric.times(wide) @ rows)).sum().clamp_min(torch.finfo(scales.dtype).tiny)
    return scales + (wide * missed).sum() / bend * way


def _stored(fitted: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns fitted scales as they will be stored; those that a group of zeros leaves free, or wild ones, stay."""
    sane = (fitted > 0.3 * scales) & (fitted < 3 * scales)
    fitted = torch.where(sane, fitted, scales.to(fitted)).half().to(scales)
    require_finite(fitted, "scales after refinement")
    return torch.where(fitted > 0, fitted, scales)


def _descend_(
    codes: torch.Tensor,
    target: torch.Tensor,
    metric: _Damped,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    largest: int,
    coupling: Coupling | None,
) -> None:
    """Improves codes in place, with shape (n, m). Within a group, whose scale is one, in units of codes."""
    residual = metric.times((codes - zeros[groups]).mul_(scales[groups]).sub_(target))
    for start, stop in _spans(groups.tolist()):
        step, own = scales[groups[start]], metric.block(start, stop)
        place = codes[start:stop], residual[start:stop] / step, own
        moved = (
            descend_columns(*place, largest)
            if coupling is None
            else descend_coupled(*place, coupling.on_others(step), largest)
        )
        residual[stop:].addmm_(metric.hessian[stop:, start:stop], moved.mul_(step), alpha=metric.unit)


def _spans(groups: list[int]) -> Iterator[tuple[int, int]]:
    """Yields ranges of at most `COLUMNS` columns of one group each."""
    for _, (start, end) in _ranges(groups):
        for first in range(start, end, COLUMNS):
            yield first, min(first + COLUMNS, end)


def _runs(ranges: Sequence[tuple[int, tuple[int, int]]]) -> Iterator[tuple[int, int, int, int]]:
    """Yields runs of groups of one width, at most `TOGETHER` columns: their groups and their columns, from and to."""
    numbered = enumerate(ranges)  # a group without columns ends a run
    for (width, _), alike in itertools.groupby(numbered, key=lambda each: (_width(each[1]), each[1][0] - each[0])):
        members = [each for _, each in alike]
        most = max(1, TOGETHER // width)
        for chosen in (members[at : at + most] for at in range(0, len(members), most)):
            yield chosen[0][0], chosen[-1][0] + 1, chosen[0][1][0], chosen[-1][1][1]


def _width(group: tuple[int, tuple[int, int]]) -> int:
    _, (start, stop) = group
    return stop - start


def _ranges(groups: list[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yields every group and its columns, which lie together."""
    start = 0
    for group, members in itertools.groupby(groups):
        end = start + len(list(members))
        yield group, (start, end)
        start = end
