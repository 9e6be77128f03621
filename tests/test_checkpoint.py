# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's configuration says, and holding the tensors in its files against the plan."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from lord_quant.checkpoint import (
    cast_floats,
    check_version,
    quantization_config,
)
from lord_quant.config import GptqConfig, LowrankConfig
from lord_quant.errors import CheckpointError, FormatVersionError
from lord_quant.plan import build_plan
from lord_quant.targets import LinearSite
from lord_quant.version import FORMAT_VERSION, MIXED_FORMAT_VERSION, __version__


# Configuration


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, None, True, [1]])
def test_a_version_that_is_none(version: object) -> None:
    with pytest.raises(CheckpointError, match="format_version is"):
        check_version({"format_version": version})


def test_a_newer_version_asks_for_an_upgrade_and_known_ones_pass() -> None:
    with pytest.raises(FormatVersionError, match=f"format_version {FORMAT_VERSION + 1}.*up to {FORMAT_VERSION}.*upgrade"):
        check_version({"format_version": FORMAT_VERSION + 1})
    for version in range(1, FORMAT_VERSION + 1):
        check_version({"format_version": version, "rank_pattern": {"a": 1}})
    check_version({})


@pytest.mark.parametrize("pattern", ["a", ["a"], 3])
@pytest.mark.parametrize("kind", ["rank", "form", "group", "bits", "group_size"])
def test_a_pattern_that_is_no_mapping(kind: str, pattern: object) -> None:
    wanted = f"{kind}_pattern is {type(pattern).__name__}; wanted a mapping of path to {kind}"
    with pytest.raises(CheckpointError, match=wanted):
        check_version({"format_version": 1, f"{kind}_pattern": pattern})
    check_version({"format_version": 2, f"{kind}_pattern": None})


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("form", ["two_factor", "pivoted", "column_pivoted"])
def test_forms_are_recorded_only_where_they_are_not_the_usual_one(form: str, bits: int) -> None:
    sites = [LinearSite("h.0.up", 0, 256, 1024, False), LinearSite("h.0.down", 0, 1024, 256, False)]
    gptq, lowrank = GptqConfig(bits=bits, group_size=64), LowrankConfig(rank_pattern={"up": 128}, form=form)
    values = quantization_config(build_plan(sites, lowrank, gptq, itemsize=4, other_bytes=0), gptq, "gptq_v2")
    assert values.get("form_pattern") == ({"h.0.up": form} if form != "two_factor" else None)
    assert values["format_version"] == (6 if form == "column_pivoted" else 2)
    assert json.loads(json.dumps(values)) == values
    check_version(values)


@pytest.mark.parametrize("bits", [4, 16])
def test_groups_are_recorded_and_take_the_newest_version(bits: int) -> None:
    sites = [LinearSite(f"h.0.mlp.{name}_proj", 0, 256, 512, False) for name in ("gate", "up")]
    gptq, lowrank = GptqConfig(bits=bits, group_size=64), LowrankConfig(rank_ratio=0.5, form="grouped")
    values = quantization_config(build_plan(sites, lowrank, gptq, itemsize=4, other_bytes=0), gptq, "gptq_v2")
    assert values["group_pattern"] == {"h.0.mlp.up_proj": "h.0.mlp.gate_proj"}
    assert values["form_pattern"] == dict.fromkeys(("h.0.mlp.gate_proj", "h.0.mlp.up_proj"), "grouped")
    assert values["format_version"] == MIXED_FORMAT_VERSION == 3 and "bits_pattern" not in values
    assert json.loads(json.dumps(values)) == values
    check_version(values)


@pytest.mark.parametrize("bits", [4, 16])
def test_quantization_config_says_what_was_done_and_is_json(bits: int) -> None:
    site = LinearSite("h.0.up", 0, 256, 1024, False)
    gptq = GptqConfig(bits=bits, group_size=64, sym=False, desc_act=True, damp_percent=0.05)
    plan = build_plan([site], LowrankConfig(rank_ratio=0.5), gptq, itemsize=4, other_bytes=0)
    values = quantization_config(plan, gptq, "gptq_v2")
    assert json.loads(json.dumps(values)) == values
    common = {
        "quant_method": "lord_gptq" if bits == 4 else "lord",
        "format_version": 2,  # which older releases read
        "lord_quant_version": __version__,
        "rank_pattern": {"h.0.up": 128},
        "mean_correction": True,
    }
    assert {key: values[key] for key in common} == common
    if bits == 16:
        assert set(values) == set(common)
    else:
        assert (values["bits"], values["group_size"], values["sym"], values["desc_act"]) == (4, 64, False, True)
        assert values["format"] == "gptq_v2" and values["block_name_to_quantize"] == "h" and values["damp_percent"] == 0.05
    check_version(values)


def test_checkpoints_take_the_oldest_version_that_knows_what_is_in_them() -> None:
    sites = [LinearSite("h.0.up", 0, 256, 1024, False), LinearSite("h.0.down", 0, 1024, 256, False)]
    uniform = {"bits_pattern": {"up": 4, "down": 4}, "group_size_pattern": {"all": 64}}
    cases: list[tuple[dict, dict]] = [
        ({}, {}),
        (uniform, {}),
        ({"bits_pattern": {"all": 8, "up": 3}}, {"bits_pattern": {"h.0.down": 8, "h.0.up": 3}}),
        ({"group_size_pattern": {"up": 32}}, {"group_size_pattern": {"h.0.up": 32}}),
        ({"group_size_pattern": {"up.up": 32}}, {"group_size_pattern": {"h.0.up.up": 32}}),
    ]
    for settings, recorded in cases:
        gptq = GptqConfig(bits=4, group_size=64, **settings)
        plan = build_plan(sites, LowrankConfig(rank_ratio=0.5), gptq, itemsize=4, other_bytes=0)
        values = quantization_config(plan, gptq, "gptq_v2")
        own_factor = any(name.endswith(".up.up") for name in recorded.get("group_size_pattern", ()))
        assert values["format_version"] == (5 if own_factor else 3 if recorded else 2)
        assert {key: values[key] for key in ("bits_pattern", "group_size_pattern") if key in values} == recorded
        assert (values["bits"], values["group_size"]) == (4, 64)
        assert json.loads(json.dumps(values)) == values
        check_version(values)
    gptq = GptqConfig(bits=4, group_size=64)
    plan = build_plan(sites, LowrankConfig(rank_ratio=0.5), gptq, itemsize=4, other_bytes=0)
    kept = dataclasses.replace(plan, layers=(plan.layers[0], dataclasses.replace(plan.layers[1], bits=16, up_bits=16)))
    assert quantization_config(kept, gptq, "gptq_v2")["format_version"] == 4
    gptq = GptqConfig(bits=16, group_size=64, group_size_pattern={"up": 32})  # here it only says which ranks are legal
    plan = build_plan(sites, LowrankConfig(rank_ratio=0.5), gptq, itemsize=4, other_bytes=0)
    values = quantization_config(plan, gptq, "")
    assert values["format_version"] == 2 and "group_size_pattern" not in values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_floats_casts_parameters_and_nothing_else(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("frequencies", torch.ones(2))
    model.register_buffer("order", torch.ones(2, dtype=torch.int16))
    model.codes = nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)
    weight = model.weight.detach().clone()
    cast_floats(model, dtype)
    assert model.weight.dtype == model.bias.dtype == dtype and isinstance(model.weight, nn.Parameter)
    assert torch.equal(model.weight, weight.to(dtype))
    assert model.frequencies.dtype == torch.float32 and model.codes.dtype == torch.int32
    assert model.order.dtype == torch.int16
    assert math.prod(model.weight.shape) == 6
