# SPDX-License-Identifier: Apache-2.0
"""Models that read the weight of a linear layer themselves, past the layer, as Mamba and RWKV do.

Neither factors nor packed layers have such a weight, so these layers can become neither. Which they are no configuration
says. It is found out on the meta device, where a forward pass takes shapes but no weights: 0.2 s for 40 blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lord_quant.errors import ModelError
from lord_quant.plan import Plan
from lord_quant.silence import silence
from lord_quant.targets import dense_weight, find_linears, layer_type


logger = logging.getLogger(__name__)


class _Read(AttributeError):
    """Somebody asked a stand-in for its weight; for whoever only tries, it is an attribute that is missing."""


class _StandIn(nn.Module):
    """Has a linear layer's shape and bias, and no weight."""

    def __init__(self, kind: str, dense: nn.Module) -> None:
        super().__init__()
        self.kind = kind
        self.out_features, self.in_features = dense_weight(dense).shape
        self.bias: Any = dense.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.new_empty((*inputs.shape[:-1], self.out_features))

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise _Read(self.__dict__["kind"])
        return super().__getattr__(name)


def refuse_weight_reads(skeleton: nn.Module, plan: Plan) -> None:
    """Refuses a plan that replaces layers whose weight the model itself reads.

    Args:
        skeleton: The dense model on the meta device; as it was afterwards.
        plan: What becomes of its layers.

    Raises:
        ModelError: There are such layers (all kinds are named).
    """
    replaced = {layer.name for layer in plan.layers if layer.packed or layer.rank is not None}
    kinds = weight_readers(skeleton, replaced)
    if kinds:
        packs = any(layer.packed for layer in plan.layers)
        raise ModelError(
            f"{type(skeleton).__name__} reads the weights of {', '.join(kinds)} itself, which neither factors nor packed "
            f"layers have; wanted --ignore {' '.join(kinds)}{', and --bits 16, as GPTQ packs what is ignored too' * packs}"
        )


def weight_readers(skeleton: nn.Module, names: Collection[str]) -> list[str]:
    """Returns the paths within a block of those of the layers `names` whose weight a forward pass of the model reads.

    What cannot be run without values, such as the choice of experts, is not seen.
    """
    sites = [site for site in find_linears(skeleton) if site.name in names]
    dense = {site.name: skeleton.get_submodule(site.name) for site in sites}
    training, kinds = skeleton.training, list[str]()
    try:
        skeleton.eval()
        for site in sites:
            skeleton.set_submodule(site.name, _StandIn(layer_type(site), dense[site.name]))
        while (kind := _first_read(skeleton)) is not None:
            kinds.append(kind)
            for site in sites:
                if layer_type(site) == kind:
                    skeleton.set_submodule(site.name, dense[site.name])
    finally:
        for name, module in dense.items():
            skeleton.set_submodule(name, module)
        skeleton.train(training)
    return kinds


def _first_read(skeleton: Any) -> str | None:
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    # Of four dimensions, it is taken as it is: making one looks at values.
    asked = {"attention_mask": torch.zeros(1, 1, 2, 2, device="meta")}
    for others in (asked, {}):
        try:
            with torch.no_grad(), silence():
                skeleton(input_ids=tokens, use_cache=False, **others)
            return None
        except _Read as read:
            return str(read)
        except Exception as error:  # whatever a model stumbles over that finds no values, or takes no mask
            logger.debug("%s cannot be run without values: %r", type(skeleton).__name__, error)
    return None
