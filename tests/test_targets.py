# SPDX-License-Identifier: Apache-2.0
"""Finding a model's blocks and linear layers, and choosing among them by pattern."""

import re

import pytest
import torch
from models import tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lord_quant.errors import TargetError
from lord_quant.targets import LinearSite, dense_weight, find_blocks, find_linears, find_matching, is_linear, select


# Names inside a block by hand, with (in, out); attention first.
BLOCKS = {
    "gpt2": (
        "transformer.h",
        {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64)},
        {"mlp.c_fc": (64, 256), "mlp.c_proj": (256, 64)},
    ),
    "bigcode": (
        "transformer.h",
        {"attn.c_attn": (64, 96), "attn.c_proj": (64, 64)},
        {"mlp.c_fc": (64, 256), "mlp.c_proj": (256, 64)},
    ),
    "codegen": (
        "transformer.h",
        {"attn.qkv_proj": (64, 192), "attn.out_proj": (64, 64)},
        {"mlp.fc_in": (64, 256), "mlp.fc_out": (256, 64)},
    ),
    "llama": (
        "model.layers",
        {
            "self_attn.q_proj": (64, 64),
            "self_attn.k_proj": (64, 32),
            "self_attn.v_proj": (64, 32),
            "self_attn.o_proj": (64, 64),
        },
        {"mlp.gate_proj": (64, 128), "mlp.up_proj": (64, 128), "mlp.down_proj": (128, 64)},
    ),
}


@pytest.fixture(params=BLOCKS, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, tiny_model(request.param)


def test_every_linear_layer_of_the_blocks_is_found_in_order_and_nothing_else(family: tuple[str, nn.Module]) -> None:
    name, model = family
    path, attention, mlp = BLOCKS[name]
    sites = find_linears(model)
    expected = [(f"{path}.{i}.{layer}", i, *shape) for i in range(2) for layer, shape in (attention | mlp).items()]
    assert [site[:4] for site in sites] == expected
    for site in sites:
        layer = model.get_submodule(site.name)
        assert site.has_bias == (layer.bias is not None)
        assert dense_weight(layer).shape == (site.out_features, site.in_features)
    assert find_blocks(model).path == path
    assert find_blocks(model).modules == list(model.get_submodule(path))


def test_the_head_and_embeddings_are_never_targets(family: tuple[str, nn.Module]) -> None:
    _, model = family
    outside = {"lm_head", "wte", "wpe", "embed_tokens"}
    sites = find_linears(model)
    assert not [site for site in sites if site.name.rpartition(".")[2] in outside]
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(TargetError, match="'lm_head' matches no layer"):
        select(sites, ["lm_head"])


def test_attention_and_mlp_partition_all(family: tuple[str, nn.Module]) -> None:
    name, model = family
    path, attention, mlp = BLOCKS[name]
    sites = find_linears(model)
    by_preset = {preset: select(sites, [preset]) for preset in ("attention", "mlp", "all")}
    assert by_preset["attention"] == {f"{path}.{i}.{layer}" for i in range(2) for layer in attention}
    assert by_preset["mlp"] == {f"{path}.{i}.{layer}" for i in range(2) for layer in mlp}
    assert by_preset["all"] == {site.name for site in sites}
    assert select(sites, ["attention", "mlp"]) == by_preset["all"]


SITES = [
    LinearSite(f"model.layers.{i}.{name}", i, 64, 64, False)
    for i in range(12)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    ("targets", "ignore", "count"),
    [
        (["q_proj"], [], 12),
        (["mlp.up_proj"], [], 12),
        (["proj"], [], None),  # the end of a path is whole words
        (["model.layers.1.mlp.up_proj"], [], 1),
        (["model.layers.1.*"], [], 4),
        (["*.q_proj", "*.o_proj"], [], 24),
        (["model.layers.[0-2].mlp.*"], [], 6),
        (["*Q_PROJ"], [], None),
        ([r"re:layers\.1[01]\."], [], 8),
        ([r"re:(q|up)_proj$"], [], 24),
        ([r"re:layers\.0\.", "mlp"], [], 26),
        (["all"], ["o_proj"], 36),
        (["attention"], [r"re:layers\.(0|11)\."], 20),
        (["all"], ["attention", "up_proj"], 12),
    ],
)
def test_patterns(targets: list[str], ignore: list[str], count: int | None) -> None:
    if count is None:
        with pytest.raises(TargetError, match="matches no layer"):
            select(SITES, targets, ignore)
    else:
        assert len(select(SITES, targets, ignore)) == count


@pytest.mark.parametrize(
    ("pattern", "nearest"), [("q_porj", "q_proj"), ("atention", "attention"), ("mpl", "mlp"), ("mlp.dwn_proj", "down_proj")]
)
def test_a_pattern_without_match_names_the_nearest(pattern: str, nearest: str) -> None:
    message = f"'{re.escape(pattern)}' matches no layer; did you mean '{nearest}'"
    for call in (lambda: select(SITES, [pattern]), lambda: select(SITES, ["all"], [pattern])):
        with pytest.raises(TargetError, match=message):
            call()
    with pytest.raises(TargetError, match=message):
        find_matching(pattern, SITES)


def test_a_pattern_near_nothing_lists_what_there_is() -> None:
    with pytest.raises(TargetError, match="layers end in down_proj, o_proj, q_proj, up_proj"):
        select(SITES, ["##########"])


def test_all_patterns_without_match_are_named_at_once() -> None:
    with pytest.raises(TargetError) as caught:
        select(SITES, ["mlp", "nothing_a"], ["nothing_b"])
    assert "targets 'nothing_a'" in str(caught.value) and "ignore 'nothing_b'" in str(caught.value)


def test_a_broken_regular_expression_is_an_error() -> None:
    with pytest.raises(TargetError, match=r"'re:\(' is not a regular expression"):
        select(SITES, ["re:("])


def test_ignoring_everything_is_an_error() -> None:
    with pytest.raises(TargetError, match="leaves nothing"):
        select(SITES, ["mlp"], ["all"])


def test_find_matching_takes_one_pattern() -> None:
    assert find_matching("layers.3.mlp.up_proj", SITES) == {"model.layers.3.mlp.up_proj"}


def test_only_plain_linear_layers_and_conv1d_count() -> None:
    class Special(nn.Linear):
        pass

    assert is_linear(nn.Linear(2, 3)) and is_linear(Conv1D(3, 2))
    assert not is_linear(Special(2, 3)) and not is_linear(nn.Conv1d(2, 3, 1)) and not is_linear(nn.Embedding(2, 3))


def test_dense_weight_is_a_view_out_by_in() -> None:
    linear, conv = nn.Linear(2, 3), Conv1D(3, 2)
    for layer in (linear, conv):
        weight = dense_weight(layer)
        assert weight.shape == (3, 2) and not weight.requires_grad
        assert weight.data_ptr() == layer.weight.data_ptr()
        x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(x @ weight.T + layer.bias, layer(x))


def test_blocks_are_the_outermost_list_with_most_linear_layers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(8)])

    model = nn.Module()
    model.extras = nn.ModuleList([nn.Linear(4, 4)])
    model.layers = nn.ModuleList([Block(), Block()])
    assert find_blocks(model).path == "layers"
    single = nn.Module()
    single.layers = nn.ModuleList([Block()])
    assert find_blocks(single).path == "layers"


def test_classes_derived_from_linear_are_named_where_there_is_nothing_else() -> None:
    class Scaled(nn.Linear):
        pass

    model = nn.Module()
    model.layers = nn.ModuleList([Scaled(4, 4)])
    with pytest.raises(TargetError, match=r"; Scaled may compute something else than nn\.Linear, and is left alone"):
        find_blocks(model)


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(TargetError, match="Sequential holds no list of transformer blocks"):
        find_linears(nn.Sequential(nn.Linear(2, 2)))
