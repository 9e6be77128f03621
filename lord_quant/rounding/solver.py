# SPDX-License-Identifier: Apache-2.0
"""GPTQ: rounding a weight column by column, each error passed on to the columns still open.

The problem. Find Ŵ = s (q − z) near W with small tr (Ŵ − W) H (Ŵ − W)ᵀ. Rows are independent. With the first columns
fixed, the best values of the others are linear in what was done so far: with H⁻¹ = UᵀU, U upper triangular, rounding column
j to ŵ_j moves every later column k by − (w_j − ŵ_j) U_jk / U_jj, and costs ((w_j − ŵ_j) / U_jj)² for good.

U comes from one factorization: reversing the order of rows and columns of H, its Cholesky factor L is, reversed back, an
upper triangular R with H = R Rᵀ, so U = R⁻¹, which is L⁻¹ reversed. H is damped; if it still has no factor, more.

Scales and zeros of a group are chosen when its turn comes, for the weights as they are then (the host's solver looks at
them a block of 128 columns at a time, so that with smaller groups some are chosen for weights that are out of date): of a
few shrunken ranges the one with the least error. Scales have the precision in which they are stored before anything is
rounded to them, so that their own error is passed on as well.

Inside a group everything happens in units of codes, t = w / s + z, in which feedback has the same coefficients: a column
costs four operations. A few columns are done at a time; what comes after them is updated by one product.

Rows may be coupled (`coupling.py`): then they are rounded one after the other in every column, and what is passed on to
later columns is what a code misses of where its row has moved. A group's scales are chosen for where rows moved in a first
try.

With act_group_aware, columns go in order of falling H_jj within their group, and groups in order of their largest: most of
the gain of desc_act, and groups stay where they are.

Sources: GPTQ, arXiv 2210.17323; activation order inside whole groups as in GPTQModel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from lord_quant.config import FLOAT_BITS, GptqConfig
from lord_quant.errors import NumericsError
from lord_quant.linalg import cholesky_, invert_lower_, require_finite
from lord_quant.rounding.coupling import Coupling
from lord_quant.rounding.kernels import grid_errors, round_columns, round_coupled
from lord_quant.rounding.refine import Quantized


Solver = Callable[[torch.Tensor, torch.Tensor], Quantized]
"""Quantizes a weight (m, n) in the metric of a Hessian (n, n)."""


class Rounding(Protocol):
    """Quantizes weights (m, n) in a metric it has prepared; rows may know of each other."""

    def __call__(self, weight: torch.Tensor, coupling: Coupling | None = None) -> Quantized: ...


class Solvers(NamedTuple):
    """The solvers of a layer's factors, which may differ in bits and group size; a dense layer has that of `down`."""

    down: Solver
    up: Solver


COLUMNS = 64
"""Columns done before later ones hear of it."""
SMALLEST = 2.0**-20
"""Smallest scale: float16 still has four bits there. Smaller ones belong to weights that are zero for every purpose."""
SHRINKS = tuple(1 - step / 20 for step in range(12))
"""Ranges tried for a group, as shares of its full one; finer steps gain nothing once `refine` has fitted the scales."""


def exact(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
    """A `Solver` that rounds nothing, with a grid on which the weight lies as it is; tells what the other factor loses."""
    scales = weight.new_ones(len(weight), 1)
    g_idx = torch.zeros(weight.shape[1], dtype=torch.int32, device=weight.device)
    return Quantized(weight, scales, torch.zeros_like(scales), g_idx, bits=FLOAT_BITS)


@dataclass(frozen=True)
class Gptq:
    """GPTQ with its settings filled in: a `Solver`.

    Attributes:
        settings: Bits, symmetry, order of columns, damping and the norm that scales minimise.
        group_size: Columns per scale; the last group may be short.
        num_tokens: Tokens behind the Hessians; the reported loss is divided by them, as the host does.
    """

    settings: GptqConfig
    group_size: int
    num_tokens: int

    def __call__(self, weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
        """Quantizes a weight.

        Args:
            weight: W with shape (m, n), any float dtype; the work is done in float32 at least.
            hessian: H with shape (n, n), symmetric positive semidefinite, in any unit.

        Returns:
            Codes, with the scales in float16 precision; ``loss`` is the error in the metric of H over `num_tokens`.

        Raises:
            NumericsError: Weight or Hessian hold NaN or inf, scales overflow float16, or no damping below 1 helped.
        """
        start = time.perf_counter()
        require_finite(weight, "weight to be quantized")
        done = self.of(hessian)(weight)
        return done._replace(seconds=time.perf_counter() - start)

    def of(self, hessian: torch.Tensor, like: Rounding | None = None) -> Rounding:
        """Factors a Hessian and returns what quantizes any number of weights in its metric, without timing it.

        Args:
            hessian: H with shape (n, n).
            like: What was prepared in the same Hessian before; its factor is taken if it differs in bits alone.
        """
        if isinstance(like, _Factored) and like.solver._with_bits(self.settings.bits) == self:
            return replace(like, solver=self)
        require_finite(hessian, "Hessian to quantize in")
        order = _column_order(hessian.diagonal(), self.group_size, self.settings)
        size = hessian.diagonal().double().mean()
        dtype = torch.promote_types(hessian.dtype, torch.float32)
        feedback, damp = Feedback.of(hessian, size, order, self.settings.damp_percent, dtype)
        return _Factored(self, feedback, order, float(size), damp)

    def _with_bits(self, bits: int) -> Gptq:
        return replace(self, settings=replace(self.settings, bits=bits))

    def _solve(self, weight: torch.Tensor, feedback: Feedback, order: torch.Tensor, coupling: Coupling | None) -> Quantized:
        gptq, group_size = self.settings, self.group_size
        positions = torch.arange(len(order), device=order.device) if gptq.desc_act else order
        groups = positions.div(group_size, rounding_mode="floor")  # of columns in order
        rest = weight.T[order]  # transposed: a column of the weight is contiguous
        coupled = None if coupling is None else CoupledRows(rest.clone(), coupling)
        codes = torch.empty_like(rest)
        largest, loss = 2**gptq.bits - 1, 0.0
        scales, zeros = (rest.new_empty(int(groups.max()) + 1, rest.shape[1]) for _ in range(2))
        for begin in range(0, len(rest), group_size):
            end = min(begin + group_size, len(rest))
            group, pivots = rest[begin:end], feedback.pivots(begin, end)
            scale, zero = _grid(group, largest, gptq.sym, gptq.mse)
            rows = None if coupled is None else coupled.columns(begin, end)
            if rows is not None:  # they move before their turn comes: once more, for what the first time told of that
                first, _ = _round_group(group, begin, feedback, scale, zero, largest, rows)
                moved = group - rows.coupling.moves(scale * (first - zero) - rows.start)
                scale, zero = _grid(moved, largest, gptq.sym, gptq.mse)
            codes[begin:end], missed = _round_group(group, begin, feedback, scale, zero, largest, rows)
            scales[groups[begin]], zeros[groups[begin]] = scale, zero
            errors = missed.mul_(scale / pivots)
            # Behind rows that have moved, an error costs what is left of its row's own weight.
            own = errors if coupling is None else errors * coupling.root.diagonal()
            loss += float(own.double().square().sum())
            if end < len(rest):
                rest[end:].addmm_(feedback.rows(begin, end)[1].T, errors, alpha=-1)
        back = torch.argsort(order)
        return Quantized(
            codes=codes[back].T.contiguous(),
            scales=scales.T.contiguous(),
            zeros=zeros.T.contiguous(),
            g_idx=groups[back].to(torch.int32),
            bits=gptq.bits,
            loss=loss,
        )


@dataclass(frozen=True)
class _Factored:
    """A solver in the metric of one Hessian: a `Rounding`.

    Attributes:
        solver: The solver.
        feedback: How columns are fed back, in the dtype that is worked in.
        order: In which order they are rounded.
        size: What H was divided by.
        damp: Damping it was factored with.
    """

    solver: Gptq
    feedback: Feedback
    order: torch.Tensor
    size: float
    damp: float

    def __call__(self, weight: torch.Tensor, coupling: Coupling | None = None) -> Quantized:
        """Quantizes a weight."""
        done = self.solver._solve(weight.detach().to(self.feedback.inverse), self.feedback, self.order, coupling)
        return done._replace(loss=(done.loss or 0.0) * self.size / self.solver.num_tokens, damp_percent=self.damp)


class CoupledRows(NamedTuple):
    """Rows that know of each other.

    Attributes:
        start: What their columns were before any was rounded, transposed, with shape (columns, m).
        coupling: How their errors add up.
    """

    start: torch.Tensor
    coupling: Coupling

    def columns(self, first: int, last: int) -> CoupledRows:
        """Returns the same of the columns from `first` to before `last`."""
        return self._replace(start=self.start[first:last])


def _round_group(
    group: torch.Tensor,
    begin: int,
    feedback: Feedback,
    scale: torch.Tensor,
    zero: torch.Tensor,
    largest: int,
    rows: CoupledRows | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds the columns of a group, the layer's columns from `begin` on, transposed, with shape (columns, m).

    Returns:
        Codes, and by how much they miss what they should have been when their turn came, in units of codes.
    """
    rest, codes, missed = group.clone(), torch.empty_like(group), torch.empty_like(group)
    mix = None if rows is None else rows.coupling.on_later(scale)
    for first in range(0, len(rest), COLUMNS):
        last = min(first + COLUMNS, len(rest))
        own, later = feedback.rows(begin + first, begin + last, begin + len(rest))
        wanted, found = rest[first:last] / scale + zero, codes[first:last]
        if rows is None or mix is None:
            missed[first:last] = round_columns(wanted, own, found, largest)
        else:
            start = rows.start[first:last] / scale + zero
            missed[first:last] = round_coupled(wanted, start, own, mix, found, largest)
        errors = missed[first:last] * (scale / own.diagonal()[:, None])
        rest[last:].addmm_(later.T, errors, alpha=-1)
    return codes, missed


def prepared(solve: Solver, hessian: torch.Tensor, like: Rounding | None = None) -> Rounding:
    """Returns what quantizes several weights in one metric: factored once and for coupled rows, if the solver knows how.

    Args:
        solve: The solver.
        hessian: The metric.
        like: What another solver prepared in the same metric; what both have in common is not made again.
    """
    of = getattr(solve, "of", None)
    return (lambda weight, coupling=None: solve(weight, hessian)) if of is None else of(hessian, like)


def _column_order(diagonal: torch.Tensor, group_size: int, gptq: GptqConfig) -> torch.Tensor:
    """Returns in which order columns are rounded, with shape (n,)."""
    if gptq.desc_act:
        return torch.argsort(diagonal, descending=True, stable=True)
    columns = torch.arange(len(diagonal), device=diagonal.device)
    whole = len(diagonal) // group_size
    if not gptq.act_group_aware or not whole:
        return columns
    cut = whole * group_size
    values, inside = diagonal[:cut].view(whole, group_size).sort(dim=1, descending=True, stable=True)
    groups = torch.argsort(values[:, 0], descending=True, stable=True)
    return torch.cat([columns[:cut].view(whole, group_size).gather(1, inside)[groups].flatten(), columns[cut:]])


class Feedback(NamedTuple):
    """U of the text above, by rows; only its reverse is kept, L⁻¹, lower triangular.

    Hessians of wide layers are the largest matrices there are: beside H there is one more of its size, in which the factor
    is computed and inverted.

    Attributes:
        inverse: L⁻¹, with shape (n, n), where H in reversed order is L Lᵀ.
    """

    inverse: torch.Tensor

    @classmethod
    def of(
        cls, hessian: torch.Tensor, size: torch.Tensor, order: torch.Tensor, damp_percent: float, dtype: torch.dtype
    ) -> tuple[Feedback, float]:
        """Factors H.

        Args:
            hessian: H with shape (n, n).
            size: What it is divided by, its mean diagonal; if not positive, H counts as the identity.
            order: In which order columns are rounded.
            damp_percent: Share of the mean diagonal added to it; doubled until there is a factor.
            dtype: In which to work.

        Returns:
            The feedback, and the damping.

        Raises:
            NumericsError: No damping below 1 helped.
        """
        back, damp = order.flip(0), damp_percent
        while damp < 1:
            metric = hessian[back[:, None], back].to(dtype)
            metric = metric.div_(size) if size > 0 else torch.eye(len(metric)).to(metric)
            metric.diagonal().add_(damp)
            factor, exists = cholesky_(metric)
            if exists:
                return cls(invert_lower_(factor)), damp
            damp = 2 * damp
        raise NumericsError(
            f"a {tuple(hessian.shape)} Hessian stayed indefinite with damp_percent {damp / 2:g}; wanted a covariance"
        )

    def pivots(self, first: int, last: int) -> torch.Tensor:
        """Returns U's diagonal from `first` to before `last`, with shape (columns, 1)."""
        end = len(self.inverse)
        return self.inverse.diagonal()[end - last : end - first].flip(0)[:, None]

    def rows(self, first: int, last: int, until: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns U's rows from `first` to before `last`: the columns of the same numbers, and those behind.

        Columns from `until` on are left out.
        """
        end = len(self.inverse)
        own = self.inverse[end - last : end - first, end - (until or end) : end - first].flip(0, 1)
        return own[:, : last - first], own[:, last - first :]


def _grid(columns: torch.Tensor, largest: int, sym: bool, norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses scale and zero of a group for every row of the weight.

    Args:
        columns: The group, transposed, with shape (columns, m).
        largest: Largest code.
        sym: Whether the zero stays in the middle.
        norm: Exponent of the error to be small; 0 takes the full range.

    Returns:
        Scales of float16 precision and integral zeros, with shape (m,).
    """
    low, high = columns.amin(dim=0).clamp_max(0), columns.amax(dim=0).clamp_min(0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    empty = low == high
    low, high = torch.where(empty, -1, low), torch.where(empty, 1, high)
    require_finite(((high - low) / largest).half(), "scales stored as float16")
    shrinks = columns.new_tensor(SHRINKS if norm else SHRINKS[:1])[:, None]
    scales = ((high - low) * (shrinks / largest)).half().to(columns).clamp_min_(SMALLEST)
    zeros = _zeros(-low * shrinks / scales, largest, sym)
    scales = scales.repeat(len(zeros) // len(scales), 1)
    if len(scales) == 1:
        return scales[0], zeros[0]
    best = grid_errors(columns, scales, zeros, largest, norm or 2).argmin(dim=0, keepdim=True)
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def _zeros(ideal: torch.Tensor, largest: int, sym: bool) -> torch.Tensor:
    """Returns which zeros to try, with shape (n, m), or (2 n, m): with four codes, one more above or below counts."""
    if sym:
        return torch.full_like(ideal, (largest + 1) / 2)
    if largest > 3:
        return ideal.round().clamp_(0, largest)
    return torch.cat([ideal.floor(), ideal.ceil()]).clamp_(0, largest)
