# SPDX-License-Identifier: Apache-2.0
"""The loops that rounding spends its time in: column after column, a few operations each.

Columns depend on each other and rows do not, so there is little to do at a time: with torch, calling an operation takes
longer than the operation, and starting it on a GPU longer still. So the loops are compiled for the processor
(`compiled.py`) and run there wherever the matrices are: some columns are copied there and back in less time than it takes
to start kernels for each of them. All products around them stay on the device.

Everything is transposed, with shape (columns, m), so that a column is contiguous, and in units of codes, t = w / s + z.
"""

from __future__ import annotations

from types import ModuleType

import torch


def round_columns(wanted: torch.Tensor, upper: torch.Tensor, codes: torch.Tensor, largest: int) -> torch.Tensor:
    """Rounds a few columns one after the other, each error passed on to the later ones: t_k −= e_j U_jk / U_jj.

    Args:
        wanted: t, what they should be, with shape (columns, m), float32 or float64; may be overwritten.
        upper: U for these columns, upper triangular, with shape (columns, columns).
        codes: Where the codes go, 0 to `largest`, with the shape and dtype of `wanted`.
        largest: Largest code.

    Returns:
        e, with shape (columns, m): by how much each column misses what it should have been when its turn came.
    """
    goal, factor, found = _on_host(wanted, upper.contiguous(), codes)
    errors = torch.empty_like(goal)
    _loops().round_columns(goal.numpy(), factor.numpy(), found.numpy(), errors.numpy(), largest)
    return _brought_back(errors, found, codes)


def descend_columns(codes: torch.Tensor, force: torch.Tensor, block: torch.Tensor, largest: int) -> torch.Tensor:
    """Moves a few columns one after the other to their optimum, all others fixed: q_j − r_j / H_jj, rounded.

    Args:
        codes: q, with shape (columns, m), float32 or float64; overwritten.
        force: r = (Ŵ − W) H in units of codes, with the same shape; may be overwritten.
        block: H between these columns, symmetric, with shape (columns, columns).
        largest: Largest code.

    Returns:
        By how much each code moved, with shape (columns, m).
    """
    found, pull, metric = _on_host(codes, force, block.contiguous())
    moved = torch.empty_like(pull)
    _loops().descend_columns(found.numpy(), pull.numpy(), metric.numpy(), moved.numpy(), largest)
    return _brought_back(moved, found, codes)


def round_coupled(
    wanted: torch.Tensor,
    start: torch.Tensor,
    upper: torch.Tensor,
    mix: torch.Tensor,
    codes: torch.Tensor,
    largest: int,
) -> torch.Tensor:
    """Does what `round_columns` does to rows that are coupled, one row after the other in each column.

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
    goal, first, factor, shares, found = _on_host(wanted, start, upper.contiguous(), mix, codes)
    errors = torch.empty_like(goal)
    _loops().round_coupled(
        goal.numpy(), first.numpy(), factor.numpy(), shares.numpy(), found.numpy(), errors.numpy(), largest
    )
    return _brought_back(errors, found, codes)


def descend_coupled(
    codes: torch.Tensor, force: torch.Tensor, block: torch.Tensor, mix: torch.Tensor, largest: int
) -> torch.Tensor:
    """Does what `descend_columns` does to rows that are coupled, one row after the other in each column.

    Args:
        codes: q, as there.
        force: r, as there: what every row's own errors pull.
        block: As there.
        mix: `Coupling.on_others`, with shape (m, m).
        largest: Largest code.

    Returns:
        By how much each code moved.
    """
    found, pull, metric, shares = _on_host(codes, force, block.contiguous(), mix)
    moved = torch.empty_like(pull)
    _loops().descend_coupled(found.numpy(), pull.numpy(), metric.numpy(), shares.numpy(), moved.numpy(), largest)
    return _brought_back(moved, found, codes)


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
    if norm == 2:
        values, sizes, middles = _on_host(columns, scales, zeros)
        costs = torch.empty_like(sizes)
        _loops().grid_errors(values.numpy(), sizes.numpy(), middles.numpy(), costs.numpy(), largest)
        return costs.to(columns.device)
    errors = torch.empty_like(scales)
    for scale, zero, error in zip(scales, zeros, errors, strict=True):
        steps = columns / scale + zero
        missed = steps.round().clamp_(0, largest).sub_(steps).abs_().pow_(norm)
        torch.mul(missed.sum(dim=0), scale**norm, out=error)
    return errors


def _loops() -> ModuleType:
    from lord_quant.rounding import compiled  # numba takes a while to import, and not every command rounds

    return compiled


def _on_host(*matrices: torch.Tensor) -> list[torch.Tensor]:
    """Returns matrices in the host's memory: those that are there themselves, of others copies.

    Loops are fast on what is contiguous and right on what is not.
    """
    return [matrix.cpu() for matrix in matrices]


def _brought_back(made: torch.Tensor, found: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Writes codes into where they belong, if they were found in a copy, and returns what else was made on their device."""
    if found is not codes:
        codes.copy_(found)
    return made.to(codes.device)
