# SPDX-License-Identifier: Apache-2.0
"""Packed checkpoints rewritten with zeros as the first GPTQ format stores them.

A packed weight is s (q − z). The second format, ``gptq_v2``, which all runs write, stores z. The first, ``gptq``, which
AutoGPTQ and older kernels read, stores z − 1, and readers add one; everything else is alike. A zero of 0 has no place in
it: GPTQModel adds one to whole words and would carry into the next field; AutoGPTQ adds it field by field and ends at 0 in
one of its layers and at 2^bits in another. Symmetric grids have no zero of 0; asymmetric ones do where all weights of a
group have one sign, which hardly ever happens. Such a checkpoint is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lord_quant.artifact.manifest import MANIFEST_NAME, read_manifest, write_manifest
from lord_quant.checkpoint import METHOD_GPTQ, atomic_folder, check_output
from lord_quant.errors import CheckpointError
from lord_quant.files.claim import claimed
from lord_quant.files.headers import read_headers, weight_files
from lord_quant.files.packing import pack_words, unpack_words


FIRST, SECOND = "gptq", "gptq_v2"
FORMAT_KEYS = ("format", "checkpoint_format")
QZEROS = ".qzeros"


def convert_to_gptq_v1(folder: str | Path, output: str | Path) -> None:
    """Writes a packed checkpoint again in the first GPTQ format; it loads like the one it was made from.

    Args:
        folder: A packed checkpoint of this package.
        output: New or empty folder. It appears by one rename.

    Raises:
        CheckpointError: The folder holds no packed checkpoint in the second format, or zeros of 0; layers are named.
        OutputError: The output is not empty, cannot be written, or another run is writing it.
    """
    source = Path(folder).expanduser()
    config = _read_config(source)
    files, manifest = weight_files(source), read_manifest(source)
    inputs, words = _sizes_of(files)
    place = check_output(output, model=str(source))
    with claimed(place), atomic_folder(place) as staging:
        refused = [name for file in files for name in _convert_file(Path(file), staging, inputs, words)]
        if refused:
            more = [f"… and {len(refused) - 10} more"] if len(refused) > 10 else []
            problem = f"zeros of 0 have no place in format {FIRST!r}; wanted a checkpoint made with --sym. Layers:"
            raise CheckpointError("\n  ".join([problem, *refused[:10], *more]))
        for path in source.iterdir():
            if path.is_dir():
                if not path.name.startswith("."):  # what a download or a repository keeps for itself
                    shutil.copytree(path, staging / path.name)
            elif path.name not in ("config.json", MANIFEST_NAME) and str(path) not in files:
                shutil.copy(path, staging)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if manifest is not None:
            write_manifest(staging, manifest.fingerprint)


def _read_config(folder: Path) -> dict[str, object]:
    """Reads a checkpoint's configuration and gives it the name of the first format."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantization = config["quantization_config"]
        method, found = quantization["quant_method"], quantization["format"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{str(folder)!r} is no packed checkpoint: {error!r}") from error
    if (method, found) != (METHOD_GPTQ, SECOND):
        raise CheckpointError(f"{str(folder)!r} is {method!r} in format {found!r}; wanted {METHOD_GPTQ!r} in {SECOND!r}")
    config["quantization_config"] = quantization | {key: FIRST for key in FORMAT_KEYS if key in quantization}
    return config


def _sizes_of(files: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the inputs of every packed layer, and the words that hold a column of its codes, from the files' headers."""
    shapes = {name: shape for name, (shape, _, _) in read_headers(files).items()}
    layers = [name.removesuffix(QZEROS) for name in shapes if name.endswith(QZEROS)]
    try:
        return {n: shapes[f"{n}.g_idx"][0] for n in layers}, {n: shapes[f"{n}.qweight"][0] for n in layers}
    except KeyError as error:
        raise CheckpointError(f"the weights do not hold every packed layer; missing: {error}") from error


def _convert_file(file: Path, staging: Path, inputs: dict[str, int], words: dict[str, int]) -> list[str]:
    """Writes one file again; returns the layers in it that cannot be converted."""
    from safetensors.torch import load_file, save_file

    tensors, refused = load_file(file), list[str]()
    for name, tensor in tensors.items():
        if name.endswith(QZEROS):
            layer = name.removesuffix(QZEROS)
            bits = 32 * words[layer] // inputs[layer]
            zeros = unpack_words(tensor.T, bits)
            if bool((zeros == 0).any()):
                refused.append(layer)
            else:
                tensors[name] = pack_words(zeros - 1, bits).T.contiguous()
    if not refused:
        save_file(tensors, staging / file.name, metadata={"format": "pt"})
    return refused
