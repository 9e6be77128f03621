# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the first GPTQ format: zeros less one, all else alike, and loaded to the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from lord_quant import convert_to_gptq_v1
from lord_quant.artifact.manifest import changed_files, read_manifest, write_manifest
from lord_quant.errors import CheckpointError, OutputError
from lord_quant.files.claim import claimed
from lord_quant.files.packing import pack_words, unpack_words


SCHEMES: dict[str, dict[str, Any]] = {
    "8-bit": {"bits": 8, "sym": True},
    "mixed": {"bits": 4, "bits_pattern": {"mlp": 3, "up_proj": 8, "o_proj": 2}, "desc_act": True},
}


@pytest.fixture(scope="module", params=SCHEMES)
def packed(
    request: pytest.FixtureRequest,
    model_folder: Callable[..., Path],
    corpus_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("v1") / request.param
    lowrank = {"rank_pattern": {"mlp.up_proj": 32, "mlp.down_proj": 64}}
    model = model_folder("llama", num_hidden_layers=1)
    families.compress(model, folder, corpus_file, gptq=SCHEMES[request.param], lowrank=lowrank)
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_it_differs_in_zeros_alone_and_loads_to_the_same_bits(packed: Path, tmp_path: Path) -> None:
    convert_to_gptq_v1(packed, tmp_path / "v1")
    before, after = families.stored_tensors(packed), families.stored_tensors(tmp_path / "v1")
    different = families.different_tensors(packed, tmp_path / "v1")
    assert set(different) == {name for name in before if name.endswith(".qzeros")} and different
    for name in different:
        layer = name.removesuffix(".qzeros")
        bits = 32 * len(before[f"{layer}.qweight"]) // len(before[f"{layer}.g_idx"])
        assert torch.equal(unpack_words(after[name].T, bits), unpack_words(before[name].T, bits) - 1)
    config = json.loads((tmp_path / "v1" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "gptq"
    assert {path.name for path in (tmp_path / "v1").iterdir()} == {path.name for path in packed.iterdir()}
    expected = families.probe_logits(load(packed))
    assert torch.equal(families.probe_logits(load(tmp_path / "v1")), expected)
    # What is loaded has zeros as they are again, and must say so when it is saved.
    load(tmp_path / "v1").save_pretrained(tmp_path / "again")
    assert not families.different_tensors(packed, tmp_path / "again")
    assert torch.equal(families.probe_logits(load(tmp_path / "again")), expected)


def test_what_vouches_for_the_files_is_made_anew(packed: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(packed, own)
    (own / "additional_chat_templates").mkdir()
    (own / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    write_manifest(own, None)
    convert_to_gptq_v1(own, tmp_path / "v1")
    assert (tmp_path / "v1" / "additional_chat_templates" / "tool.jinja").read_text() == "{{ tools }}"
    manifest = read_manifest(tmp_path / "v1")
    assert manifest is not None and list(changed_files(tmp_path / "v1", manifest)) == []


def test_two_at_a_time_are_refused(packed: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "v1"), pytest.raises(OutputError, match=r"another run is writing .*v1'"):
        convert_to_gptq_v1(packed, tmp_path / "v1")
    assert not list(tmp_path.iterdir())


def test_zeros_of_0_are_refused_and_named(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "zero"))
    name = "model.layers.0.mlp.down_proj.up.qzeros"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        layer = name.removesuffix(".qzeros")
        bits = 32 * len(tensors[f"{layer}.qweight"]) // len(tensors[f"{layer}.g_idx"])
        zeros = unpack_words(tensors[name].T, bits)
        zeros[5, 0] = 0
        tensors[name] = pack_words(zeros, bits).T.contiguous()

    families.edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=r"--sym. Layers:\n  model.layers.0.mlp.down_proj.up$"):
        convert_to_gptq_v1(folder, tmp_path / "v1")
    assert [path.name for path in tmp_path.iterdir()] == ["zero"]


def test_only_packed_checkpoints_in_the_second_format_are_taken(packed: Path, tmp_path: Path) -> None:
    convert_to_gptq_v1(packed, tmp_path / "v1")
    with pytest.raises(CheckpointError, match="in format 'gptq'; wanted 'lord_gptq' in 'gptq_v2'"):
        convert_to_gptq_v1(tmp_path / "v1", tmp_path / "v0")
    with pytest.raises(CheckpointError, match="no packed checkpoint"):
        convert_to_gptq_v1(families.TOKENIZER, tmp_path / "v0")
    with pytest.raises(OutputError, match="not empty"):
        convert_to_gptq_v1(packed, tmp_path / "v1")
    (tmp_path / "v1" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no packed checkpoint"):
        convert_to_gptq_v1(tmp_path / "v1", tmp_path / "v0")
