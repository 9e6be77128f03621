# SPDX-License-Identifier: Apache-2.0
"""Models that read their layers' weights themselves: which are found, what is said of them, and that runs agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from model_runs import plan_of
from torch import nn

from lord_quant.config import LordConfig
from lord_quant.errors import ModelError
from lord_quant.runs.execution import execute
from lord_quant.runs.pipeline import prepare
from lord_quant.runs.weight_reads import refuse_weight_reads, weight_readers
from lord_quant.targets import find_linears, layer_type


STATE_SPACE = {
    "mamba": ("MambaConfig", {"state_size": 16, "time_step_rank": 32}),
    "mamba2": ("Mamba2Config", {"state_size": 12, "num_heads": 8, "head_dim": 32, "n_groups": 1}),
    "rwkv": ("RwkvConfig", {"context_length": families.CONTEXT, "attention_hidden_size": families.HIDDEN}),
}


@pytest.fixture(autouse=True)
def state_space_families(monkeypatch: pytest.MonkeyPatch) -> None:
    common = {**families._COMMON, "hidden_size": families.HIDDEN, "num_hidden_layers": 2}
    for name, (kind, values) in STATE_SPACE.items():
        monkeypatch.setitem(families.FAMILIES, name, (kind, {**common, **values}))


def skeleton(family: str) -> Any:
    with torch.device("meta"):
        return families.build(family)


def all_layers(model: nn.Module) -> list[str]:
    return [site.name for site in find_linears(model)]


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("mamba", ["mixer.dt_proj"]),
        ("rwkv", ["attention.output", "feed_forward.value"]),
        *((name, []) for name in ("mamba2", "gpt_bigcode", "codegen", "llama", "starcoder2", "gpt_neox")),
    ],
)
def test_layers_whose_weight_is_read_are_found(family: str, kinds: list[str]) -> None:
    model = skeleton(family)
    before, training = dict(model.named_modules()), model.training
    assert weight_readers(model, all_layers(model)) == kinds
    assert dict(model.named_modules()) == before and model.training == training


@pytest.mark.parametrize(
    "family", ["gpt_bigcode", "codegen", "gpt2", "llama", "qwen2", "qwen3", "starcoder2", "mistral", "gpt_neox", "mamba2"]
)
def test_a_reader_in_the_last_block_is_found(family: str) -> None:
    """Which shows that the model is run to its end: that nothing is found in it means something."""
    model = skeleton(family)
    site = find_linears(model)[-1]
    path, _, leaf = site.name.rpartition(".")
    parent: Any = model.get_submodule(path)
    forward = parent.forward

    def reading(*args: Any, **kwargs: Any) -> Any:
        getattr(parent, leaf).weight.sum()
        return forward(*args, **kwargs)

    parent.forward = reading
    assert weight_readers(model, all_layers(model)) == [layer_type(site)]


class Reader(nn.Module):
    """A block's layer whose neighbour's weight is read on top of its output, or is only tried."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.first, self.second, self.read = nn.Linear(64, 64), nn.Linear(64, 64), read

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.second(self.first(inputs))
        if getattr(self.second, "weight", None) is None:
            return outputs
        return outputs + self.first.weight.sum() if self.read else outputs


class Model(nn.Module):
    def __init__(self, read: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 64)
        self.layers = nn.ModuleList(Reader(read) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_who_only_tries_finds_no_weight_and_is_no_reader() -> None:
    with torch.device("meta"):
        trying, reading = Model(False), Model(True)
    assert weight_readers(trying, all_layers(trying)) == []
    assert weight_readers(reading, ["layers.1.first"]) == ["first"]  # `second` stays, so `first` is read
    assert weight_readers(reading, ["layers.1.second"]) == []  # nobody reads it
    assert weight_readers(reading, []) == []


def test_only_layers_that_a_plan_replaces_matter() -> None:
    model = skeleton("mamba")
    rank = {"rank_ratio": 0.25, "targets": ("in_proj", "out_proj")}
    refuse_weight_reads(model, plan_of(model, 16, **rank))
    with pytest.raises(ModelError, match=r"MambaForCausalLM reads .* of mixer\.dt_proj itself.*and --bits 16"):
        refuse_weight_reads(model, plan_of(model, 4, **rank))
    with pytest.raises(ModelError, match=r"wanted --ignore mixer\.dt_proj$"):
        refuse_weight_reads(model, plan_of(model, 16, rank_ratio=0.25, force_rank=True))


def run(family: str, folder: Path, corpus: Path, **settings: Any) -> LordConfig:
    model = families.save(families.build(family), folder / "dense")
    calibration = {"dataset": str(corpus), "num_samples": 4, "seq_len": 32}
    return LordConfig.from_dict(
        {"model": str(model), "output": str(folder / "out"), "calibration": calibration, **settings}
    )


@pytest.mark.slow
def test_refused_before_a_weight_is_read_and_what_is_advised_runs(tmp_path: Path, corpus_file: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lord_quant import LordGPTQConfig

    packed = run("mamba", tmp_path, corpus_file, lowrank={"rank_ratio": 0.5}, gptq={"group_size": 32})
    weights = tmp_path / "dense" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"wanted --ignore mixer\.dt_proj, and --bits 16"):
        prepare(packed)
    (tmp_path / "elsewhere").rename(weights)
    with pytest.raises(ModelError, match=r"reads the weights of mixer\.dt_proj itself"):
        AutoModelForCausalLM.from_pretrained(
            packed.model, quantization_config=LordGPTQConfig(4, rank_ratio=0.5, group_size=32, dataset=str(corpus_file))
        )
    rank = {"rank_ratio": 0.5, "ignore": ["mixer.dt_proj"]}
    report = execute(prepare(run("mamba", tmp_path, corpus_file, lowrank=rank, gptq={"bits": 16})))
    assert report["verified"]["difference"] < 1e-3


@pytest.mark.slow
def test_packed_mamba_2_loads_in_a_fresh_process(tmp_path: Path, corpus_file: Path) -> None:
    """Its mixers have parameters of their own beside packed layers, and would initialise those layers' weights."""
    settings: dict[str, Any] = {"lowrank": {"rank_ratio": 0.25}, "gptq": {"group_size": 32}}
    report = execute(prepare(run("mamba2", tmp_path, corpus_file, **settings)))
    assert all(layer["rank"] == 32 and layer["bits"] == 4 for layer in report["layers"])
    assert report["verified"]["difference"] < 0.01
