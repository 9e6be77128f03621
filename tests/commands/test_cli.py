# SPDX-License-Identifier: Apache-2.0
"""The commands as users run them: the installed `optimum-cli`, in processes of its own."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import yaml
from in_process import run_command


CLI = str(Path(sys.executable).parent / "optimum-cli")
PHASES = {"load", "sensitivity", "stack", "write", "verify", "total"}  # a streamed block is packed as it is stacked
COMMANDS = ("plan", "quantize", "eval", "inspect")


def cli(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CLI, "lord", *map(str, arguments)], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_shows_examples(command: str) -> None:
    """Processor time rather than wall time, so that a busy machine does not fail it."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = cli(*[command] * bool(command), "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert process.returncode == 0 and process.stderr == ""
    assert statistics.median(seconds) < 0.5
    if command:
        assert "examples:" in process.stdout
        assert process.stdout.count(f"  optimum-cli lord {command} ") >= 2
    else:
        assert all(re.search(rf"\b{name}\b", process.stdout) for name in COMMANDS)


@pytest.mark.slow
def test_a_misspelt_flag_is_told_with_the_nearest_one_by_the_command_itself() -> None:
    process = cli("quantize", "--rank-raito", "0.5", "--model", "m")
    assert process.returncode == 2 and process.stdout == ""
    error = process.stderr.splitlines()[-1]
    assert "lord quantize: error: unrecognized arguments: --rank-raito 0.5; did you mean '--rank-ratio'?" in error


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def quantized(
    work: Path, model_folder: Callable[..., Path], corpus_file: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One full run: settings from YAML, flags over some of them, an existing model folder to replace."""
    settings = {
        "model": "/nowhere/overridden",
        "lowrank": {"param_ratio": 0.9, "targets": ["mlp"]},
        "gptq": {"bits": 8, "group_size": 32},
        "calibration": {"dataset": str(corpus_file), "num_samples": 4, "seq_len": 64, "seed": 5},
    }
    (work / "run.yaml").write_text(yaml.safe_dump(settings))
    output = work / "out" / "model"
    output.mkdir(parents=True)
    (output / "config.json").write_text('{"model_type": "gpt2"}')
    (output / "stale.safetensors").write_text("left over")
    (output / "stale.txt").write_text("left over")
    flags = ["--model", model_folder("gpt_bigcode"), "--rank-ratio", "0.5", "--bits", "4", "--overwrite"]
    return output, cli("quantize", "--config", work / "run.yaml", "--output", output, *flags)


@pytest.mark.slow
def test_a_full_run_leaves_a_folder_that_stands_alone(
    quantized: tuple[Path, subprocess.CompletedProcess[str]], work: Path
) -> None:
    output, process = quantized
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr
    assert "scheme" in process.stdout and "estimate" in process.stdout and "written to" in process.stdout
    found = {path.name for path in output.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "lord_report.json",
        "lord_manifest.json",
    } <= found
    assert "stale.txt" not in found
    assert os.listdir(output.parent) == ["model"], "staging folders are gone"
    report = json.loads((output / "lord_report.json").read_text())
    assert report["scheme"].endswith("w4g32"), "flags lie over the file"
    assert report["config"]["lowrank"]["rank_ratio"] == 0.5 and report["config"]["lowrank"]["param_ratio"] is None
    assert report["config"]["lowrank"]["targets"] == ["mlp"] and report["calibration"]["seed"] == 5
    assert report["totals"]["tensor_bytes_on_disk"] == report["totals"]["tensor_bytes"]
    assert report["totals"]["file_bytes_on_disk"] == (output / "model.safetensors").stat().st_size
    assert report["config"]["stack"] == "joint" and set(report["seconds"]) == PHASES
    assert all(0 < layer["rel_stacked_error"] < 1 for layer in report["layers"])
    assert "truncation" in process.stdout and "all in" in process.stdout
    assert re.search(r"^verified +\d+ tensors sound, loads, logits within \d", process.stdout, re.M)
    assert all(item["remedy"][:60] in process.stdout for item in report["remedies"])
    assert 0 < report["verified"]["difference"] < 0.05
    decomposed = [layer for layer in report["layers"] if layer["rank"]]
    assert all(layer["rel_output_error"] < layer["rel_stacked_error"] for layer in decomposed)
    assert {layer["name"].split(".")[3] for layer in decomposed} == {"mlp"}
    for text in [path.read_text() for path in output.glob("*") if path.suffix in (".json", ".md")]:
        assert str(work) not in text and "/tmp/" not in text


@pytest.mark.slow
def test_what_the_cli_wrote_loads_with_its_own_tokenizer(
    quantized: tuple[Path, subprocess.CompletedProcess[str]], work: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    moved = shutil.copytree(quantized[0], work / "moved")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(moved), AutoTokenizer.from_pretrained(moved)
    generated = model.generate(**tokenizer("def f(x):\n", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert torch.isfinite(families.probe_logits(model)).all() and generated.shape[1] > 4


@pytest.mark.slow
def test_inspect_tells_what_is_in_the_files(
    quantized: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = quantized
    report = json.loads((output / "lord_report.json").read_text())
    assert run_command("inspect", output, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensor_bytes"] == report["totals"]["tensor_bytes"]
    assert found["bpw"] == pytest.approx(report["totals"]["bpw"], rel=1e-12)
    by_name = {layer["name"]: layer for layer in report["layers"]}
    for layer in found["layers"]:
        assert (layer["rank"], layer["bytes"]) == (by_name[layer["name"]]["rank"], by_name[layer["name"]]["bytes"])
    assert run_command("inspect", output, "--verify") == 0
    text = capsys.readouterr().out
    assert "two_factor packed" in text and "dense packed" in text and "lord_gptq, bits 4, group_size 32" in text
    recorded = len(json.loads((output / "lord_manifest.json").read_text())["files"])
    assert re.search(
        rf"^verified +{recorded} files as written, \d+ tensors sound, loads, logits within 0\.\d+%", text, re.M
    )


def test_inspect_reads_dense_models(model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("inspect", model_folder("gpt2"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bpw"] == 32 and {layer["form"] for layer in found["layers"]} == {"dense"}


def test_plan_prints_shapes_ranks_and_bytes(model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", model_folder("gpt_bigcode"), "--rank-ratio", "0.25", "--bits", "4", "--group-size", "32"]
    assert run_command("plan", *arguments) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if "transformer.h.0.mlp.c_fc" in line)
    assert "256x128" in row and re.search(r"\b32\b", row) and "kB" in row
    assert "bits per weight" in text and "8 of 8 layers decomposed" in text
    assert run_command("plan", *arguments, "--json") == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert plan["rank_pattern"]["transformer.h.0.mlp.c_fc"] == 32 and plan["totals"]["decomposed_layers"] == 8
    assert plan["form_pattern"] == {}
    assert run_command("plan", *arguments, "--form", "pivoted", "--json") == 0
    pivoted: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert pivoted["rank_pattern"] == plan["rank_pattern"]
    assert pivoted["form_pattern"] == dict.fromkeys(plan["rank_pattern"], "pivoted")
    for one, two in zip(pivoted["layers"], plan["layers"], strict=True):
        assert two["weights"] - one["weights"] == 32**2 and (one["form"], two["form"]) == ("pivoted", "two_factor")


def test_plan_shows_groups(model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", model_folder("qwen2"), "--rank-ratio", "0.25", "--group-size", "32", "--form", "grouped"]
    assert run_command("plan", *arguments, "--json") == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    leaders = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    found = {(name.rpartition(".")[2], leader.rpartition(".")[2]) for name, leader in plan["group_pattern"].items()}
    assert len(plan["group_pattern"]) == 6 and found == set(leaders.items())
    assert {layer["form"] for layer in plan["layers"]} == {"grouped", "two_factor"}
    assert run_command("plan", *arguments) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("model.")}
    assert rows["model.layers.1.self_attn.k_proj"][3:5] == ["grouped", "(q_proj)"]
    assert rows["model.layers.1.mlp.down_proj"][3] == "two_factor"


def test_plan_needs_no_weights(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert run_command("plan", "--model", folder, "--param-ratio", "0.6", "--bits", "16", "--group-size", "32") == 0


def test_a_dry_run_writes_nothing(
    model_folder: Callable[..., Path], corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--rank-ratio", "0.25", "--group-size", "32", "--num-samples", "4", "--seq-len", "64"]
    output = ["--output", tmp_path / "a" / "b"]
    assert run_command("quantize", "--model", folder, "--dataset", corpus_file, *output, *arguments, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "model.layers.0.mlp.up_proj" in text and "calibration   4 x 64 tokens of corpus.jsonl" in text
    assert "estimate" in text
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_real_processes_refuse_bad_input(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    model, output = model_folder("llama"), tmp_path / "output"
    for arguments, message in [
        (["--bits", "5", "--rank-ratio", "0.5"], "ConfigError: illegal gptq settings:\n  bits is 5; wanted one of"),
        (["--rank-ratio", "0.5", "--targets", "mpl"], "TargetError: a pattern matches nothing"),
        (["--rank-ratio", "lots"], "invalid float value: 'lots'"),
    ]:
        process = cli("quantize", "--model", model, "--output", output, *arguments)
        assert process.returncode == 2 and process.stdout == ""
        assert message in process.stderr and "Traceback" not in process.stderr
        if "invalid float" not in message:
            assert process.stderr.startswith("optimum-cli lord: ")
        assert not output.exists()
