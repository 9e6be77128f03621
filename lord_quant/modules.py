# SPDX-License-Identifier: Apache-2.0
"""The modules that stand where a linear layer stood."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Ordered(nn.Module):
    """What has an order of its inputs or outputs, which is stored in as few bytes as can say it.

    In memory it is int32, which indexing wants, and which processes that train together can send each other: their
    libraries know no int16.

    Args:
        features: How many inputs or outputs.
    """

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.order: torch.Tensor
        self.register_buffer("order", torch.zeros(features, dtype=torch.int32, device=device))

    def widen(self) -> None:
        """Takes an order as it was stored to what it is in memory."""
        self.order = self.order.int()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}order"] = self.order.to(order_dtype(len(self.order)))


class PivotedLinear(Ordered):
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
        super().__init__(out_features, device)
        self.down = nn.Linear(in_features, rank, bias=bias, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features - rank, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        z = self.down(x)
        return torch.cat((z, self.up(z)), dim=-1).index_select(-1, self.order.int())


class ColumnPivotedLinear(Ordered):
    """Two plain linear layers, the first of which only adds what some inputs do not already bring.

    `order` puts r of the inputs, the pivots, in front; they pass `down` by: y = up(p + down(q)), with p and q the first r
    and the other inputs of x[order]. The same maps as `LowRankLinear` of that rank, with r² weights fewer.

    Args:
        in_features: Input features.
        rank: Number of pivots r, below `in_features`.
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
        super().__init__(in_features, device)
        self.down = nn.Linear(in_features - rank, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.split = (rank, in_features - rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        pivots, others = self.order.int().split(self.split)
        return self.up(x.index_select(-1, pivots) + self.down(x.index_select(-1, others)))


class GroupedLinear(nn.Module):
    """One of several layers with the same input, which share a bottleneck: y = up(z), where z = down(x) is computed once.

    The first of them, the leader, holds `down`; all hold their own `up`. They stay separate modules, as the model calls
    them one by one, and meet in a `Bottleneck`, which is no module: `down` is registered, and stored, once.

    Args:
        bottleneck: What the group shares; the layer joins it.
        in_features: Input features, for the leader; None for the others.
        rank: Width of the bottleneck.
        out_features: Output features.
        bias: Whether `up` has a bias; `down` never has one.
    """

    def __init__(
        self,
        bottleneck: Bottleneck,
        in_features: int | None,
        rank: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features is not None:
            self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
            bottleneck.leader = self
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.bottleneck, self.place = bottleneck, bottleneck.members
        bottleneck.members += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return self.up(self.bottleneck(x, self.place))


class Shared(NamedTuple):
    """An output of `down` that some members of its group are still to take.

    Attributes:
        x: What it was computed from.
        state: What else it depends on, see `_state_of`.
        z: The output.
        waiting: Places of the members that have not taken it.
    """

    x: torch.Tensor
    state: tuple[int | None, bool]
    z: torch.Tensor
    waiting: tuple[int, ...]


class Bottleneck:
    """What the layers of a group share: the leader's `down`, and its latest output until every member has taken it.

    An input is known again by identity, not by value: the layer that is called first computes z, each of the others finds
    it once. A layer that is fed anything else, or the same again, computes its own, so the outputs are right whatever the
    model does. Between two members that are fed the same tensor nothing else may happen to what z depends on: `down` must
    not change, its graph not be freed by a backward pass, and, where tensors have no version (in compiled code and in
    inference mode), the input not be changed in place.
    """

    def __init__(self) -> None:
        self.leader: GroupedLinear | None = None
        self.members = 0
        self._latest: Shared | None = None

    def __call__(self, x: torch.Tensor, place: int) -> torch.Tensor:
        """Maps (..., in_features) to (..., rank), for the member at a place."""
        latest, state = self._latest, _state_of(x)
        if latest is None or latest.x is not x or latest.state != state or place not in latest.waiting:
            assert self.leader is not None  # it joins first
            latest = Shared(x, state, self.leader.down(x), tuple(range(self.members)))
        waiting = tuple(other for other in latest.waiting if other != place)
        # Forgotten with the last one: a finished forward pass leaves no activations behind.
        self._latest = latest._replace(waiting=waiting) if waiting else None
        return latest.z

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_latest": None}  # activations are not copied


def _state_of(x: torch.Tensor) -> tuple[int | None, bool]:
    """Returns what says, beside identity, whether an output is still that of x: its version, and whether it has a graph."""
    counted = not torch.compiler.is_compiling() and not x.is_inference()
    return x._version if counted else None, torch.is_grad_enabled()


def order_dtype(features: int) -> torch.dtype:
    """Returns the smallest integer dtype that indexes so many inputs or outputs."""
    return torch.int16 if features <= torch.iinfo(torch.int16).max + 1 else torch.int32
