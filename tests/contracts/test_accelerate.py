# SPDX-License-Identifier: Apache-2.0
"""What the product takes for granted about accelerate."""

from __future__ import annotations

import torch
from torch import nn


class Layer(nn.Module):
    """A parameter, a buffer that is stored, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("counts", torch.arange(4))
        self.register_buffer("computed", torch.ones(2), persistent=False)


def test_empty_weights_leave_parameters_without_memory_and_buffers_computed() -> None:
    """lord_quant/blocks/source.py builds skeletons in it; lord_quant/blocks/residency.py keeps the buffers it computed."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        layer = Layer()
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert torch.equal(layer.counts, torch.arange(4)) and torch.equal(layer.computed, torch.ones(2))
    assert nn.Linear(3, 2).weight.device.type == "cpu"


def test_a_tensor_of_a_skeleton_is_filled_and_emptied_by_its_path() -> None:
    """lord_quant/blocks/residency.py fills blocks with `set_module_tensor_to_device` and empties them again."""
    from accelerate import init_empty_weights
    from accelerate.utils import set_module_tensor_to_device

    with init_empty_weights():
        layer = Layer()
    for dtype in (torch.float32, torch.bfloat16):
        value = torch.full((2, 3), 0.5, dtype=dtype)
        set_module_tensor_to_device(layer, "linear.weight", torch.device("cpu"), value, dtype=value.dtype)
        assert isinstance(layer.linear.weight, nn.Parameter) and layer.linear.weight.requires_grad
        assert layer.linear.weight.dtype == dtype and torch.equal(layer.linear.weight, value)
        set_module_tensor_to_device(layer, "linear.weight", "meta")
        assert layer.linear.weight.device.type == "meta" and layer.linear.weight.shape == (2, 3)
    set_module_tensor_to_device(layer, "counts", torch.device("cpu"), torch.zeros(4, dtype=torch.int64), dtype=torch.int64)
    assert torch.equal(layer.counts, torch.zeros(4, dtype=torch.int64)) and layer.counts.dtype == torch.int64


def test_hooks_stand_in_the_instances_own_forward() -> None:
    """lord_quant/blocks/stream.py puts a host's `forward` back where it found one on the module itself."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    linear = nn.Linear(3, 2)
    assert "forward" not in vars(linear)
    add_hook_to_module(linear, ModelHook())
    assert "forward" in vars(linear)
    remove_hook_from_module(linear)
    assert torch.equal(linear(torch.ones(3)), nn.functional.linear(torch.ones(3), linear.weight, linear.bias))
