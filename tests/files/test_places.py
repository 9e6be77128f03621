# SPDX-License-Identifier: Apache-2.0
"""Where tensors are stored: under other names than in memory, twice, or not at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, edit_tensors, probe_logits, save
from safetensors.torch import save_file

from lord_quant.blocks.residency import Streamed
from lord_quant.blocks.source import build_skeleton, inspect_source, load_model, stream_source
from lord_quant.errors import LayoutError, ModelError
from lord_quant.files import places
from lord_quant.files.places import Place, places_of, refuse_unread, stored_apart


CPU = torch.device("cpu")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def file_of(folder: Path) -> str:
    return str(folder / "model.safetensors")


def tied_twice(folder: Path, change: float) -> Path:
    """A model that ties its head and stores it all the same, its last entry changed."""
    save(build("llama", tie_word_embeddings=True), folder)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] += change

    edit_tensors(folder, add)
    return folder


def test_names_without_the_base_model_are_found(tmp_path: Path) -> None:
    folder = save(build("gpt2"), tmp_path / "model")
    loaded = load_model(inspect_source(str(folder)), CPU)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    edit_tensors(folder, strip)
    require_streamed(folder, probe_logits(loaded))


def require_streamed(folder: Path, logits: torch.Tensor) -> None:
    found = stream_source(inspect_source(str(folder)), CPU)
    assert found is not None
    model, residency = found
    with residency.of(0, 1):
        assert torch.equal(probe_logits(model), logits)


def test_a_head_that_saving_renames_is_found(tmp_path: Path) -> None:
    dense = build("gpt_neox")
    folder = save(dense, tmp_path / "model")
    assert places_of(dense, [file_of(folder)])[HEAD] == Place(file_of(folder), "embed_out.weight")
    require_streamed(folder, probe_logits(dense))


def test_experts_that_loading_merges_are_no_tensors_to_stream(tmp_path: Path) -> None:
    dense = build("mixtral")
    folder = save(dense, tmp_path / "model")
    with pytest.raises(LayoutError, match=r"missing: model\.layers\.0\.mlp\.experts\.gate_up_proj\n"):
        places_of(dense, [file_of(folder)])
    assert stream_source(inspect_source(str(folder)), CPU) is None


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
    with pytest.raises(LayoutError, match=error):
        Streamed(build_skeleton(source), [str(folder / "model.safetensors")], torch.float32, CPU)
    assert stream_source(source, CPU) is None


@pytest.mark.parametrize(("change", "rows"), [(0.0, 4096), (1e-3, 4096), (0.0, 7), (1e-3, 7)])
def test_tied_tensors_that_differ_are_told_apart(
    change: float, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "ROWS_AT_ONCE", rows)
    folder = tied_twice(tmp_path / "model", change)
    skeleton: Any = build("llama", tie_word_embeddings=True)
    assert stored_apart(skeleton, [file_of(folder)]) == ((EMBEDDING, HEAD) if change else None)
    assert stored_apart(build("llama", tie_word_embeddings=False), [file_of(folder)]) is None


def test_tied_numbers_are_compared_too(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Module(), "b": torch.nn.Module()})
    model["a"].scale = model["b"].scale = torch.nn.Parameter(torch.tensor(1.0))
    for other, apart in ((1.0, None), (2.0, ("a.scale", "b.scale"))):
        save_file({"a.scale": torch.tensor(1.0), "b.scale": torch.tensor(other)}, tmp_path / "model.safetensors")
        assert stored_apart(model, [file_of(tmp_path)]) == apart


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_head_and_embedding_are_as_transformers_loads_them(change: float, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tied_twice(tmp_path / "model", change)
    source = inspect_source(str(folder))
    loaded = load_model(source, CPU)
    for model in (loaded, build_skeleton(source)):
        assert model.config.tie_word_embeddings == (change == 0)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (change == 0)
    theirs = probe_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert torch.equal(probe_logits(loaded), theirs)
    require_streamed(folder, theirs)


def unread(folder: Path) -> list[str]:
    return refuse_unread(build_skeleton(inspect_source(str(folder))), [file_of(folder)])


def test_masks_and_frequencies_of_old_checkpoints_are_no_weights(tmp_path: Path) -> None:
    folder = save(build("gpt2"), tmp_path / "model")
    old = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    old |= {"transformer.h.1.rotary_emb.inv_freq": torch.ones(8), "transformer.h.1.attn.mask": torch.ones(8, 8).bool()}
    edit_tensors(folder, lambda tensors: tensors.update(old))
    assert unread(folder) == []


def test_weights_of_a_block_that_the_model_does_not_have_are_refused_and_others_named(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "model")
    further = {"model.layers.2.mlp.down_proj.weight": torch.ones(4, 4), "score.weight": torch.ones(2, 4)}
    edit_tensors(folder, lambda tensors: tensors.update(further))
    assert sorted(unread(folder)) == sorted(further)
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.1.mlp.down_proj.bias": torch.ones(4)}))
    with pytest.raises(
        ModelError, match=r"blocks that LlamaForCausalLM does not have: model\.layers\.1\.mlp\.down_proj\.bias$"
    ):
        unread(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_are_quantized_though_config_json_does_not_say_so_are_refused(dtype: Any, tmp_path: Path) -> None:
    folder, name = save(build("llama"), tmp_path / "model"), "model.layers.0.mlp.down_proj.weight"

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[f"{name}_scale"] = torch.ones(128, 1)

    edit_tensors(folder, quantize)
    with pytest.raises(
        ModelError, match=rf"no dense model, weights are not stored as floats: {re.escape(name)} is (F8_E4M3|I8)"
    ):
        unread(folder)


def test_experts_that_loading_merges_are_not_held_against_the_files(tmp_path: Path) -> None:
    assert unread(save(build("mixtral"), tmp_path / "model")) == []
