# SPDX-License-Identifier: Apache-2.0
import json
import math
import os
import stat
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lord_quant.checkpoint import (
    atomic_folder,
    cast_floats,
    check_output,
    check_tensors,
    check_version,
    quantization_config,
    read_headers,
    weight_files,
)
from lord_quant.config import GptqConfig, LowrankConfig
from lord_quant.errors import CheckpointError, FormatVersionError, OutputError
from lord_quant.plan import build_plan
from lord_quant.targets import LinearSite
from lord_quant.version import FORMAT_VERSION, __version__


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    (path / "model.safetensors").write_bytes(b"")
    return path


# What may be written to


@pytest.mark.parametrize("name", ["new", "new/deeper/still", "empty"])
def test_a_free_output_is_accepted_and_nothing_is_left_behind(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    before = listing(tmp_path)
    assert check_output(tmp_path / name) == tmp_path / name
    assert listing(tmp_path) == before


def test_a_relative_output_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_output("out") == tmp_path / "out"


def test_a_folder_with_anything_in_it_needs_overwrite(tmp_path: Path) -> None:
    out = model_folder(tmp_path / "out")
    with pytest.raises(OutputError, match=r"out' is not empty.*--overwrite"):
        check_output(out)
    assert check_output(out, overwrite=True) == out


def test_overwrite_only_replaces_model_folders(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no model folder"):
        check_output(tmp_path / "home", overwrite=True)
    (tmp_path / "home" / "config.json").write_text('{"editor": "vi"}')  # some other program's
    (tmp_path / "home" / "x.safetensors").write_bytes(b"")
    with pytest.raises(OutputError, match="no model folder"):
        check_output(tmp_path / "home", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=True)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_no_folder(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file", overwrite=overwrite)
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / "file" / "below", overwrite=overwrite)


@pytest.mark.parametrize("output", ["model", "model/../model", "link", "parent", "."])
def test_the_model_itself_and_what_holds_it_are_refused_even_with_overwrite(tmp_path: Path, output: str) -> None:
    folder = model_folder(tmp_path / "parent" / "model")
    (folder.parent / "config.json").write_text("{}")
    (folder.parent / "link").symlink_to(folder)
    for given in (str(folder), str(folder.parent / "link")):
        target = folder.parent / output if output not in ("parent", ".") else folder.parent / ("." if output == "." else "")
        with pytest.raises(OutputError, match="is or holds the model itself"):
            check_output(target, overwrite=True, model=given)
    assert (folder / "config.json").is_file()


def test_a_neighbour_of_the_model_and_a_hub_name_are_fine(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    check_output(tmp_path / "model-lord", model=str(folder))
    check_output(tmp_path / "out", model="org/model")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: /proc"):
        check_output("/proc/lord-quant-test")


def test_an_error_of_the_file_system_becomes_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lord_quant.checkpoint.tempfile.mkdtemp", refuse)
    with pytest.raises(OutputError, match=r"cannot be written.*Permission denied"):
        check_output(tmp_path / "out")


# Atomic writing


def test_the_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as staging:
        (staging / "a").write_text("1")
        (staging / "sub").mkdir()
        (staging / "sub" / "b").write_text("2")
        assert not out.exists() and staging.parent == out.parent
    assert listing(tmp_path) == ["deep", "deep/out", "deep/out/a", "deep/out/sub", "deep/out/sub/b"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_changes_nothing(tmp_path: Path, existing: bool, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "old").write_text("old")
    before = listing(tmp_path)
    with pytest.raises(error), atomic_folder(out) as staging:
        (staging / "new").write_text("new")
        raise error
    assert listing(tmp_path) == before


def test_an_existing_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = model_folder(tmp_path / "out")
    (out / "stale.safetensors").write_text("old")
    with atomic_folder(out, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
        assert (out / "stale.safetensors").read_text() == "old"  # still there while the new one is written
    assert listing(tmp_path) == ["out", "out/config.json"] and (out / "config.json").read_text() == "new"


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = model_folder(tmp_path / "out")
    rename = Path.rename

    def flaky(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", flaky)
    with (
        pytest.raises(OutputError, match=r"Input/output.*kept at") as caught,
        atomic_folder(out, overwrite=True) as staging,
    ):
        (staging / "config.json").write_text("new")
    assert "gpt2" in (out / "config.json").read_text()
    assert str(staging) in str(caught.value) and (staging / "config.json").read_text() == "new"  # hours of work


def test_what_appears_during_the_run_is_not_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"appeared.*kept at"), atomic_folder(out) as staging:
        (staging / "config.json").write_text("new")
        out.mkdir()
        (out / "precious.txt").write_text("years of work")
    assert (out / "precious.txt").read_text() == "years of work"
    assert (staging / "config.json").read_text() == "new"


def test_links_to_nowhere_and_mount_points_are_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="does not exist"):
        check_output(tmp_path / "link")
    with pytest.raises(OutputError, match="mount point"):
        check_output("/dev/shm")


def test_the_folder_has_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "out"):
            pass
        (tmp_path / "plain").mkdir()
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "plain")]
    assert modes == [0o750, 0o750]


# What the configuration says


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
def test_a_rank_pattern_that_is_no_mapping(pattern: object) -> None:
    with pytest.raises(CheckpointError, match=f"rank_pattern is {type(pattern).__name__}"):
        check_version({"format_version": 1, "rank_pattern": pattern})


@pytest.mark.parametrize("pattern", ["a", ["a"], 3])
def test_a_form_pattern_that_is_no_mapping(pattern: object) -> None:
    with pytest.raises(
        CheckpointError, match=f"form_pattern is {type(pattern).__name__}; wanted a mapping of path to form"
    ):
        check_version({"format_version": 2, "form_pattern": pattern})
    check_version({"format_version": 2, "rank_pattern": None, "form_pattern": None})


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
def test_quantization_config_says_what_was_done_and_is_json(bits: int) -> None:
    site = LinearSite("h.0.up", 0, 256, 1024, False)
    gptq = GptqConfig(bits=bits, group_size=64, sym=False, desc_act=True, damp_percent=0.05)
    plan = build_plan([site], LowrankConfig(rank_ratio=0.5), gptq, itemsize=4, other_bytes=0)
    values = quantization_config(plan, gptq, "gptq_v2")
    assert json.loads(json.dumps(values)) == values
    common = {
        "quant_method": "lord_gptq" if bits == 4 else "lord",
        "format_version": FORMAT_VERSION,
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
