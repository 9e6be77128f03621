# SPDX-License-Identifier: Apache-2.0
"""Streamed runs: the same bytes as with the whole model in memory, and as a run that was never cut off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, probe_logits, save
from safetensors.torch import load_file

from lord_quant.artifact.manifest import read_manifest
from lord_quant.blocks import residency
from lord_quant.config import LordConfig
from lord_quant.errors import OutputError
from lord_quant.files.headers import weight_files
from lord_quant.runs import execution, joint
from lord_quant.runs.execution import execute
from lord_quant.runs.journal import Journal
from lord_quant.runs.pipeline import prepare
from lord_quant.runs.shards import SINGLE_FILE


FAMILIES = ["gpt_bigcode", "codegen", "gpt2", "llama", "starcoder2", "gpt_neox"]
SCHEMES: dict[str, dict[str, Any]] = {
    "4 bits": {"gptq": {"bits": 4, "group_size": 32}, "lowrank": {"rank_ratio": 0.5}},
    "float": {"gptq": {"bits": 16, "group_size": 32}, "lowrank": {"rank_ratio": 0.5, "targets": ["mlp"]}},
    "dense": {"gptq": {"bits": 4, "group_size": 32}, "lowrank": {"rank_ratio": 1}},
    "mixed": {
        "gptq": {"bits": 4, "group_size": 32, "bits_pattern": {"mlp": 8}},
        "lowrank": {"rank_ratio": 0.5, "form": "pivoted"},
    },
    "grouped": {"gptq": {"bits": 3, "group_size": 32}, "lowrank": {"rank_ratio": 0.25, "form": "grouped"}},
}


class Killed(BaseException):
    """Ends a run where it stands."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a family's tiny model."""
    root, made = tmp_path_factory.mktemp("dense"), dict[str, Path]()

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save(build(family), root / family)
        return made[family]

    return folder


def config_of(model: Path, output: Path, corpus: Path, scheme: str = "4 bits", **changes: Any) -> LordConfig:
    calibration = {"dataset": str(corpus), "num_samples": 6, "seq_len": 32, "batch_size": 2}
    return LordConfig.from_dict(
        {"model": str(model), "output": str(output), "calibration": calibration, **SCHEMES[scheme], **changes}
    )


def run(config: LordConfig, **options: Any) -> dict[str, Any]:
    return execute(prepare(config, **options), verify=False)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in weight_files(folder) for name, value in load_file(file).items()}


def require_same(one: Path, other: Path) -> None:
    """Fails unless two checkpoints hold the same tensors, bit by bit, and the same configuration."""
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    for file in ("config.json", "generation_config.json"):
        assert json.loads((one / file).read_text()) == json.loads((other / file).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "scheme"),
    [(family, scheme) for family in FAMILIES for scheme in ("4 bits", "float")]
    + [("gpt_bigcode", "dense"), ("codegen", "mixed"), ("llama", "grouped"), ("qwen2", "grouped")],
)
def test_a_streamed_run_makes_the_bytes_of_one_in_memory(
    family: str, scheme: str, folders: Any, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folders(family), tmp_path / "streamed", corpus_file, scheme)
    monkeypatch.setattr(residency, "WAITING_BYTES", 2**14)  # some waits in memory, most in files
    run(config)
    monkeypatch.setattr(execution, "stream_source", lambda source, device: None)
    run(LordConfig.from_dict(config.to_dict() | {"output": str(tmp_path / "whole")}))
    require_same(tmp_path / "streamed", tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"streamed", "whole"}


@pytest.mark.slow
def test_how_a_model_generates_and_what_it_does_not_tie_are_kept(corpus_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dense = build("llama", tie_word_embeddings=False)
    folder = save(dense, tmp_path / "dense")
    own = {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    for file, values in (("generation_config.json", own), ("config.json", {"tie_word_embeddings": True})):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    config = config_of(folder, tmp_path / "out", corpus_file, "dense", gptq={"bits": 8, "group_size": 32})
    assert run(config)["totals"]["tensor_bytes_on_disk"] == prepare(config, overwrite=True).plan.tensor_bytes
    assert own.items() <= json.loads((tmp_path / "out" / "generation_config.json").read_text()).items()
    logits = probe_logits(dense)
    ours = probe_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (ours - logits).norm() < 0.03 * logits.norm()  # 8 bits; 1.4 with the head tied


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("own", "asked", "stored"), [("bfloat16", "auto", "bfloat16"), ("float32", "float16", "float16")])
def test_a_checkpoint_loads_in_the_dtype_it_is_stored_in(
    own: str, asked: str, stored: str, streamed: bool, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    folder = save(build("gpt_bigcode").to(getattr(torch, own)), tmp_path / "dense")
    if not streamed:
        monkeypatch.setattr(execution, "stream_source", lambda source, device: None)
    for scheme in ("4 bits", "float"):
        run(config_of(folder, tmp_path / scheme, corpus_file, scheme, dtype=asked))
        assert json.loads((tmp_path / scheme / "config.json").read_text())["dtype"] == stored
        floats = {str(value.dtype) for value in tensors_of(tmp_path / scheme).values() if value.is_floating_point()}
        assert f"torch.{stored}" in floats and floats <= {f"torch.{stored}", "torch.float16"}  # packed layers hold these
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / scheme)
        assert str(loaded.dtype) == str(loaded.transformer.wte.weight.dtype) == f"torch.{stored}"
        assert torch.isfinite(loaded(torch.arange(8)[None]).logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_a_run_that_is_cut_off_goes_on_behind_its_last_block(
    blocks: int, folders: Any, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config = tmp_path / "whole", config_of(folders("llama"), tmp_path / "out", corpus_file)
    run(LordConfig.from_dict(config.to_dict() | {"output": str(whole)}))
    with monkeypatch.context() as patch:
        finish = Journal.finish

        def cut_off(journal: Journal, block: Any) -> None:
            if len(journal.blocks) == blocks:
                raise Killed
            finish(journal, block)

        def cut_off_later(*arguments: Any, **others: Any) -> None:
            raise Killed

        patch.setattr(Journal, "finish", cut_off)
        patch.setattr(execution, "write_checkpoint", cut_off_later)
        with pytest.raises(Killed):
            run(config)
    assert not (tmp_path / "out").exists()
    steps = []
    step = joint.JointRun.step
    monkeypatch.setattr(joint.JointRun, "step", lambda self, index: (steps.append(index), step(self, index))[1])
    report = run(config)
    assert report["blocks_resumed"] == blocks and steps == list(range(blocks, 2))
    require_same(whole, tmp_path / "out")
    said = [read_manifest(folder).fingerprint for folder in (whole, tmp_path / "out")]
    assert said[0].difference(said[1]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    before = json.loads((whole / "lord_report.json").read_text())["layers"]
    after = json.loads((tmp_path / "out" / "lord_report.json").read_text())["layers"]
    assert [layer.get("rel_stacked_error") for layer in after] == [layer.get("rel_stacked_error") for layer in before]


@pytest.mark.slow
def test_another_run_does_not_continue_it_but_may_start_again(
    folders: Any, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folders("llama"), tmp_path / "out", corpus_file)
    with monkeypatch.context() as patch:
        patch.setattr(execution, "write_checkpoint", lambda *arguments, **others: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(config)
    other = config_of(folders("llama"), tmp_path / "out", corpus_file, joint={"refine": 1})
    with pytest.raises(OutputError, match=r"unfinished run .*differs: joint\.[a-z_]+ was [^{]*--overwrite"):
        run(other)
    assert run(other, overwrite=True)["blocks_resumed"] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.slow
def test_large_checkpoints_keep_a_file_per_block(
    folders: Any, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folders("llama"), tmp_path / "one", corpus_file)
    run(config)
    monkeypatch.setattr("lord_quant.runs.shards.SMALL", 1000)
    run(LordConfig.from_dict(config.to_dict() | {"output": str(tmp_path / "many")}))
    assert not (tmp_path / "many" / SINGLE_FILE).exists() and len(weight_files(tmp_path / "many")) == 3
    require_same(tmp_path / "one", tmp_path / "many")
