# SPDX-License-Identifier: Apache-2.0
"""The loops that rounding spends its time in: column after column, a few operations each.

Columns depend on each other and rows do not, so there is little to do at a time: with torch, calling an operation takes
longer than the operation. On the CPU the loops are compiled (`compiled.py`), elsewhere they are torch's. Both do the same
in the same order, up to how products are rounded.

Everything is transposed, with shape (columns, m), so that a column is contiguous, and in units of codes, t = w / s + z.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    import numpy as np


def round_columns(wanted: torch.Tensor, upper: torch.Tensor, codes: torch.Tensor, largest: int) -> torch.Tensor:
    """Rounds a few columns one after the other, each error passed on to the later ones: t_k −= e_j U_jk / U_jj.

    Args:
        wanted: t, what they should be, with shape (columns, m), float32 or float64; overwritten.
        upper: U for these columns, upper triangular, with shape (columns, columns).
        codes: Where the codes go, 0 to `largest`, with the shape and dtype of `wanted`.
        largest: Largest code.

    Returns:
        e, with shape (columns, m): by how much each column misses what it should have been when its turn came.
    """
    errors = torch.empty_like(wanted)
    if _on_cpu(wanted):
        _loops().round_columns(*_arrays(wanted, upper.contiguous(), codes, errors), largest)
        return errors
    columns = zip(wanted.unbind(), codes.unbind(), errors.unbind(), upper.diagonal().tolist(), strict=True)
    for column, (goal, code, error, pivot) in enumerate(columns):
        torch.round(goal, out=code).clamp_(0, largest)
        torch.sub(goal, code, out=error)
        wanted[column + 1 :].addr_(upper[column, column + 1 :], error, alpha=-1 / pivot)
    return errors


def descend_columns(codes: torch.Tensor, force: torch.Tensor, block: torch.Tensor, largest: int) -> torch.Tensor:
    """Moves a few columns one after the other to their optimum, all others fixed: q_j − r_j / H_jj, rounded.

    Args:
        codes: q, with shape (columns, m), float32 or float64; overwritten.
        force: r = (Ŵ − W) H in units of codes, with the same shape; overwritten: it follows inside these columns.
        block: H between these columns, symmetric, with shape (columns, columns).
        largest: Largest code.

    Returns:
        By how much each code moved, with shape (columns, m).
    """
    moved = torch.empty_like(force)
    if _on_cpu(codes):
        _loops().descend_columns(*_arrays(codes, force, block.contiguous(), moved), largest)
        return moved
    columns = zip(codes.unbind(), force.unbind(), moved.unbind(), block.diagonal().tolist(), strict=True)
    for column, (code, pull, change, own) in enumerate(columns):
        torch.add(code, pull, alpha=-1 / own, out=change).round_().clamp_(0, largest).sub_(code)
        code.add_(change)
        force[column + 1 :].addr_(block[column, column + 1 :], change)
    return moved


def round_coupled(
    wanted: torch.Tensor,
    start: torch.Tensor,
    upper: torch.Tensor,
    mix: torch.Tensor,
    codes: torch.Tensor,
    largest: int,
) -> torch.Tensor:
    """Does what `round_columns` does to rows that are coupled, one row after the other in each column; on the CPU only.

    Args:
        wanted: t, as there.
        start: What these columns were before any was rounded, in units of codes, with the same shape.
        upper: As there.
        mix: `Coupling.on_later`, with shape (m, m).
        codes: As there.
        largest: Largest code.

    Returns:
        By how much each code misses what it should have been when its turn came.
    """
    errors = torch.empty_like(wanted)
    _loops().round_coupled(*_arrays(wanted, start, upper.contiguous(), mix, codes, errors), largest)
    return errors


def descend_coupled(
    codes: torch.Tensor, force: torch.Tensor, block: torch.Tensor, mix: torch.Tensor, largest: int
) -> torch.Tensor:
    """Does what `descend_columns` does to rows that are coupled, one row after the other in each column; on the CPU only.

    Args:
        codes: q, as there.
        force: r, as there: what every row's own errors pull.
        block: As there.
        mix: `Coupling.on_others`, with shape (m, m).
        largest: Largest code.

    Returns:
        By how much each code moved.
    """
    moved = torch.empty_like(force)
    _loops().descend_coupled(*_arrays(codes, force, block.contiguous(), mix, moved), largest)
    return moved


def grid_errors(
    columns: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, largest: int, norm: float = 2.0
) -> torch.Tensor:
    """Returns what rounding to the nearest costs on several grids, Σ |w − s (q − z)|^norm over a group's columns.

    Args:
        columns: w, with shape (columns, m), float32 or float64.
        scales: s of every grid, with shape (grids, m).
        zeros: z of every grid, with the same shape.
        largest: Largest code.
        norm: The exponent.

    Returns:
        Costs with shape (grids, m).
    """
    errors = torch.empty_like(scales)
    if _on_cpu(columns) and norm == 2:
        _loops().grid_errors(*_arrays(columns, scales, zeros, errors), largest)
        return errors
    for scale, zero, error in zip(scales, zeros, errors, strict=True):
        steps = columns / scale + zero
        missed = steps.round().clamp_(0, largest).sub_(steps).abs_().pow_(norm)
        torch.mul(missed.sum(dim=0), scale**norm, out=error)
    return errors


def _on_cpu(matrix: torch.Tensor) -> bool:
    return matrix.device.type == "cpu"


def _loops() -> ModuleType:
    from lord_quant import compiled  # numba takes a while to import, and not every command rounds

    return compiled


def _arrays(*matrices: torch.Tensor) -> list[np.ndarray]:
    """Returns the same memory as numba is given it; loops are fast on what is contiguous and right on what is not."""
    return [matrix.numpy() for matrix in matrices]
