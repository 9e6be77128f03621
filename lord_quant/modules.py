# SPDX-License-Identifier: Apache-2.0
"""The module that stands where a linear layer stood."""

from __future__ import annotations

import torch
from torch import nn


class LowRankLinear(nn.Module):
    """Two plain linear layers in a row: y = up(down(x)).

    Both are exactly `nn.Linear`, because host quantizers find layers by exact type, and `down` is registered before `up`,
    because they quantize in registration order and `up` must see the outputs of the quantized `down`. There are no
    properties: hosts evaluate every attribute when they replace layers.

    Args:
        in_features: Input features.
        rank: Width of the bottleneck.
        out_features: Output features.
        bias: Whether `up` has a bias; `down` never has one.
    """

    def __init__(
        self,
        in_features: int,
        rank: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return self.up(self.down(x))
