# SPDX-License-Identifier: Apache-2.0
"""The loops that rounding spends its time in: column after column, a few operations each.

Columns depend on each other and rows do not, so there is little to do at a time: with torch, calling an operation takes
longer than the operation. On the CPU the loops are compiled (`compiled.py`), elsewhere they are torch's. Both do the same
in the same order, up to how products are rounded.

Everything is transposed, with shape (columns, m), so that a column is contiguous, and in units of codes, t = w / s + z.
"""

from __future__ import annotations

from types import ModuleType

import torch


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
    if loops := _loops_for(wanted, codes, errors):
        loops.round_columns(wanted.numpy(), upper.contiguous().numpy(), codes.numpy(), errors.numpy(), largest)
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
    if loops := _loops_for(codes, force, moved):
        loops.descend_columns(codes.numpy(), force.numpy(), block.contiguous().numpy(), moved.numpy(), largest)
        return moved
    columns = zip(codes.unbind(), force.unbind(), moved.unbind(), block.diagonal().tolist(), strict=True)
    for column, (code, pull, change, own) in enumerate(columns):
        torch.add(code, pull, alpha=-1 / own, out=change).round_().clamp_(0, largest).sub_(code)
        code.add_(change)
        force[column + 1 :].addr_(block[column, column + 1 :], change)
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
    loops = _loops_for(columns, scales, zeros, errors) if norm == 2 else None
    if loops:
        loops.grid_errors(columns.numpy(), scales.numpy(), zeros.numpy(), errors.numpy(), largest)
        return errors
    for scale, zero, error in zip(scales, zeros, errors, strict=True):
        steps = columns / scale + zero
        missed = steps.round().clamp_(0, largest).sub_(steps).abs_().pow_(norm)
        torch.mul(missed.sum(dim=0), scale**norm, out=error)
    return errors


def _loops_for(*matrices: torch.Tensor) -> ModuleType | None:
    """Returns the compiled loops if these matrices are on the CPU, else None."""
    if any(matrix.device.type != "cpu" for matrix in matrices):
        return None
    from lord_quant import compiled

    return compiled
