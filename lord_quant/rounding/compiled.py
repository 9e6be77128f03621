# SPDX-License-Identifier: Apache-2.0
"""The loops of `kernels.py` as numba compiles them for the CPU, once per machine; imported when they are first needed.

The result is kept beside this file, or in the user's cache folder where that cannot be written. Arrays are C-contiguous and
of one dtype, float32 or float64. The innermost loops run over rows, which do not depend on each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit


TILE = 64
"""Rows at a time: 64 columns of them are 16 kB and stay in the fastest cache."""
COUPLED_TILE = 16
"""Rows at a time that hear of each other at once."""


def _compiled(loop: Callable[..., None]) -> Any:
    try:
        kept = njit(cache=True, nogil=True)(loop)
    except RuntimeError:  # nothing can be written anywhere: every process compiles for itself
        return njit(nogil=True)(loop)

    @functools.wraps(loop)
    def run(*arguments: Any) -> None:
        try:
            kept(*arguments)
        except OSError:  # it was compiled but could not be written, the disk is full: it has not run, and is there now
            kept(*arguments)

    return run


@_compiled
def round_columns(wanted: np.ndarray, upper: np.ndarray, codes: np.ndarray, errors: np.ndarray, largest: int) -> None:
    """Does what `kernels.round_columns` does; `errors` is filled."""
    columns, height = wanted.shape
    least, most = wanted.dtype.type(0), wanted.dtype.type(largest)
    for begin in range(0, height, TILE):
        end = min(begin + TILE, height)
        for j in range(columns):
            goal, code, error = wanted[j, begin:end], codes[j, begin:end], errors[j, begin:end]
            for i in range(len(goal)):
                code[i] = np.rint(min(max(goal[i], least), most))
                error[i] = goal[i] - code[i]
            for k in range(j + 1, columns):
                share, later = upper[j, k] / upper[j, j], wanted[k, begin:end]
                for i in range(len(later)):
                    later[i] -= share * error[i]


@njit(nogil=True)
def _add_rows(sums: np.ndarray, rows: np.ndarray, shares: np.ndarray) -> None:
    """Adds shares of rows, in their order; several at a time, so that a sum is not written and read again for each."""
    count = len(rows)
    several = count - count % 8
    for r in range(0, several, 8):
        a, b, c, d, e, f, g, h = (
            rows[r], rows[r + 1], rows[r + 2], rows[r + 3], rows[r + 4], rows[r + 5], rows[r + 6], rows[r + 7]
        )  # fmt: skip
        of_a, of_b, of_c, of_d = shares[r], shares[r + 1], shares[r + 2], shares[r + 3]
        of_e, of_f, of_g, of_h = shares[r + 4], shares[r + 5], shares[r + 6], shares[r + 7]
        for i in range(len(sums)):
            found = sums[i] + a[i] * of_a
            found += b[i] * of_b
            found += c[i] * of_c
            found += d[i] * of_d
            found += e[i] * of_e
            found += f[i] * of_f
            found += g[i] * of_g
            sums[i] = found + h[i] * of_h
    for r in range(several, count):
        row, of_row = rows[r], shares[r]
        for i in range(len(sums)):
            sums[i] += row[i] * of_row


@_compiled
def round_coupled(
    wanted: np.ndarray,
    start: np.ndarray,
    upper: np.ndarray,
    mix: np.ndarray,
    codes: np.ndarray,
    errors: np.ndarray,
    largest: int,
) -> None:
    """Does what `kernels.round_coupled` does; `errors` is filled.

    A few rows go through all columns before the rows behind them hear of it: what those need is then added up in one go,
    all columns of a row at a time. Every value is what it would be column after column, to the last bit.
    """
    columns, height = wanted.shape
    least, most = wanted.dtype.type(0), wanted.dtype.type(largest)
    taken = np.zeros((height, columns), wanted.dtype)
    missed = np.empty((COUPLED_TILE, columns), wanted.dtype)
    gone = np.empty((columns, COUPLED_TILE), wanted.dtype)
    shares = np.empty(COUPLED_TILE, wanted.dtype)
    for begin in range(0, height, COUPLED_TILE):
        end = min(begin + COUPLED_TILE, height)
        count = end - begin
        for i in range(count):
            for j in range(columns):
                gone[j, i] = taken[begin + i, j]
        for j in range(columns):
            goal, code, error = wanted[j, begin:end], codes[j, begin:end], errors[j, begin:end]
            first, moved = start[j, begin:end], gone[j, :count]
            for i in range(count):
                due = goal[i] - moved[i]
                code[i] = np.rint(min(max(due, least), most))
                error[i] = due - code[i]
                missed[i, j] = code[i] - first[i]
                share, much = mix[begin + i, begin:end], missed[i, j]
                for k in range(i + 1, count):
                    moved[k] += share[k] * much
            for k in range(j + 1, columns):
                passed, later = upper[j, k] / upper[j, j], wanted[k, begin:end]
                for i in range(count):
                    later[i] -= passed * error[i]
        for k in range(end, height):
            for i in range(count):
                shares[i] = mix[begin + i, k]
            _add_rows(taken[k], missed[:count], shares[:count])


@_compiled
def descend_coupled(
    codes: np.ndarray, force: np.ndarray, block: np.ndarray, mix: np.ndarray, moved: np.ndarray, largest: int
) -> None:
    """Does what `kernels.descend_coupled` does; `moved` is filled."""
    columns, height = codes.shape
    least, most = codes.dtype.type(0), codes.dtype.type(largest)
    pulls = np.empty(height, codes.dtype)
    for j in range(columns):
        code, change = codes[j], moved[j]
        own = block[j, j]
        unit = codes.dtype.type(1) / own
        pulls[:] = least
        _add_rows(pulls, mix, force[j])
        for i in range(height):
            best = np.rint(min(max(code[i] - unit * pulls[i], least), most))
            change[i] = best - code[i]
            if change[i] != least:
                code[i] = best
                share, much = mix[i], own * change[i]
                for later in range(i + 1, height):
                    pulls[later] += share[later] * much
        for k in range(j + 1, columns):
            share, later = block[j, k], force[k]
            for i in range(height):
                later[i] += share * change[i]


@_compiled
def descend_columns(codes: np.ndarray, force: np.ndarray, block: np.ndarray, moved: np.ndarray, largest: int) -> None:
    """Does what `kernels.descend_columns` does; `moved` is filled."""
    columns, height = codes.shape
    least, most = codes.dtype.type(0), codes.dtype.type(largest)
    for begin in range(0, height, TILE):
        end = min(begin + TILE, height)
        for j in range(columns):
            code, pull, change = codes[j, begin:end], force[j, begin:end], moved[j, begin:end]
            unit = codes.dtype.type(1) / block[j, j]
            for i in range(len(code)):
                best = np.rint(min(max(code[i] - unit * pull[i], least), most))
                change[i] = best - code[i]
                code[i] = best
            for k in range(j + 1, columns):
                share, later = block[j, k], force[k, begin:end]
                for i in range(len(later)):
                    later[i] += share * change[i]


@_compiled
def grid_errors(columns: np.ndarray, scales: np.ndarray, zeros: np.ndarray, errors: np.ndarray, largest: int) -> None:
    """Does what `kernels.grid_errors` does for the exponent 2; `errors` is filled."""
    count, height = scales.shape
    least, most = columns.dtype.type(0), columns.dtype.type(largest)
    one = columns.dtype.type(1)
    for begin in range(0, height, TILE):
        end = min(begin + TILE, height)
        for k in range(count):
            scale, zero, error = scales[k, begin:end], zeros[k, begin:end], errors[k, begin:end]
            unit = one / scale
            error[:] = least
            for c in range(len(columns)):
                value = columns[c, begin:end]
                for i in range(len(value)):
                    step = value[i] * unit[i] + zero[i]
                    missed = np.rint(min(max(step, least), most)) - step
                    error[i] += missed * missed
            for i in range(len(error)):
                error[i] *= scale[i] * scale[i]
