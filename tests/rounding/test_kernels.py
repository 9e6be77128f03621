# SPDX-License-Identifier: Apache-2.0
"""The loops over columns: against one value at a time, and against the same written with torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_quant.rounding.coupling import Coupling
from lord_quant.rounding.kernels import descend_columns, descend_coupled, grid_errors, round_columns, round_coupled


F64 = torch.float64
HEIGHTS = (1, 3, 63, 64, 65, 200)
"""Around the rows that are done at a time."""
problems = given(
    columns=st.integers(1, 40),
    height=st.sampled_from(HEIGHTS),
    bits=st.sampled_from([2, 3, 4, 8]),
    seed=st.integers(0, 2**16),
)


def values(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def covariance(size: int, seed: int) -> torch.Tensor:
    seen = values(size, 2 * size, seed=seed)
    return seen @ seen.T / (2 * size) + 0.1 * torch.eye(size, dtype=F64)


@problems
@settings(max_examples=25, deadline=None)
def test_rounding_is_what_one_value_at_a_time_gives(columns: int, height: int, bits: int, seed: int) -> None:
    largest = 2**bits - 1
    wanted = values(columns, height, seed=seed, scale=largest / 2) + largest / 2
    upper = torch.linalg.cholesky(covariance(columns, seed)).T.contiguous()
    row = seed % height
    rest, codes, errors = wanted[:, row].tolist(), [], []
    for j in range(columns):
        codes.append(float(min(max(round(rest[j]), 0), largest)))  # Python rounds halves to even, as torch does
        errors.append(rest[j] - codes[j])
        for k in range(j + 1, columns):
            rest[k] -= errors[j] * float(upper[j, k]) / float(upper[j, j])
    found = torch.empty_like(wanted)
    missed = round_columns(wanted.clone(), upper, found, largest)
    assert found[:, row].tolist() == codes
    torch.testing.assert_close(missed[:, row], torch.tensor(errors, dtype=F64), rtol=0, atol=1e-9)


@problems
@settings(max_examples=25, deadline=None)
def test_descent_takes_each_column_to_its_optimum(columns: int, height: int, bits: int, seed: int) -> None:
    """Against the best of all codes of every column, in the order of columns; force follows what moved."""
    largest, metric = 2**bits - 1, covariance(columns, seed)
    target = values(columns, height, seed=seed + 1, scale=largest / 2) + largest / 2
    start = target.round().clamp(0, largest)
    best = start.clone()
    choices = torch.arange(largest + 1, dtype=F64)
    for j in range(columns):
        others = metric[j] @ (best - target) - metric[j, j] * (best[j] - target[j])
        cost = metric[j, j] * (choices[:, None] - target[j]) ** 2 + 2 * (choices[:, None] - target[j]) * others
        best[j] = choices[cost.argmin(dim=0)]
    codes, force = start.clone(), metric @ (start - target)
    moved = descend_columns(codes, force, metric, largest)
    assert torch.equal(codes, best) and torch.equal(moved, best - start)


coupled_problems = given(
    columns=st.integers(1, 12), rows=st.integers(1, 20), bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 2**16)
)


def coupling_of(rows: int, seed: int) -> tuple[Coupling, torch.Tensor]:
    """A coupling and its metric, and what its rows' scales are."""
    metric = covariance(rows, seed)
    upper = torch.linalg.cholesky(torch.linalg.inv(metric)).T
    coupling = Coupling.of(upper)
    torch.testing.assert_close(coupling.metric, metric, rtol=1e-8, atol=1e-8)
    return coupling, values(rows, seed=seed + 3).abs() + 0.3


@coupled_problems
@settings(max_examples=40, deadline=None)
def test_what_coupled_rows_miss_is_what_they_cost(columns: int, rows: int, bits: int, seed: int) -> None:
    """tr S D H Dᵀ is the sum of squares of what every code missed, in the units of its row and column, to the last bit
    of it: LDLᵀ on both sides."""
    largest, metric = 2**bits - 1, covariance(columns, seed)
    coupling, scale = coupling_of(rows, seed + 1)
    weight = scale * values(columns, rows, seed=seed, scale=largest / 2)
    upper = torch.linalg.cholesky(torch.linalg.inv(metric)).T.contiguous()
    start, codes = weight / scale + largest // 2, torch.empty_like(weight)
    missed = round_coupled(start.clone(), start, upper, coupling.on_later(scale), codes, largest)
    error = scale * (codes - largest // 2) - weight
    assert torch.equal(codes, codes.round().clamp(0, largest))
    cost = ((error @ coupling.metric) * (metric @ error)).sum()
    parts = missed * scale * coupling.root.diagonal() / upper.diagonal()[:, None]
    torch.testing.assert_close(parts.square().sum(), cost, rtol=1e-8, atol=1e-8)
    alone = torch.empty_like(weight)
    first = round_columns(start.clone(), upper, alone, largest)
    torch.testing.assert_close(missed[:, 0], first[:, 0])  # the first row knows of no other
    torch.testing.assert_close(codes[:, 0], alone[:, 0])


@pytest.mark.parametrize("rows", [1, 7, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rows_at_a_time_change_no_bit_of_coupled_rounding(rows: int, dtype: torch.dtype) -> None:
    """Against one row after the other in one column after the other, all that is known of both taken into account."""
    columns, largest, metric = 9, 7, covariance(9, rows)
    coupling, scale = coupling_of(rows, rows + 1)
    upper = torch.linalg.cholesky(torch.linalg.inv(metric)).T.contiguous().to(dtype)
    start = (3 + 2 * values(columns, rows, seed=rows)).to(dtype)
    mix = coupling.on_later(scale).to(dtype)
    wanted, codes, missed = start.clone(), torch.empty_like(start), torch.empty_like(start)
    for j in range(columns):
        taken = torch.zeros(rows, dtype=dtype)
        for i in range(rows):
            due = wanted[j, i] - taken[i]
            codes[j, i] = due.round().clamp(0, largest)
            missed[j, i] = due - codes[j, i]
            taken[i + 1 :] += mix[i, i + 1 :] * (codes[j, i] - start[j, i])
        for k in range(j + 1, columns):
            wanted[k] -= (upper[j, k] / upper[j, j]) * missed[j]
    found = torch.empty_like(start)
    assert torch.equal(round_coupled(start.clone(), start, upper, mix, found, largest), missed)
    assert torch.equal(found, codes)


@coupled_problems
@settings(max_examples=40, deadline=None)
def test_coupled_descent_takes_each_code_to_its_optimum(columns: int, rows: int, bits: int, seed: int) -> None:
    """Against the best of all codes at every place, column by column and row by row."""
    largest, metric = 2**bits - 1, covariance(columns, seed)
    coupling, scale = coupling_of(rows, seed + 1)
    target = values(columns, rows, seed=seed, scale=largest / 2) + largest / 2
    start = target.round().clamp(0, largest)
    best, choices = start.clone(), torch.arange(largest + 1, dtype=F64)
    for j in range(columns):
        for i in range(rows):
            tried = best.repeat(largest + 1, 1, 1)
            tried[:, j, i] = choices
            error = (tried - target) * scale
            costs = ((error @ coupling.metric) * (metric @ error)).sum(dim=(1, 2))
            if costs.min() < costs[int(best[j, i])] * (1 - 1e-9):
                best[j, i] = choices[costs.argmin()]
    codes = start.clone()
    moved = descend_coupled(codes, metric @ (start - target), metric, coupling.on_others(scale), largest)
    assert torch.equal(codes, best) and torch.equal(moved, best - start)


@problems
@settings(max_examples=25, deadline=None)
def test_grids_cost_the_distance_to_what_they_hold(columns: int, height: int, bits: int, seed: int) -> None:
    largest, grids = 2**bits - 1, 5
    weight = values(columns, height, seed=seed)
    scales = values(grids, height, seed=seed + 1).abs() + 0.05
    zeros = values(grids, height, seed=seed + 2, scale=largest).round().clamp(0, largest)
    held = scales[:, None] * (torch.arange(largest + 1, dtype=F64)[:, None] - zeros[:, None])  # (grids, codes, m)
    nearest = (weight[None, :, None] - held[:, None]).abs().amin(dim=2)
    for norm in (2.0, 2.4):
        wanted = nearest.pow(norm).sum(dim=1)
        torch.testing.assert_close(grid_errors(weight, scales, zeros, largest, norm), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rounding_keeps_the_dtype_and_does_what_torch_does(dtype: torch.dtype) -> None:
    wanted, upper = (7 + 3 * values(32, 300, seed=0)).to(dtype), torch.linalg.cholesky(covariance(32, 0)).T.to(dtype)
    codes, rest = torch.empty_like(wanted), wanted.clone()
    errors = round_columns(wanted.clone(), upper, codes, 15)
    assert errors.dtype == codes.dtype == dtype
    agreed = []
    for column, goal in enumerate(rest):
        code = goal.round().clamp(0, 15)
        rest[column + 1 :] -= (upper[column, column + 1 :] / upper[column, column]).outer(goal - code)
        agreed.append(code == codes[column])
    assert torch.stack(agreed).double().mean() > 0.999  # a tie may go either way in float32


def test_what_is_not_contiguous_is_written_into_as_well() -> None:
    upper = torch.linalg.cholesky(covariance(8, 0)).T
    wanted = 7 + 3 * values(8, 5, seed=0)
    codes, spread = torch.empty(8, 5, dtype=F64), torch.empty(8, 10, dtype=F64)
    missed = round_columns(wanted.clone(), upper, codes, 15)
    assert torch.equal(round_columns(wanted.clone(), upper, spread[:, ::2], 15), missed)
    assert torch.equal(spread[:, ::2], codes)


ROUND_SIX = (
    "import torch; from lord_quant.rounding.kernels import round_columns; codes = torch.empty(2, 3); "
    "wanted, upper = torch.tensor([[1.4] * 3, [1.6] * 3]), torch.tensor([[1.0, 0.5], [0.0, 1.0]]); "
    "round_columns(wanted, upper, codes, 3); print(codes.tolist())"
)


def require_rounding(code: str, **environment: str) -> None:
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert (ran.stderr, ran.stdout.strip()) == ("", "[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]")


def test_nowhere_to_keep_what_was_compiled() -> None:
    """Every process compiles for itself then; numba refuses to keep anything if it is told of no place."""
    require_rounding(ROUND_SIX, NUMBA_CACHE_LOCATOR_CLASSES="ZipCacheLocator")


def test_no_room_to_keep_what_was_compiled(tmp_path: Path) -> None:
    """The place is there, but files may not grow, as on a full disk."""
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
    require_rounding(limited + ROUND_SIX, NUMBA_CACHE_DIR=str(tmp_path))
    assert not [file for file in tmp_path.rglob("*.nbc") if file.stat().st_size]
    require_rounding(ROUND_SIX, NUMBA_CACHE_DIR=str(tmp_path))
    assert list(tmp_path.rglob("*.nbc"))
