# SPDX-License-Identifier: Apache-2.0
"""Blocks that get their weights when their turn comes: the same model, and nothing left when it is over."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, edit_tensors, probe_tokens, save

from lord_quant.errors import ModelError, NumericsError, OutputError
from lord_quant.residency import RESIDENT, Streamed
from lord_quant.sensitivity import Sensitivity
from lord_quant.source import build_skeleton, inspect_source, load_model, stream_source


CPU = torch.device("cpu")


def streamed(folder: Path) -> tuple[Any, Streamed]:
    found = stream_source(inspect_source(str(folder)), CPU)
    assert found is not None
    return found


@pytest.mark.parametrize("family", ["gpt_bigcode", "codegen", "gpt2", "llama", "qwen3", "mistral"])
def test_blocks_are_those_of_the_loaded_model_and_go_again(family: str, tmp_path: Path) -> None:
    folder = save(build(family), tmp_path / "model")
    loaded = load_model(inspect_source(str(folder)), CPU)
    model, residency = streamed(folder)
    count = len(residency.blocks.modules)
    names = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert names == {name for name, _ in model.named_parameters() if name.startswith(f"{residency.blocks.path}.")}
    for _ in range(2):
        with residency.of(*range(count)), torch.no_grad():
            assert torch.equal(model(probe_tokens()).logits, loaded(probe_tokens()).logits)
        assert {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"} == names
    with residency.of(1):
        held = {name.split(f"{residency.blocks.path}.")[1][0] for name in names if not _on_meta(model, name)}
    assert held == {"1"}


def _on_meta(model: Any, name: str) -> bool:
    return bool(model.get_parameter(name).device.type == "meta")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied(tied: bool, tmp_path: Path) -> None:
    model, _ = streamed(save(build("llama", tie_word_embeddings=tied), tmp_path / "model"))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_names_without_the_base_model_are_found(tmp_path: Path) -> None:
    folder = save(build("gpt2"), tmp_path / "model")
    loaded = load_model(inspect_source(str(folder)), CPU)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    edit_tensors(folder, strip)
    model, residency = streamed(folder)
    with residency.of(0, 1), torch.no_grad():
        assert torch.equal(model(probe_tokens()).logits, loaded(probe_tokens()).logits)


def test_other_names_and_shapes_are_told(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "model")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.query.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
        tensors["model.norm.weight"] = torch.ones(3)

    edit_tensors(folder, spoil)
    source = inspect_source(str(folder))
    error = (
        r"missing: model\.layers\.0\.self_attn\.q_proj\.weight\n.*model\.norm\.weight is \(3,\), config\.json says \(128,\)"
    )
    with pytest.raises(ModelError, match=error):
        Streamed(build_skeleton(source), [str(folder / "model.safetensors")], torch.float32, CPU)
    assert stream_source(source, CPU) is None


def test_a_weight_that_is_not_finite_is_named_when_its_turn_comes(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(torch.nan))
    _, residency = streamed(folder)
    with residency.of(0):
        pass
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"), residency.of(1):
        pass


def test_what_is_kept_comes_back_once_and_leaves_no_file(tmp_path: Path) -> None:
    _, residency = streamed(save(build("llama"), tmp_path / "model"))
    residency.scratch = tmp_path / "scratch"
    given = [torch.randn(2, 3, 4), torch.randn(1, 5, dtype=torch.float64), torch.randn(4, 4).to(torch.bfloat16).T]
    with pytest.raises(OutputError, match=r"activations cannot be kept in '.*scratch'"):
        residency.keep(given)
    residency.scratch.mkdir()
    kept, left = residency.keep(given), residency.keep(given)
    assert len(list(residency.scratch.iterdir())) == 2
    for found, wanted in zip(kept.take(), given, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    del left
    assert not list(residency.scratch.iterdir())


def test_what_is_kept_of_a_model_in_memory_is_let_go_once_taken() -> None:
    tensor = torch.ones(2)
    kept = RESIDENT.keep([tensor])
    assert kept.take()[0] is tensor and kept.take() == []


def test_without_a_folder_of_its_own_a_temporary_one_is_made_and_removed(tmp_path: Path) -> None:
    model, residency = streamed(save(build("llama"), tmp_path / "model"))
    sensitivity = Sensitivity.measure(model, [probe_tokens()], residency=residency)
    folder = residency.scratch
    assert folder is not None and len(list(folder.iterdir())) == len(residency.blocks.modules)
    del sensitivity, residency, model
    gc.collect()
    assert not folder.exists()
