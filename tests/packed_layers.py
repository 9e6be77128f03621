# SPDX-License-Identifier: Apache-2.0
"""Packed layers of the host that hold random codes, put there without the product's help."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

import torch
from torch import nn

from lord_quant.backends.gptq import host
from lord_quant.files.packing import pack_words


class Codes(NamedTuple):
    """A weight on a grid.

    Attributes:
        codes: Integers with shape (out_features, in_features).
        scales: float16, with shape (out_features, groups).
        zeros: Integers from 1, with shape (out_features, groups).
        g_idx: Group of every column.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor

    def weight(self) -> torch.Tensor:
        """Returns the weight in float64, with shape (out_features, in_features)."""
        groups = self.g_idx.long()
        return self.scales.double()[:, groups] * (self.codes - self.zeros[:, groups]).double()


class Model(nn.Module):
    """A list of blocks with two layers each, one with a bias, of the width 64; and a head that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"wide": nn.Linear(64, 96), "narrow": nn.Linear(96, 64, bias=False)})])
        self.head = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block["narrow"](torch.relu(block["wide"](x)))
        return self.head(x)


LAYERS = ("blocks.0.wide", "blocks.0.narrow")


def random_codes(outputs: int, inputs: int, bits: int, group_size: int, *, desc_act: bool = False) -> Codes:
    """Draws codes, scales and zeros; with `desc_act` the groups are spread over the columns."""
    generator = torch.Generator().manual_seed(outputs * bits)
    groups = inputs // group_size
    order = torch.randperm(inputs, generator=generator) if desc_act else torch.arange(inputs)
    return Codes(
        torch.randint(2**bits, (outputs, inputs), generator=generator),
        (torch.rand(outputs, groups, generator=generator) * 0.02 + 0.01).half(),
        torch.randint(1, 2**bits, (outputs, groups), generator=generator),
        (order // group_size).to(torch.int32),
    )


def stored(codes: Codes, bits: int, *, first_format: bool = False) -> dict[str, torch.Tensor]:
    """Returns the tensors of a checkpoint; the first format stores zeros less one."""
    return {
        "qweight": pack_words(codes.codes.T.contiguous(), bits),
        "qzeros": pack_words(codes.zeros - int(first_format), bits).T.contiguous(),
        "scales": codes.scales.T.contiguous(),
        "g_idx": codes.g_idx,
    }


def packed_model(
    bits: int, group_size: int = 32, *, backend: str = "auto", desc_act: bool = False, first_format: bool = False
) -> tuple[Any, Any, dict[str, Codes]]:
    """Returns a model with packed layers, not finished yet, the quantizer that finishes it, and what was packed."""
    gc.freeze()  # the host collects garbage after every model, which costs more than its work on models this small
    torch.manual_seed(0)
    model: Any = Model().requires_grad_(False)
    biases = {name: model.get_submodule(name).bias for name in LAYERS}
    name = "gptq" if first_format else "gptq_v2"
    quantizer = host().GPTQQuantizer(
        bits=bits, group_size=group_size, sym=False, desc_act=desc_act, act_group_aware=False, format=name, backend=backend
    )
    quantizer.block_name_to_quantize = "blocks"
    quantizer.convert_model(model, device_map={"": "cpu"})
    drawn = {}
    for name in LAYERS:
        layer = model.get_submodule(name)
        drawn[name] = random_codes(layer.out_features, layer.in_features, bits, group_size, desc_act=desc_act)
        for part, tensor in stored(drawn[name], bits, first_format=first_format).items():
            setattr(layer, part, tensor)
        if biases[name] is not None:
            layer.bias = biases[name].half()
        layer.optimized = True
    return model.eval(), quantizer, drawn


def wanted(codes: Codes, layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns in float64 what a packed layer must compute from x."""
    bias = 0 if layer.bias is None else layer.bias.double()
    return x.double() @ codes.weight().T + bias
