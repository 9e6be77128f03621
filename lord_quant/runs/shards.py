# SPDX-License-Identifier: Apache-2.0
"""The weights of a model written block by block, each block a safetensors file of its own, joined in the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from lord_quant.checkpoint import atomic_file
from lord_quant.files.headers import INDEX, read_headers


SINGLE_FILE = "model.safetensors"
SMALL = 2**28
"""Most bytes of weights that are written as one file in the end."""


def write_shard(module: nn.Module, prefix: str, path: Path) -> None:
    """Writes all that is stored of a module, under its full names. It appears by one rename.

    Raises:
        OutputError: It cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with atomic_file(path) as staging:
        save_file(tensors, staging, metadata={"format": "pt"})


def outside(model: nn.Module, block_path: str) -> dict[str, torch.Tensor]:
    """Returns what a checkpoint holds beside the blocks, tied tensors once."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith(f"{block_path}."):
            found.setdefault(id(tensor), (name, tensor.detach()))
    return dict(found.values())


def join_shards(folder: Path, shards: Sequence[Path]) -> None:
    """Puts shards beside what else of a model lies in a folder as its one file; small models become one file again.

    Args:
        folder: Folder with a `model.safetensors` that holds what stands outside the blocks.
        shards: The blocks' files, in order; they stay where they are.
    """
    parts = [folder / SINGLE_FILE, *shards]
    sizes = {path: read_headers([str(path)]) for path in parts}
    total = sum(size for headers in sizes.values() for _, _, size in headers.values())
    if total <= SMALL:
        _merge(parts, folder / SINGLE_FILE)
        return
    where: dict[str, str] = {}
    for number, path in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        if path.parent == folder:
            path.rename(folder / name)
        else:
            _link(path, folder / name)
        where |= dict.fromkeys(sizes[path], name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _merge(parts: Sequence[Path], output: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors: Mapping[str, torch.Tensor] = {name: tensor for path in parts for name, tensor in load_file(path).items()}
    save_file(dict(sorted(tensors.items())), output, metadata={"format": "pt"})


def _link(path: Path, to: Path) -> None:
    """A second name costs no bytes, and the first one stays in case that this run is cut off; not all disks can."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)
