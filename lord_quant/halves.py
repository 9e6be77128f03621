# SPDX-License-Identifier: Apache-2.0
"""Products of which one half is known beforehand: of triangular matrices, and those that come out symmetric.

Wide ones are multiplied block by block, and blocks below the diagonal are left out: with p blocks a side (p + 1) / 2p of
the operations remain. Libraries have kernels for that (trmm, syrk), torch does not offer them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch


SPLIT_FEATURES = 512
"""From this width on, multiplying half a product beats multiplying all of it at once."""
BLOCK = 1024
"""Width of the blocks of wide products; those of others are narrower, four a side. Narrow ones run below a processor's
speed."""


def num_blocks(size: int) -> int:
    """Returns into how many blocks a side is cut."""
    return 1 if size < SPLIT_FEATURES else max(4, size // BLOCK)


def share_left(size: int) -> float:
    """Returns the share of the operations that is left."""
    count = num_blocks(size)
    return (count + 1) / (2 * count)


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds XᵀX in place, X with shape (k, n)."""
    add_symmetric(total, rows.T, rows)


def add_symmetric(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds A B in place, with shape (n, n), which is known to be symmetric: blocks below the diagonal are mirrored."""
    if num_blocks(len(total)) == 1:
        total += left @ right
        return
    for start, stop in _blocks(len(total)):
        upper = left[start:stop] @ right[:, start:]
        total[start:stop, start:] += upper
        total[stop:, start:stop] += upper[:, stop - start :].T


def symmetric_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns A B, which is known to be symmetric."""
    total = left.new_zeros(len(left), len(left))
    add_symmetric(total, left, right)
    return total


def upper_product(upper: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns U R with U upper triangular, with shape (n, n), and R with shape (n, k)."""
    found = torch.empty_like(right)
    for start, stop in _blocks(len(upper)):
        found[start:stop] = upper[start:stop, start:] @ right[start:]
    return found


def seen_through(rows: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Returns X H Xᵀ with shape (m, m), X with shape (m, n) and H symmetric."""
    half = rows.new_zeros(len(rows), len(rows))
    for columns, seen in _half_seen(rows, covariance):
        half += seen @ columns.T
    return half + half.T


def energy(rows: torch.Tensor, covariance: torch.Tensor, outputs: torch.Tensor | None = None) -> float:
    """Returns tr G X H Xᵀ, blocks added up in float64, X with shape (m, n), H and G symmetric; G = I if it is None."""
    found = 0.0
    if outputs is None:
        for part in rows.split(BLOCK):  # not all rows at once, which would be a copy more
            for columns, seen in _half_seen(part, covariance):
                found += 2 * float(seen.mul_(columns).sum(dtype=torch.float64))
        return found
    seen = rows @ covariance
    for start, stop in _blocks(len(rows)):
        weighed = (seen[start:stop] @ rows[start:].T).mul_(outputs[start:stop, start:])
        whole, own = (float(part.sum(dtype=torch.float64)) for part in (weighed, weighed[:, : stop - start]))
        found += 2 * whole - own
    return found


def _half_seen(rows: torch.Tensor, covariance: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields blocks of columns of X, and the same of X U, where U + Uᵀ = H and U is upper triangular but for its blocks."""
    for start, stop in _blocks(len(covariance)):
        columns, own = rows[:, start:stop], covariance[start:stop, start:stop]
        yield columns, torch.addmm(rows[:, :start] @ covariance[:start, start:stop], columns, own, alpha=0.5)


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    count = num_blocks(size)
    return itertools.pairwise(size * part // count for part in range(count + 1))
