# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from lord_quant.modules import LowRankLinear


@pytest.mark.parametrize("bias", [True, False])
def test_computes_up_of_down(bias: bool) -> None:
    layer = LowRankLinear(6, 3, 5, bias, dtype=torch.float64)
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = x @ (layer.up.weight @ layer.down.weight).T + (layer.up.bias if bias else 0)
    assert layer(x).shape == (2, 4, 5)
    torch.testing.assert_close(layer(x), expected)


def test_holds_exactly_two_plain_linear_layers_down_first() -> None:
    layer = LowRankLinear(6, 3, 5, True)
    assert [name for name, _ in layer.named_children()] == ["down", "up"]
    assert [type(child) for child in layer.children()] == [nn.Linear, nn.Linear]
    assert [name for name, _ in layer.named_parameters()] == ["down.weight", "up.weight", "up.bias"]
    assert layer.down.weight.shape == (3, 6) and layer.up.weight.shape == (5, 3)


def test_has_no_properties_for_hosts_to_trip_over() -> None:
    assert not [name for name, value in vars(LowRankLinear).items() if isinstance(value, property)]


def test_device_and_dtype_reach_both_factors() -> None:
    layer = LowRankLinear(6, 3, 5, True, device="meta", dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
