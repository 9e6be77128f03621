# SPDX-License-Identifier: Apache-2.0
"""The modules that stand where a linear layer stood."""

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


class PivotedLinear(nn.Module):
    """Two plain linear layers, the second of which only predicts what the first does not already compute.

    `down` computes r of the outputs themselves (the pivots), `up` predicts the others from them, and `order` puts both
    in place: y = [z, up(z)][order] with z = down(x). The same maps as `LowRankLinear` of that rank, with r² weights fewer
    (PIFA, arXiv 2501.19090).

    Args:
        in_features: Input features.
        rank: Number of pivots r, below `out_features`.
        out_features: Output features.
        bias: Whether both layers have a bias.
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
        self.down = nn.Linear(in_features, rank, bias=bias, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features - rank, bias=bias, device=device, dtype=dtype)
        # 2 bytes an output wherever they can say which; indexing wants int32 and casts on the way.
        self.order: torch.Tensor
        self.register_buffer("order", torch.zeros(out_features, dtype=order_dtype(out_features), device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        z = self.down(x)
        return torch.cat((z, self.up(z)), dim=-1).index_select(-1, self.order.int())


def order_dtype(out_features: int) -> torch.dtype:
    """Returns the smallest integer dtype that indexes `out_features` outputs."""
    return torch.int16 if out_features <= torch.iinfo(torch.int16).max + 1 else torch.int32
