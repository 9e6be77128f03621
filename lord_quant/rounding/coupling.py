# SPDX-License-Identifier: Apache-2.0
"""How errors of rows that are quantized together add up: errors D of m rows cost tr S D H Dᵀ.

In one column, with S = V Vᵀ and V upper triangular, that is Σ_k (Vᵀ D)_k²: the first row counts alone, the second beside
what the first has missed, and so on. So what row k should be moves by

    − Σ_{i<k} (V_ik / V_kk) d_i

before it is rounded; and once all are rounded, the pull on row k is Σ_i (S_ik / S_kk) (D H)_i. Rows have scales s of their
own: in units of codes both matrices get factors s_i / s_k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Coupling(NamedTuple):
    """The metric of a few rows.

    Attributes:
        root: V, with shape (m, m).
        metric: S, with shape (m, m).
        shares: V_ik / V_kk, with shape (m, m), contiguous.
        pulls: S_ik / S_kk, likewise.
    """

    root: torch.Tensor
    metric: torch.Tensor
    shares: torch.Tensor
    pulls: torch.Tensor

    @classmethod
    def of(cls, upper: torch.Tensor) -> Coupling:
        """Takes the metric from its inverse UᵀU, U upper triangular, with shape (m, m)."""
        root = torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)
        metric = root @ root.T
        return cls(root, metric, *((each / each.diagonal()).contiguous() for each in (root, metric)))

    def moves(self, errors: torch.Tensor) -> torch.Tensor:
        """Returns by how much what every row should be has moved when its turn comes, given all errors, (columns, m)."""
        return errors @ (self.root / self.root.diagonal()).triu(1)

    def on_later(self, scale: torch.Tensor) -> torch.Tensor:
        """Returns by how much an error of row i moves row k, at (i, k), in units of codes, which have shape (m,)."""
        return self.shares * (scale[:, None] / scale)

    def on_others(self, scale: torch.Tensor) -> torch.Tensor:
        """Returns by how much an error of row i pulls at row k, at (i, k), over what one of its own does."""
        return self.pulls * (scale[:, None] / scale)
