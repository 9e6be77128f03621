# SPDX-License-Identifier: Apache-2.0
"""The modules that stand in for decomposed layers: what they compute, hold, save and load."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lord_quant.modules import ColumnPivotedLinear, LowRankLinear, PivotedLinear, order_dtype


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


@pytest.mark.parametrize("form", [LowRankLinear, PivotedLinear, ColumnPivotedLinear])
def test_has_no_properties_for_hosts_to_trip_over(form: type[nn.Module]) -> None:
    assert not [name for name, value in vars(form).items() if isinstance(value, property)]


@pytest.mark.parametrize("form", [LowRankLinear, PivotedLinear, ColumnPivotedLinear])
def test_device_and_dtype_reach_both_factors(form: type[nn.Module]) -> None:
    layer = form(6, 3, 5, True, device="meta", dtype=torch.bfloat16)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}


def pivoted_layer(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[PivotedLinear, list[int]]:
    """A layer with 7 outputs, and which outputs `down` and `up` compute, in the order in which they compute them."""
    layer = PivotedLinear(6, 3, 7, bias, dtype=dtype)
    places = [1, 4, 6, 0, 2, 3, 5]
    layer.order.copy_(torch.tensor(places).argsort())
    return layer, places


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (2,), (2, 4), (0,)])
def test_pivoted_puts_every_output_in_its_place(bias: bool, lead: tuple[int, ...]) -> None:
    layer, places = pivoted_layer(bias)
    x = torch.randn(*lead, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = x @ layer.down.weight.T + (layer.down.bias if bias else 0)
    others = z @ layer.up.weight.T + (layer.up.bias if bias else 0)
    expected = torch.empty(*lead, 7, dtype=torch.float64)
    expected[..., places[:3]], expected[..., places[3:]] = z, others  # scattered, where the layer gathers
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_pivoted_holds_two_plain_linear_layers_down_first_and_an_order() -> None:
    layer, _ = pivoted_layer()
    assert [(name, type(child)) for name, child in layer.named_children()] == [("down", nn.Linear), ("up", nn.Linear)]
    assert list(layer.state_dict()) == ["order", "down.weight", "down.bias", "up.weight", "up.bias"]
    assert layer.down.weight.shape == (3, 6) and layer.up.weight.shape == (4, 3)
    assert not [name for name, _ in PivotedLinear(6, 3, 7, False).named_parameters() if name.endswith("bias")]


def test_pivoted_state_is_loaded_again() -> None:
    layer, _ = pivoted_layer()
    again = PivotedLinear(6, 3, 7, True, dtype=torch.float64)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert not torch.equal(again(x), layer(x))
    assert again.load_state_dict(layer.state_dict()) == ([], [])
    assert torch.equal(again(x), layer(x))


def column_pivoted_layer(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[ColumnPivotedLinear, list[int]]:
    """A layer with 6 inputs, and which of them pass `down` and which it takes, in that order."""
    layer, places = ColumnPivotedLinear(6, 2, 7, bias, dtype=dtype), [1, 4, 0, 2, 3, 5]
    layer.order.copy_(torch.tensor(places))
    return layer, places


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (2,), (2, 4), (0,)])
def test_column_pivoted_takes_every_input_from_its_place(bias: bool, lead: tuple[int, ...]) -> None:
    layer, places = column_pivoted_layer(bias)
    x = torch.randn(*lead, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = torch.zeros(2, 6, dtype=torch.float64)
    full[:, places[:2]], full[:, places[2:]] = torch.eye(2, dtype=torch.float64), layer.down.weight.detach()
    expected = x @ (layer.up.weight @ full).T + (layer.up.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_column_pivoted_holds_two_plain_linear_layers_down_first_and_an_order() -> None:
    layer, _ = column_pivoted_layer()
    assert [(name, type(child)) for name, child in layer.named_children()] == [("down", nn.Linear), ("up", nn.Linear)]
    assert list(layer.state_dict()) == ["order", "down.weight", "up.weight", "up.bias"]
    assert layer.down.weight.shape == (2, 4) and layer.up.weight.shape == (7, 2)


@pytest.mark.parametrize("make", [pivoted_layer, column_pivoted_layer])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_a_pivoted_layer_keeps_its_order(make: Callable[..., Any], dtype: torch.dtype) -> None:
    layer, _ = make(dtype=torch.float32)
    order = layer.order.clone()
    cast = layer.to(dtype)
    assert cast.order.dtype == torch.int32 and torch.equal(cast.order, order)
    stored = cast.state_dict()["order"]
    assert stored.dtype == torch.int16 and torch.equal(stored.int(), order)
    assert cast(torch.ones(1, 6, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(("outputs", "dtype"), [(2, "int16"), (32768, "int16"), (32769, "int32"), (10**6, "int32")])
def test_the_order_takes_the_smallest_dtype_that_can_say_it(outputs: int, dtype: str) -> None:
    assert order_dtype(outputs) is getattr(torch, dtype)
    for layer in (PivotedLinear(2, 1, outputs, False, "meta"), ColumnPivotedLinear(outputs, 1, 2, False, "meta")):
        assert layer.state_dict()["order"].dtype is getattr(torch, dtype) and layer.order.dtype is torch.int32


@pytest.mark.parametrize("outputs", [32768, 32769])
def test_the_largest_index_is_not_cut(outputs: int) -> None:
    layer = PivotedLinear(1, 1, outputs, False)
    with torch.no_grad():
        layer.down.weight.fill_(1)
        layer.up.weight.copy_(torch.arange(1, outputs)[:, None])
    layer.order.copy_(torch.arange(outputs).flip(0))
    assert torch.equal(layer(torch.ones(1))[:3], torch.tensor([outputs - 1.0, outputs - 2.0, outputs - 3.0]))


@pytest.mark.parametrize("make", [pivoted_layer, column_pivoted_layer])
def test_a_pivoted_layer_trains(make: Callable[..., Any]) -> None:
    layer, _ = make()
    layer(torch.ones(2, 6, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in layer.parameters())
