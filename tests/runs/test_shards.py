# SPDX-License-Identifier: Apache-2.0
"""Weights written block by block: nothing twice, nothing lost, one file or many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import build
from safetensors.torch import load_file, save_file

from lord_quant.files.headers import weight_files
from lord_quant.runs import shards
from lord_quant.runs.shards import INDEX, SINGLE_FILE, join_shards, outside, write_shard


@pytest.mark.parametrize(("family", "path", "tied"), [("gpt2", "transformer.h", True), ("llama", "model.layers", False)])
def test_what_stands_outside_the_blocks_is_there_once(family: str, path: str, tied: bool) -> None:
    model = build(family)
    found = outside(model, path)
    assert not [name for name in found if name.startswith(f"{path}.")]
    whole = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{path}.")}
    assert whole.keys() - found.keys() == ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(found[name], whole[name]) for name in found)


@pytest.mark.parametrize("small", [2**28, 100], ids=["one file", "many"])
def test_shards_and_what_is_outside_make_the_whole_model(
    small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SMALL", small)
    model = build("llama")
    parts, folder = [], tmp_path / "out"
    folder.mkdir()
    save_file(outside(model, "model.layers"), folder / SINGLE_FILE, metadata={"format": "pt"})
    for index, block in enumerate(model.model.layers):
        parts.append(tmp_path / f"{index}.safetensors")
        write_shard(block, f"model.layers.{index}.", parts[-1])
    join_shards(folder, parts)
    files = weight_files(folder)
    assert len(files) == (1 if small > 100 else 3) and (folder / INDEX).exists() == (len(files) == 3)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert all(path.is_file() for path in parts)  # a run that is cut off here needs them again
    if len(files) == 3:
        total = json.loads((folder / INDEX).read_text())["metadata"]["total_size"]
        assert total == sum(tensor.nbytes for tensor in found.values())
