# SPDX-License-Identifier: Apache-2.0
"""The eval command: checks before any work, its table and its file."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import families
import pytest
from in_process import Box, run_command

from lord_quant.commands import eval as command
from lord_quant.errors import ConsentError, EvaluationError, ModelError, OutputError
from lord_quant.evaluation.harness import EvalResult, ModelScores, tasks_path
from lord_quant.evaluation.perplexity import Perplexity
from lord_quant.evaluation.speed import ModelSpeed, Speed


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(flags)


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_include_path_is_printed_alone_and_fast() -> None:
    script = (
        "import argparse, sys\nfrom lord_quant.commands import eval\n"
        "parser = argparse.ArgumentParser()\neval.add_arguments(parser)\n"
        "code = eval.run(parser.parse_args(['--print-include-path']))\n"
        "assert not {'torch', 'transformers', 'lm_eval'} & set(sys.modules), 'heavy import'\nsys.exit(code)\n"
    )
    seconds = []
    for _ in range(3):  # processor time, and the least of three: the machine may be busy
        start = children_seconds()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        seconds.append(children_seconds() - start)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{tasks_path()}\n", "")
    assert min(seconds) < 0.5
    assert (tasks_path() / "lord_humaneval.yaml").is_file()


def test_output_is_checked_before_any_work(tmp_path: Path) -> None:
    existing = tmp_path / "scores.json"
    existing.write_text("precious")
    for output, message in (
        (existing, "--overwrite"),
        (tmp_path, "is a folder"),
        (existing / "x.json", "cannot be written"),
    ):
        with pytest.raises(OutputError, match=message):
            command.run(parse("--model", str(tmp_path / "no-model"), "--tasks", "x", "--output", str(output)))
    assert existing.read_text() == "precious"


def test_model_is_required() -> None:
    with pytest.raises(EvaluationError, match="--model"):
        command.run(parse("--tasks", "lord_humaneval"))


def test_consent_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConsentError, match="lord_humaneval"):
        command.run(parse("--model", str(tmp_path / "no-model"), "--tasks", "lord_humaneval,lord_code_ppl"))


def scores(pass_at_1: float, bits: float, perplexity: float) -> ModelScores:
    metrics = {"lord_humaneval": {"pass@1": pass_at_1}, "lord_code_ppl": {"bits_per_byte": bits}}
    return ModelScores("m", metrics, {}, Perplexity(perplexity, 1.0, 1, 1, 8, 8, "float32", "text.py", "digest"))


def result(baseline: ModelScores | None) -> EvalResult:
    directions = {"lord_humaneval": {"pass@1": True}, "lord_code_ppl": {"bits_per_byte": False}}
    return EvalResult(**vars(scores(0.6, 2.2, 11.0)), baseline=baseline, higher_is_better=directions)


def test_table_with_baseline_shows_ratios() -> None:
    lines = [line.split() for line in command.format_table(result(scores(0.8, 2.0, 10.0))).splitlines()]
    assert lines[0] == ["task", "metric", "value", "baseline", "ratio"]
    assert lines[2] == ["lord_humaneval", "pass@1", "↑", "0.6000", "0.8000", "0.7500"]
    assert lines[3] == ["lord_code_ppl", "bits_per_byte", "↓", "2.2000", "2.0000", "1.1000"]
    assert lines[4] == ["text.py", "token", "perplexity", "↓", "11.0000", "10.0000", "1.1000"]


def test_ratio_to_a_baseline_at_zero_is_left_open() -> None:
    lines = [line.split() for line in command.format_table(result(scores(0.0, 2.0, 10.0))).splitlines()]
    assert lines[2] == ["lord_humaneval", "pass@1", "↑", "0.6000", "0.0000", "-"]


def test_table_without_baseline_has_values_only() -> None:
    table = command.format_table(result(None))
    assert "ratio" not in table and "baseline" not in table and "0.6000" in table


@pytest.mark.parametrize("working", [None, 2 << 20])
def test_memory_is_named_for_what_it_is(working: int | None) -> None:
    model, base = ModelSpeed(10.0, 1.0, 1 << 20, working), ModelSpeed(20.0, 2.0, 4 << 20, working)
    speed = Speed(model, base, 0.5, 0.5, 1, 8, 2, 1, "cpu", 1)
    lines = command.format_table(EvalResult("m", speed=speed, baseline=ModelScores("b"))).splitlines()
    memory = [line.split() for line in lines if "MiB" in line]
    assert memory[0] == ["speed", "weights", "MiB", "↓", "1.0000", "4.0000", "0.2500"]
    above = [["speed", "peak", "above", "weights", "MiB", "↓", "2.0000", "2.0000", "1.0000"]]
    assert memory[1:] == (above if working else [])


def test_file_is_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "scores.json"
    target.write_text("old")
    command._write(target, result(None))
    assert json.loads(target.read_text())["metrics"]["lord_humaneval"]["pass@1"] == 0.6
    assert list(tmp_path.iterdir()) == [target]


def test_examples_parse() -> None:
    import shlex

    text = command.EXAMPLES.replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.strip().startswith("optimum-cli lord eval")]
    assert len(commands) == 3
    for line in commands:
        assert parse(*shlex.split(line)[3:]).model == "compressed/"


def test_a_name_that_is_nowhere_is_refused_before_anything_is_loaded(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run_command("eval", "--model", "nobody/nothing", "--perplexity") == ModelError.exit_code
    assert "ModelError: model 'nobody/nothing': there is no such folder, and as a hub name it" in capfd.readouterr().err


@pytest.mark.slow
def test_a_task_whose_data_cannot_be_had_is_told(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()", "lord", "eval"]
    command += ["--model", str(families.TOKENIZER), "--tasks", "lambada_openai", "--limit", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == EvaluationError.exit_code and "Traceback" not in done.stderr
    assert "EvaluationError: lambada_openai cannot be evaluated: " in done.stderr


def test_what_json_does_not_have_is_null_in_the_file(tmp_path: Path) -> None:
    perplexity = Perplexity(float("inf"), 1e6, 100, 1, 64, 64, "float32")
    command._write(tmp_path / "found.json", EvalResult("m", {"t": {"x": float("nan"), "y": 1.5}}, perplexity=perplexity))
    found = json.loads((tmp_path / "found.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["metrics"]["t"] == {"x": None, "y": 1.5}
    assert found["perplexity"]["perplexity"] is None and found["perplexity"]["nll"] == 1e6


def test_what_was_measured_before_a_failure_is_printed_and_kept(
    box: Box, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The baseline's weights turn out to be unreadable after the model was measured."""
    torn = box.copy()
    weights = next(torn.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    target, kept = tmp_path / "scores.json", tmp_path / "scores.json.incomplete"
    measured = ["--perplexity", box.corpus, "--window", "32", "--max-windows", "2", "--output", target]

    assert run_command("eval", "--model", box.original, "--baseline", torn, *measured) == ModelError.exit_code
    told, found = capfd.readouterr().out, json.loads(kept.read_text())
    assert not target.exists() and found["baseline"] is None
    assert f"{found['perplexity']['perplexity']:.4f}" in told and f"and in {kept}" in told

    assert run_command("eval", "--model", box.original, "--baseline", box.original, *measured) == 0
    whole = json.loads(target.read_text())
    assert whole["perplexity"] == whole["baseline"]["perplexity"] == found["perplexity"]
    assert not kept.exists()


@pytest.mark.parametrize("name", ["scores.json", "x" * 230])
def test_where_parts_are_kept_is_looked_at_before_anything_is_measured(
    name: str, box: Box, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if name == "scores.json":
        (tmp_path / "scores.json.incomplete").mkdir()
    measured = ["--perplexity", box.corpus, "--window", "32", "--max-windows", "2", "--output", tmp_path / name]
    assert run_command("eval", "--model", tmp_path / "none", *measured) == OutputError.exit_code
    assert f"{name}.incomplete" in capfd.readouterr().err


def test_parts_that_cannot_be_kept_do_not_end_an_evaluation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), command._Parts(tmp_path / "scores.json") as parts:
        (tmp_path / "scores.json.incomplete").mkdir()
        parts.keep(EvalResult("m", {"t": {"x": 1.0}}))
        raise KeyboardInterrupt
    told = capfd.readouterr()
    assert "warning: what is measured until now is not kept: output" in told.err
    assert told.out.endswith("not all that was asked for: above is what was measured until then\n")
