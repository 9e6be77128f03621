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
    """Does what `kernels.round_coupled` does; `errors` is filled."""
    columns, height = wanted.shape
    least, most = wanted.dtype.type(0), wanted.dtype.type(largest)
    taken = np.empty(height, wanted.dtype)
    for j in range(columns):
        goal, code, error = wanted[j], codes[j], errors[j]
        taken[:] = least
        for i in range(height):
            due = goal[i] - taken[i]
            code[i] = np.rint(min(max(due, least), most))
            error[i] = due - code[i]
            missed, share = code[i] - start[j, i], mix[i]
            for later in range(i + 1, height):
                taken[later] += share[later] * missed
        for k in range(j + 1, columns):
            share, later = upper[j, k] / upper[j, j], wanted[k]
            for i in range(height):
                later[i] -= share * error[i]


@_compiled
def descend_coupled(
    codes: np.ndarray, force: np.ndarray, block: np.ndarray, mix: np.ndarray, moved: np.ndarray, largest: int
) -> None:
    """Does what `kernels.descend_coupled` does; `moved` is filled."""
    columns, height = codes.shape
    least, most = codes.dtype.type(0), codes.dtype.type(largest)
    pulls = np.empty(height, codes.dtype)
    for j in range(columns):
        code, pull, change = codes[j], force[j], moved[j]
        own = block[j, j]
        unit = codes.dtype.type(1) / own
        pulls[:] = least
        for other in range(height):
            share, much = mix[other], pull[other]
            for i in range(height):
                pulls[i] += share[i] * much
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
