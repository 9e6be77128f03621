# SPDX-License-Identifier: Apache-2.0
"""Puts low-rank layers where dense ones stood: one path for compressing and for loading.

Compressing passes factors; loading passes none and gets the same modules on the device of the layer they replace (meta,
inside `from_pretrained`), to be filled from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lord_quant.decompose import Factors
from lord_quant.errors import CheckpointError, RankError
from lord_quant.linalg import require_finite
from lord_quant.modules import LowRankLinear
from lord_quant.targets import dense_weight, is_linear


def is_compressed(module: nn.Module) -> bool:
    """Tells whether a module is the work of an earlier run: low-rank, or packed by a host."""
    return isinstance(module, LowRankLinear) or isinstance(getattr(module, "qweight", None), torch.Tensor)


def replace_layer(model: nn.Module, name: str, factors: Factors) -> LowRankLinear:
    """Replaces the linear layer at path `name` by its factors, in that layer's dtype and on its device.

    Raises:
        NumericsError: A factor is not finite in the layer's dtype; the layer is named.
    """
    dense = model.get_submodule(name)
    rank = factors.down.shape[0]
    module = _low_rank_like(dense, rank, factors.bias is not None)
    with torch.no_grad():
        module.down.weight.copy_(factors.down)
        module.up.weight.copy_(factors.up)
        if factors.bias is not None:
            module.up.bias.copy_(factors.bias)
            require_finite(module.up.bias, f"bias of {name!r} in {module.up.bias.dtype}")
        require_finite(module.down.weight, f"factor down of {name!r} in {module.down.weight.dtype}")
        require_finite(module.up.weight, f"factor up of {name!r} in {module.up.weight.dtype}")
    model.set_submodule(name, module)
    return module


def apply_rank_pattern(model: nn.Module, rank_pattern: Mapping[str, int], mean_correction: bool) -> None:
    """Replaces every layer of `rank_pattern` by empty low-rank layers of those ranks.

    Args:
        model: The dense skeleton; changed in place.
        rank_pattern: Rank by full module path.
        mean_correction: Whether every low-rank layer has a bias, or only those whose dense layer has one.

    Raises:
        CheckpointError: The pattern names layers the model does not have (all are named).
        RankError: A rank exceeds what the layer's shape allows (all are named).
    """
    modules = dict(model.named_modules())
    missing = [name for name in rank_pattern if name not in modules or not is_linear(modules[name])]
    if missing:
        raise CheckpointError(
            f"rank_pattern names layers that {type(model).__name__} does not have: {', '.join(missing)}; was the "
            "configuration edited, or is it another model's?"
        )
    problems = []
    for name, rank in rank_pattern.items():
        limit = min(dense_weight(modules[name]).shape)
        if not isinstance(rank, int) or not 1 <= rank <= limit:
            problems.append(f"{name}: rank {rank!r}, wanted 1 to {limit}")
    if problems:
        raise RankError("illegal ranks in the checkpoint's rank_pattern: " + "; ".join(problems))
    for name, rank in rank_pattern.items():
        dense = modules[name]
        model.set_submodule(name, _low_rank_like(dense, rank, mean_correction or dense.bias is not None))


def _low_rank_like(dense: nn.Module, rank: int, bias: bool) -> LowRankLinear:
    weight = dense_weight(dense)
    out_features, in_features = weight.shape
    module = LowRankLinear(in_features, rank, out_features, bias, device=weight.device, dtype=weight.dtype)
    return module.train(dense.training)
