# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from models import tiny_model
from torch import nn

from lord_quant.decompose import Factors
from lord_quant.errors import CheckpointError, RankError
from lord_quant.modules import LowRankLinear
from lord_quant.surgery import apply_rank_pattern, replace_layer
from lord_quant.targets import dense_weight, find_linears


def factors(rank: int, inputs: int, outputs: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> Factors:
    generator = torch.Generator().manual_seed(0)
    down, up, offset = (
        torch.randn(*s, generator=generator, dtype=dtype) for s in ((rank, inputs), (outputs, rank), (outputs,))
    )
    return Factors(down, up, offset if bias else None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")],
    ids=["Linear", "Conv1D"],
)
def test_the_replaced_layer_computes_with_the_factors(family: str, name: str, bias: bool) -> None:
    model = tiny_model(family)
    outputs, inputs = dense_weight(model.get_submodule(name)).shape
    parts = factors(5, inputs, outputs, bias)
    returned = replace_layer(model, name, parts)
    layer = model.get_submodule(name)
    assert layer is returned and type(layer) is LowRankLinear
    x = torch.randn(2, 3, inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (parts.up @ parts.down).T + (parts.bias if bias else 0), rtol=0, atol=1e-12)
    assert (layer.up.bias is not None) == bias and layer.down.bias is None


@pytest.mark.parametrize("family", ["gpt2", "bigcode", "llama"])
def test_exact_factors_of_every_layer_leave_the_model_alone(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
        for site in find_linears(model):
            layer = model.get_submodule(site.name)
            u, s, vt = torch.linalg.svd(dense_weight(layer), full_matrices=False)
            bias = None if layer.bias is None else layer.bias.detach()
            replace_layer(model, site.name, Factors(s[:, None] * vt, u, bias))
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_device_are_those_of_the_replaced_layer(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 6).to(dtype), "b": nn.Linear(8, 6, device="meta", dtype=dtype)})
    layer = replace_layer(model, "a", factors(3, 8, 6))
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    apply_rank_pattern(model, {"b": 3}, True)
    assert {parameter.dtype for parameter in model["b"].parameters()} == {dtype}
    assert {parameter.device.type for parameter in model["b"].parameters()} == {"meta"}


def test_factors_are_copied_and_the_dense_layer_is_left_alone() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 6)})
    dense, parts = model["a"], factors(3, 8, 6, dtype=torch.float32)
    weight, down = dense.weight.detach().clone(), parts.down.clone()
    layer = replace_layer(model, "a", parts)
    with torch.no_grad():
        layer.down.weight.zero_()
    assert torch.equal(parts.down, down) and torch.equal(dense.weight, weight)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("mean_correction", [True, False])
def test_a_skeleton_has_the_same_modules_as_a_compressed_model(family: str, mean_correction: bool) -> None:
    model, skeleton = tiny_model(family), tiny_model(family).to("meta")
    pattern = {site.name: 8 + i for i, site in enumerate(find_linears(model)) if i % 3}
    for site in find_linears(model):
        if site.name in pattern:
            bias = mean_correction or site.has_bias
            replace_layer(model, site.name, factors(pattern[site.name], site.in_features, site.out_features, bias))
    apply_rank_pattern(skeleton, pattern, mean_correction)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in skeleton.state_dict().items()} == expected
    assert [name for name, _ in skeleton.named_modules()] == [name for name, _ in model.named_modules()]
    assert {tensor.device.type for tensor in skeleton.state_dict().values()} == {"meta"}
    skeleton.to_empty(device="cpu").load_state_dict(model.state_dict())


def test_factors_are_exactly_linear_layers_down_first() -> None:
    model = tiny_model("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    apply_rank_pattern(model, {name: 32}, True)
    children = dict(model.get_submodule(name).named_children())
    assert list(children) == ["down", "up"] and [type(child) for child in children.values()] == [nn.Linear, nn.Linear]
    assert children["down"].weight.shape == (32, 64) and children["up"].weight.shape == (256, 32)  # Conv1D transposed once


def test_layers_the_model_does_not_have_are_all_named_and_nothing_is_touched() -> None:
    model = tiny_model("llama")
    before = [type(module) for module in model.modules()]
    pattern = {"model.layers.0.mlp.up_proj": 8, "model.layers.7.mlp.up_proj": 8, "model.norm": 8, "lm_haed": 8}
    with pytest.raises(CheckpointError) as caught:
        apply_rank_pattern(model, pattern, True)
    assert "model.layers.7.mlp.up_proj, model.norm, lm_haed" in str(caught.value)
    assert "LlamaForCausalLM" in str(caught.value) and "layers.0" not in str(caught.value)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("rank", [0, -4, 65, 1.5, "32", None])
def test_illegal_ranks_are_all_named_and_nothing_is_touched(rank: object) -> None:
    model = tiny_model("llama")
    before = [type(module) for module in model.modules()]
    pattern = {f"model.layers.{i}.mlp.up_proj": value for i, value in enumerate((rank, 999))}
    with pytest.raises(RankError) as caught:
        apply_rank_pattern(model, {"model.layers.0.self_attn.k_proj": 32} | pattern, True)
    assert f"model.layers.0.mlp.up_proj: rank {rank!r}, wanted 1 to 64" in str(caught.value)
    assert "model.layers.1.mlp.up_proj: rank 999" in str(caught.value) and "k_proj" not in str(caught.value)
    assert [type(module) for module in model.modules()] == before
