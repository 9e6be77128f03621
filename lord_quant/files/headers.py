# SPDX-License-Identifier: Apache-2.0
"""Which files hold a checkpoint's weights, and what their headers say: names, shapes, dtypes, no tensors.

Files come from others. An index may name only safetensors files in its folder: a path that leads elsewhere would make a
loader read what the folder does not hold.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lord_quant.errors import CheckpointError
from lord_quant.files.reading import open_tensors, parse_json


Header = tuple[tuple[int, ...], str, int]
"""Shape, dtype as safetensors spells it, bytes."""
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}


def read_headers(files: Sequence[str]) -> dict[str, Header]:
    """Reads shape, dtype and bytes of every tensor in safetensors files, without reading the tensors.

    Raises:
        CheckpointError: A file is missing or no safetensors file.
    """
    return {name: header for file in files for name, header in _headers_of(file).items()}


def _headers_of(file: str) -> dict[str, Header]:
    from safetensors import SafetensorError

    headers = {}
    try:
        with open_tensors(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                part = handle.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                headers[name] = (shape, dtype, _bytes(shape, dtype))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file!r} is not a readable safetensors file: {error}") from error
    return headers


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    bits = int("".join(character for character in dtype.partition("_")[0] if character.isdigit()) or 8)
    return math.prod(shape) * bits // 8


def weight_files(folder: str | Path) -> list[str]:
    """Lists the safetensors files of a checkpoint folder: its one file, else those its index names, else all there are.

    Raises:
        CheckpointError: There is none, or the index is unreadable, names a file that is not there or one elsewhere.
    """
    folder = Path(folder)
    index, single = folder / INDEX, folder / "model.safetensors"
    if single.is_file():  # what transformers loads, index or not
        files = [str(single)]
    elif index.is_file():
        files = [str(folder / name) for name in _indexed(index)]
    else:
        files = sorted(str(path) for path in folder.glob(f"*{SUFFIX}"))
    if not files:
        raise CheckpointError(f"{str(folder)!r} holds no safetensors file")
    return files


def _indexed(index: Path) -> list[str]:
    """Returns the names of the files that an index names."""
    try:
        names = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        odd = [name for name in names if os.path.isabs(name) or ".." in Path(name).parts or not name.endswith(SUFFIX)]
        absent = [name for name in names if not (index.parent / name).is_file()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(index)!r} is not a readable index of safetensors files: {error!r}") from error
    if odd:
        listed = ", ".join(map(repr, odd[:10]))
        raise CheckpointError(f"{str(index)!r} names {listed}; wanted safetensors files in its folder")
    if absent:
        raise CheckpointError(f"{str(index)!r} names files that are not there: {', '.join(absent[:10])}")
    return names


def check_tensors(expected: Mapping[str, torch.Tensor], files: Sequence[str], under: str) -> None:
    """Holds the tensors in the files against those the plan calls for.

    Args:
        expected: Every tensor that must be there, by name; perhaps on the meta device, for its shape and dtype. What holds
            floats may be stored as any, integers are stored as they are.
        files: The safetensors files.
        under: Only tensors whose names begin with this path may be called unexpected.

    Raises:
        CheckpointError: Tensors are missing, unexpected, there twice, or of the wrong shape or dtype; up to ten are named.
    """
    headers: dict[str, Header] = {}
    problems = []
    for file in files:
        for name, header in _headers_of(file).items():
            if name in headers:
                problems.append(f"twice: {name}, the second time in {file!r}")
            headers[name] = header
    for name, tensor in expected.items():
        if name not in headers:
            problems.append(f"missing: {name} {tuple(tensor.shape)}")
            continue
        shape, dtype, _ = headers[name]
        wanted = tuple(FLOATS) if tensor.is_floating_point() else (INTEGERS.get(tensor.dtype, ""),)
        if shape != tuple(tensor.shape):
            problems.append(f"wrong shape: {name} is {shape}, the plan wants {tuple(tensor.shape)}")
        elif dtype not in wanted:
            problems.append(f"wrong dtype: {name} is {dtype}, wanted {' or '.join(wanted)}")
    owners = {name.rpartition(".")[0] for name in expected}
    packed = ("qweight", "qzeros", "scales", "g_idx", "weight", "order")
    for name in headers:
        owner, _, leaf = name.rpartition(".")
        stray = owner.endswith((".down", ".up")) or leaf in packed[:4] or leaf == "order"
        lost_bias = leaf == "bias" and owner in owners and name not in expected
        if name.startswith(f"{under}.") and (lost_bias or (leaf in packed and stray and name not in expected)):
            problems.append(f"unexpected: {name}")
    if problems:
        more = [f"… and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise CheckpointError(
            "\n  ".join(["the weights do not match quantization_config (was it edited?):", *problems[:10], *more])
        )
