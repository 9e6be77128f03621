# SPDX-License-Identifier: Apache-2.0
"""Putting factors and other weights into a model, and rebuilding its skeleton from a rank pattern."""

import pytest
import torch
from models import tiny_model
from torch import nn

from lord_quant.decompose import Factors
from lord_quant.errors import CheckpointError, NumericsError, RankError
from lord_quant.modules import ColumnPivotedLinear, GroupedLinear, LowRankLinear, PivotedLinear
from lord_quant.surgery import apply_rank_pattern, is_compressed, is_low_rank, replace_group, replace_layer, set_dense
from lord_quant.targets import dense_weight, find_linears


LAYER_KINDS = pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")],
    ids=["Linear", "Conv1D"],
)


def factors(rank: int, inputs: int, outputs: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> Factors:
    generator = torch.Generator().manual_seed(0)
    down, up, offset = (
        torch.randn(*s, generator=generator, dtype=dtype) for s in ((rank, inputs), (outputs, rank), (outputs,))
    )
    return Factors(down, up, offset if bias else None)


@pytest.mark.parametrize("bias", [True, False])
@LAYER_KINDS
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


def pivoted_factors(rank: int, inputs: int, outputs: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> Factors:
    parts = factors(rank, inputs, outputs, bias, dtype)
    pivots = torch.randperm(outputs, generator=torch.Generator().manual_seed(2))[:rank].sort().values
    return Factors(parts.down, parts.up[rank:], parts.bias, pivots)


def column_pivoted_factors(
    rank: int, inputs: int, outputs: int, bias: bool = True, dtype: torch.dtype = torch.float64
) -> Factors:
    parts = factors(rank, inputs, outputs, bias, dtype)
    pivots = torch.randperm(inputs, generator=torch.Generator().manual_seed(2))[:rank].sort().values
    return Factors(parts.down[:, rank:], parts.up, parts.bias, pivots, of_inputs=True)


@pytest.mark.parametrize("form", [PivotedLinear, ColumnPivotedLinear])
@pytest.mark.parametrize("bias", [True, False])
@LAYER_KINDS
def test_a_pivoted_layer_computes_with_the_factors_and_its_bias_is_exact(
    family: str, name: str, bias: bool, form: type[nn.Module]
) -> None:
    model = tiny_model(family)
    outputs, inputs = dense_weight(model.get_submodule(name)).shape
    parts = (pivoted_factors if form is PivotedLinear else column_pivoted_factors)(5, inputs, outputs, bias)
    layer = replace_layer(model, name, parts)
    assert model.get_submodule(name) is layer and type(layer) is form and not layer.training
    assert (layer.up.bias is not None) == bias
    assert (layer.down.bias is not None) == (bias and form is PivotedLinear)
    x = torch.randn(2, 3, inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ parts.product().T + (parts.bias if bias else 0), rtol=0, atol=1e-12)
        zero = layer(torch.zeros(inputs, dtype=torch.float64))
        torch.testing.assert_close(zero, parts.bias if bias else torch.zeros_like(zero), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("mean_correction", [True, False])
def test_a_skeleton_takes_the_form_of_every_layer(family: str, mean_correction: bool) -> None:
    model, skeleton = tiny_model(family), tiny_model(family).to("meta")
    sites = find_linears(model)
    ranks = {site.name: 8 + i for i, site in enumerate(sites) if i % 4}
    makers = {"two_factor": factors, "pivoted": pivoted_factors, "column_pivoted": column_pivoted_factors}
    forms = {site.name: list(makers)[i % 4 - 1] for i, site in enumerate(sites) if i % 4}
    for site in sites:
        if site.name in ranks:
            make = makers[forms[site.name]]
            shape = ranks[site.name], site.in_features, site.out_features
            replace_layer(model, site.name, make(*shape, mean_correction or site.has_bias))
    apply_rank_pattern(skeleton, ranks, mean_correction, forms)
    described = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in one.state_dict().items()} for one in (model, skeleton)
    ]
    assert described[0] == described[1]
    assert [type(module) for module in skeleton.modules()] == [type(module) for module in model.modules()]
    filled = skeleton.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    for name in ranks:
        x = torch.randn(3, dense_weight(tiny_model(family).get_submodule(name)).shape[1], dtype=torch.float64)
        assert torch.equal(filled.get_submodule(name)(x), model.get_submodule(name)(x))


def test_low_rank_layers_of_every_form_are_known_as_compressed() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Linear(8, 6), "c": nn.Linear(8, 6)})
    model["d"] = nn.Linear(8, 6)
    apply_rank_pattern(model, {"a": 3, "b": 3, "d": 3}, True, {"b": "pivoted", "d": "column_pivoted"})
    assert [is_low_rank(module) for module in model.values()] == [True, True, False, True]
    assert [is_compressed(module) for module in model.values()] == [True, True, False, True]


@pytest.mark.parametrize(
    ("forms", "named"),
    [
        ({"model.layers.0.mlp.up_proj": "pivot"}, "model.layers.0.mlp.up_proj: 'pivot'"),
        ({"model.layers.0.mlp.up_proj": None}, "model.layers.0.mlp.up_proj: None"),
        ({"model.layers.1.mlp.up_proj": "pivoted"}, "model.layers.1.mlp.up_proj: 'pivoted'"),
        ({"model.layers.9.mlp.up_proj": "pivoted", "x": 3}, "model.layers.9.mlp.up_proj: 'pivoted', x: 3"),
    ],
    ids=["unknown form", "no form", "layer without rank", "several"],
)
def test_odd_forms_are_all_named_and_nothing_is_touched(forms: dict, named: str) -> None:
    model = tiny_model("llama")
    before = [type(module) for module in model.modules()]
    with pytest.raises(CheckpointError) as caught:
        apply_rank_pattern(model, {"model.layers.0.mlp.up_proj": 8}, True, forms)
    assert f"form_pattern holds {named}; wanted two_factor or pivoted or column_pivoted" in str(caught.value)
    assert [type(module) for module in model.modules()] == before


def test_a_pivoted_layer_of_full_rank_is_illegal_and_a_lower_one_is_not() -> None:
    """With as many pivots as outputs nothing is left to predict; as many as inputs is fine."""
    wide, tall = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"  # 64 x 128, 128 x 64
    for name, rank, limit in ((wide, 64, 63), (tall, 65, 64)):
        with pytest.raises(RankError, match=f"{name}: rank {rank}, wanted 1 to {limit}"):
            apply_rank_pattern(tiny_model("llama"), {name: rank}, True, {name: "pivoted"})
        apply_rank_pattern(tiny_model("llama"), {name: limit}, True, {name: "pivoted"})
    for name, rank, limit in ((wide, 65, 64), (tall, 64, 63)):  # as many as inputs: there `down` has none to take
        with pytest.raises(RankError, match=f"{name}: rank {rank}, wanted 1 to {limit}"):
            apply_rank_pattern(tiny_model("llama"), {name: rank}, True, {name: "column_pivoted"})
        apply_rank_pattern(tiny_model("llama"), {name: limit}, True, {name: "column_pivoted"})
    apply_rank_pattern(tiny_model("llama"), {wide: 64}, True)


def test_factors_that_do_not_fit_the_dtype_are_named() -> None:
    for make, part in ((factors, "up.bias"), (pivoted_factors, "down.bias")):
        model = nn.ModuleDict({"a": nn.Linear(8, 6).half()})
        parts = make(3, 8, 6)
        with pytest.raises(NumericsError, match=rf"factor {part} of 'a' in torch\.float16: "):
            replace_layer(model, "a", parts._replace(bias=torch.full((6,), 1e6, dtype=torch.float64)))
        assert type(model["a"]) is nn.Linear


@pytest.mark.parametrize("bias", [True, False])
@LAYER_KINDS
def test_a_dense_layer_gets_another_weight(family: str, name: str, bias: bool) -> None:
    model = tiny_model(family)
    layer = model.get_submodule(name)
    before = layer.bias
    kept = None if before is None else before.detach().clone()
    outputs, inputs = dense_weight(layer).shape
    parts = factors(5, inputs, outputs, bias)
    set_dense(model, name, parts.product(), parts.bias)
    assert model.get_submodule(name) is layer
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    has, gets = kept is not None, kept is not None and bias
    expected = x @ parts.product().T + (parts.bias if gets else kept if has else 0)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    assert (layer.bias is None) == (not has)


def test_a_dense_weight_that_does_not_fit_the_dtype_is_named() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 6).half()})
    with pytest.raises(NumericsError, match=r"weight of 'a' in torch\.float16: 48 of 48"):
        set_dense(model, "a", torch.full((6, 8), 1e6), None)


QKV = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]  # 64, 32 and 32 outputs
GROUPED = dict.fromkeys(QKV, "grouped")
TO_Q = dict.fromkeys(QKV[1:], QKV[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0)])
def test_grouped_layers_compute_with_their_rows_of_the_factors(bias: bool, order: tuple[int, ...]) -> None:
    model, names = tiny_model("llama"), [QKV[i] for i in order]
    sizes = [len(dense_weight(model.get_submodule(name))) for name in names]
    parts = factors(70 if len(order) == 3 else 40, 64, sum(sizes), bias)
    made = replace_group(model, names, parts)
    assert [model.get_submodule(name) for name in names] == made and {type(one) for one in made} == {GroupedLinear}
    assert ["down" in dict(one.named_children()) for one in made] == [True] + [False] * (len(order) - 1)
    assert not any(one.training for one in made) and all((one.up.bias is not None) == bias for one in made)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = x @ parts.product().T + (parts.bias if bias else 0)
    torch.testing.assert_close(torch.cat([one(x) for one in made], dim=-1), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mean_correction", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_skeleton_of_groups_has_the_same_modules_as_a_compressed_model(family: str, mean_correction: bool) -> None:
    model, skeleton = tiny_model(family), tiny_model(family).to("meta")
    replace_group(model, QKV, factors(48, 64, 128, mean_correction or family == "qwen2"))
    apply_rank_pattern(skeleton, dict.fromkeys(QKV, 48), mean_correction, GROUPED, TO_Q)
    described = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in one.state_dict().items()} for one in (model, skeleton)
    ]
    assert described[0] == described[1]
    assert [type(module) for module in skeleton.modules()] == [type(module) for module in model.modules()]
    assert {tensor.device.type for tensor in skeleton.state_dict().values()} == {"meta"}
    filled = skeleton.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    x = torch.randn(3, 64, dtype=torch.float64)
    assert all(torch.equal(filled.get_submodule(name)(x), model.get_submodule(name)(x)) for name in QKV)
    assert all(is_low_rank(model.get_submodule(name)) and is_compressed(model.get_submodule(name)) for name in QKV)


OTHERS = [name.replace("layers.1", "layers.0") for name in QKV]
MLP = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up")]


@pytest.mark.parametrize(
    ("forms", "leaders", "named"),
    [
        (GROUPED, {QKV[1]: QKV[0], QKV[2]: "model.layers.1.p_proj"}, f"{QKV[2]}: 'model.layers.1.p_proj'"),
        (GROUPED, {QKV[1]: QKV[1], QKV[2]: QKV[0]}, f"{QKV[1]}: '{QKV[1]}'"),
        (GROUPED, {QKV[1]: QKV[0], QKV[2]: QKV[1]}, f"{QKV[2]}: '{QKV[1]}'"),  # which is no leader itself
        (GROUPED, {QKV[1]: QKV[0], QKV[2]: [QKV[0]]}, rf"{QKV[2]}: \['{QKV[0]}'\]"),
        (GROUPED, {QKV[1]: QKV[0], QKV[2]: None}, f"{QKV[2]}: None"),
        (GROUPED, TO_Q | {"model.layers.7.k_proj": QKV[0]}, f"model.layers.7.k_proj: '{QKV[0]}'"),
        (GROUPED, TO_Q | {MLP[1]: QKV[0]}, f"{MLP[1]}: '{QKV[0]}'"),
        (GROUPED, {QKV[1]: QKV[0]}, f"{QKV[2]}: grouped with no other layer"),
        (GROUPED, None, f"{QKV[0]}: grouped with no other layer; {QKV[1]}: grouped"),
        ({**GROUPED, QKV[2]: "two_factor"}, TO_Q, f"{QKV[2]}: '{QKV[0]}'"),
        (None, TO_Q, f"{QKV[1]}: '{QKV[0]}'"),
        # Shapes, ranks and tensors would fit, but the leader is fed another input.
        (
            GROUPED | dict.fromkeys(OTHERS, "grouped"),
            TO_Q | {OTHERS[1]: OTHERS[0], OTHERS[2]: QKV[0]},
            f"{OTHERS[2]}: '{QKV[0]}', wanted a grouped layer beside it with its inputs and rank",
        ),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit_are_named_and_nothing_is_touched(forms: dict | None, leaders: dict, named: str) -> None:
    model = tiny_model("llama")
    before = [type(module) for module in model.modules()]
    with pytest.raises(CheckpointError, match=rf"group_pattern does not fit together: .*{named}"):
        apply_rank_pattern(model, dict.fromkeys((*QKV, *OTHERS, *MLP), 32), True, forms, leaders)
    assert [type(module) for module in model.modules()] == before


def test_a_group_has_one_rank_up_to_that_of_all_its_outputs() -> None:
    apply_rank_pattern(tiny_model("llama"), dict.fromkeys(QKV, 64), True, GROUPED, TO_Q)
    with pytest.raises(RankError, match=f"{QKV[0]}: rank 65, wanted 1 to 64; {QKV[1]}: rank 65"):
        apply_rank_pattern(tiny_model("llama"), dict.fromkeys(QKV, 65), True, GROUPED, TO_Q)
    with pytest.raises(CheckpointError, match=f"{QKV[2]}: '{QKV[0]}', wanted a grouped layer beside it"):
        apply_rank_pattern(tiny_model("llama"), {**dict.fromkeys(QKV, 32), QKV[2]: 16}, True, GROUPED, TO_Q)
    narrow = {QKV[1]: 64, QKV[2]: 64}  # 32 outputs each
    apply_rank_pattern(tiny_model("llama"), narrow, True, dict.fromkeys(narrow, "grouped"), {QKV[2]: QKV[1]})
    with pytest.raises(RankError, match="wanted 1 to 32"):
        apply_rank_pattern(tiny_model("llama"), narrow, True)


@pytest.mark.parametrize(("at", "named"), [(70, "b"), (3, "a")])
def test_a_group_that_does_not_fit_the_dtype_is_named_and_nothing_is_touched(at: int, named: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 64).half(), "b": nn.Linear(8, 64).half()})
    parts = factors(3, 8, 128)
    parts.bias[at] = 1e6
    with pytest.raises(NumericsError, match=rf"factor up\.bias of '{named}' in torch\.float16: 1 of 64"):
        replace_group(model, ["a", "b"], parts)
    assert {type(layer) for layer in model.values()} == {nn.Linear}
