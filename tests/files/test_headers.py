# SPDX-License-Identifier: Apache-2.0
"""Which files hold a checkpoint's weights, what their headers say, and holding the tensors in them against the plan."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lord_quant.errors import CheckpointError
from lord_quant.files.headers import check_tensors, read_headers, weight_files


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
        check_tensors({name: torch.empty(shape) for name, shape in expected.items()}, [str(path)], "h")
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


@pytest.mark.parametrize(
    ("stored", "wanted", "part"),
    [
        (torch.float32, torch.int32, "wrong dtype: h.a is F32, wanted I32"),
        (torch.int64, torch.int32, "wrong dtype: h.a is I64, wanted I32"),
        (torch.int32, torch.float16, "wrong dtype: h.a is I32, wanted F64 or F32 or F16 or BF16"),
        (torch.float8_e4m3fn, torch.float16, "wrong dtype: h.a is F8_E4M3, wanted F64 or F32 or F16 or BF16"),
        (torch.bfloat16, torch.float32, ""),
        (torch.int16, torch.int16, ""),
    ],
)
def test_floats_may_be_any_and_integers_are_what_they_are(
    stored: torch.dtype, wanted: torch.dtype, part: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"h.a": torch.zeros(4).to(stored)}, path)
    expected = {"h.a": torch.empty(4, dtype=wanted, device="meta")}
    if not part:
        check_tensors(expected, [str(path)], "h")
        return
    with pytest.raises(CheckpointError, match=part):
        check_tensors(expected, [str(path)], "h")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for file in files:
        save_file({"h.a": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"twice: h\.a, the second time in '.*b\.safetensors'"):
        check_tensors({"h.a": torch.empty(2)}, files, "h")
