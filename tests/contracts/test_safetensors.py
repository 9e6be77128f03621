# SPDX-License-Identifier: Apache-2.0
"""What the product takes for granted about safetensors."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TENSORS = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "tensors.safetensors", metadata={"format": "pt"})
    return tmp_path / "tensors.safetensors"


def test_headers_tell_names_shapes_and_widths_of_dtypes(file: Path) -> None:
    """lord_quant/checkpoint.py measures files by what `safe_open` says of them, without reading tensors."""
    from safetensors import safe_open

    from lord_quant.files.headers import read_headers

    with safe_open(file, framework="pt") as handle:
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        assert {name: part.get_dtype() for name, part in parts.items()} == {name: name for name in DTYPES}
        assert all(tuple(part.get_shape()) == (2, 3) for part in parts.values())
    sizes = {name: size for name, (_, _, size) in read_headers([str(file)]).items()}
    assert sizes == {name: 6 * tensor.element_size() for name, tensor in TENSORS.items()}


def test_tensors_come_back_bit_for_bit_in_their_dtypes(file: Path) -> None:
    """lord_quant/runs/shards.py joins the files of blocks by loading and saving them."""
    from safetensors.torch import load_file

    found = load_file(file)
    assert found.keys() == TENSORS.keys()
    for name, tensor in found.items():
        assert tensor.dtype == DTYPES[name]
        assert torch.equal(tensor.view(torch.uint8), TENSORS[name].view(torch.uint8)), name


def test_metadata_is_kept(file: Path) -> None:
    """lord_quant/runs/shards.py marks files as `pt`, as transformers does."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_damaged_file_is_a_safetensor_error(left: int, file: Path) -> None:
    """lord_quant/blocks/residency.py tells a file that was cut short from other failures by that class."""
    from safetensors import SafetensorError, safe_open

    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(SafetensorError), safe_open(file, framework="pt"):
        pass


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    """lord_quant/checkpoint.py catches it beside `SafetensorError`."""
    from safetensors import safe_open

    with pytest.raises(OSError), safe_open(tmp_path / "none.safetensors", framework="pt"):
        pass


def test_a_file_that_cannot_grow_is_a_safetensor_error_or_an_os_error(tmp_path: Path) -> None:
    """lord_quant/checkpoint.py names the file and how to go on when a disk is full; here its size is limited."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises((SafetensorError, OSError), match="File too large"):
            save_file({"tensor": torch.zeros(1 << 14)}, tmp_path / "large.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
