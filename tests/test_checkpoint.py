# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's configuration says, and holding the tensors in its files against the plan."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lord_quant.checkpoint import (
    cast_floats,
    check_tensors,
    check_version,
    quantization_config,
    read_headers,
    weight_files,
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
@pytest.mark.parametrize("form", ["two_factor", "pivoted"])
def test_forms_are_recorded_only_where_they_are_not_the_usual_one(form: str, bits: int) -> None:
    sites = [LinearSite("h.0.up", 0, 256, 1024, False), LinearSite("h.0.down", 0, 1024, 256, False)]
    gptq, lowrank = GptqConfig(bits=bits, group_size=64), LowrankConfig(rank_pattern={"up": 128}, form=form)
    values = quantization_config(build_plan(sites, lowrank, gptq, itemsize=4, other_bytes=0), gptq, "gptq_v2")
    assert values.get("form_pattern") == ({"h.0.up": "pivoted"} if form == "pivoted" else None)
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


def test_only_mixed_checkpoints_take_the_newest_version() -> None:
    sites = [LinearSite("h.0.up", 0, 256, 1024, False), LinearSite("h.0.down", 0, 1024, 256, False)]
    uniform = {"bits_pattern": {"up": 4, "down": 4}, "group_size_pattern": {"all": 64}}
    cases: list[tuple[dict, dict]] = [
        ({}, {}),
        (uniform, {}),
        ({"bits_pattern": {"all": 8, "up": 3}}, {"bits_pattern": {"h.0.down": 8, "h.0.up": 3}}),
        ({"group_size_pattern": {"up": 32}}, {"group_size_pattern": {"h.0.up": 32}}),
    ]
    for settings, recorded in cases:
        gptq = GptqConfig(bits=4, group_size=64, **settings)
        plan = build_plan(sites, LowrankConfig(rank_ratio=0.5), gptq, itemsize=4, other_bytes=0)
        values = quantization_config(plan, gptq, "gptq_v2")
        assert values["format_version"] == (3 if recorded else 2)
        assert {key: values[key] for key in ("bits_pattern", "group_size_pattern") if key in values} == recorded
        assert (values["bits"], values["group_size"]) == (4, 64)
        assert json.loads(json.dumps(values)) == values
        check_version(values)
    gptq = GptqConfig(bits=16, group_size=64, group_size_pattern={"up": 32})  # here it only says which ranks are legal
    plan = build_plan(sites, LowrankConfig(rank_ratio=0.5), gptq, itemsize=4, other_bytes=0)
    values = quantization_config(plan, gptq, "")
    assert values["format_version"] == 2 and "group_size_pattern" not in values


# Tensors in files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def test_headers_give_shape_dtype_and_the_bytes_that_are_in_the_file(tmp_path: Path) -> None:
    shapes = [(3, 5), (7,), (), (2, 0), (2, 3, 4)]
    tensors = {
        f"{name}.{i}": torch.zeros(shape).to(dtype) for name, dtype in DTYPES.items() for i, shape in enumerate(shapes)
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    headers = read_headers([str(path)])
    assert headers.keys() == tensors.keys()
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    stored = json.loads(raw[8 : 8 + length])
    for name, (shape, dtype, size) in headers.items():
        assert shape == tuple(tensors[name].shape) and dtype == name.partition(".")[0]
        begin, end = stored[name]["data_offsets"]
        assert size == end - begin == tensors[name].numel() * tensors[name].element_size()
    assert sum(size for _, _, size in headers.values()) == len(raw) - 8 - length


def test_headers_of_several_files_are_joined(tmp_path: Path) -> None:
    files = []
    for name in "ab":
        files.append(str(tmp_path / f"{name}.safetensors"))
        save_file({name: torch.zeros(2)}, files[-1])
    assert set(read_headers(files)) == {"a", "b"}
    assert weight_files(tmp_path) == files


@pytest.mark.parametrize("data", [b"", b"not safetensors at all, but long enough", b"\x80\x00\x00\x00\x00\x00\x00\x00{"])
def test_what_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors.*not a readable safetensors"):
        read_headers([str(path)])


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        read_headers([str(path)])


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        read_headers([str(tmp_path / "absent.safetensors")])
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        weight_files(tmp_path)


EXPECTED = {
    "h.0.up.down.weight": (2, 4),
    "h.0.up.up.weight": (6, 2),
    "h.0.up.up.bias": (6,),
    "h.0.norm.weight": (4,),
    "h.0.out.down.weight": (2, 4),
    "h.0.out.up.weight": (4, 2),
    "h.0.out.order": (6,),
}


def check(tmp_path: Path, changes: dict[str, tuple[int, ...] | None], expected: dict = EXPECTED) -> str:
    """Returns the message for a file that holds `EXPECTED` with changes, or an empty string when it is accepted."""
    shapes = {name: shape for name, shape in (EXPECTED | changes).items() if shape is not None}
    path = tmp_path / "a.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    try:
        check_tensors(expected, [str(path)], "h")
    except CheckpointError as error:
        return str(error)
    return ""


def test_the_right_tensors_are_accepted(tmp_path: Path) -> None:
    assert check(tmp_path, {}) == ""
    # what is outside the blocks, or no weight of ours, is none of our business
    assert check(tmp_path, {"lm_head.weight": (9, 4), "wte.weight": (9, 4), "h.0.attn.masked_bias": (1,)}) == ""
    assert check(tmp_path, {"h.0.rotary.weight": (3,), "order": (3,), "g.0.order": (3,)}) == ""


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"h.0.up.up.bias": None}, "missing: h.0.up.up.bias (6,)"),
        ({"h.0.up.down.weight": (3, 4)}, "wrong shape: h.0.up.down.weight is (3, 4), the plan wants (2, 4)"),
        ({"h.0.fc.down.weight": (2, 4)}, "unexpected: h.0.fc.down.weight"),
        ({"h.0.fc.qweight": (2, 4)}, "unexpected: h.0.fc.qweight"),
        ({"h.0.up.down.bias": (2,)}, "unexpected: h.0.up.down.bias"),
        ({"h.1.fc.up.scales": (2, 4)}, "unexpected: h.1.fc.up.scales"),
        ({"h.0.out.order": None}, "missing: h.0.out.order (6,)"),
        ({"h.0.out.order": (5,)}, "wrong shape: h.0.out.order is (5,), the plan wants (6,)"),
        ({"h.1.fc.order": (6,)}, "unexpected: h.1.fc.order"),
        ({"h.0.out.down.bias": (2,)}, "unexpected: h.0.out.down.bias"),
    ],
)
def test_tensors_that_do_not_match_are_named(tmp_path: Path, changes: dict, part: str) -> None:
    message = check(tmp_path, changes)
    assert part in message and "do not match quantization_config" in message
    assert message.count("\n") == 1


def test_a_layer_that_should_be_decomposed_but_is_dense(tmp_path: Path) -> None:
    message = check(tmp_path, {"h.0.up.down.weight": None, "h.0.up.up.weight": None, "h.0.up.weight": (6, 4)})
    assert "missing: h.0.up.down.weight" in message and "missing: h.0.up.up.weight" in message


def test_at_most_ten_problems_are_listed(tmp_path: Path) -> None:
    expected = {f"h.0.{i}.weight": (2,) for i in range(14)}
    message = check(tmp_path, {}, EXPECTED | expected)
    assert message.count("missing:") == 10 and "and 4 more" in message


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
