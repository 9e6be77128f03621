# SPDX-License-Identifier: Apache-2.0
"""From a budget to a checkpoint: `sensitivity`, `plan --save`, `quantize --plan`, and `quantize` with a budget alone."""

from __future__ import annotations

import calendar
import datetime
import json
import math
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from in_process import exit_code_of, run_command

from lord_quant.artifact.stored import measure
from lord_quant.budgets.plan_file import predicted_for
from lord_quant.commands.options import settings_from
from lord_quant.config import LordConfig
from lord_quant.corpus import Corpus, load_corpus
from lord_quant.errors import BudgetError, CheckpointError, ConfigError, OutputError
from lord_quant.files.claim import claimed
from lord_quant.runs import pipeline


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Path:
    return model_folder("compressible")


@pytest.fixture(scope="module")
def data(corpus_file: Path) -> list[str]:
    return [
        "--dataset",
        str(corpus_file),
        "--num-samples",
        "4",
        "--seq-len",
        "64",
        "--refine",
        "1",
        "--fisher-samples",
        "2",
    ]


@pytest.fixture(scope="module")
def statistics(model: Path, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, log = (tmp_path_factory.mktemp("statistics") / name for name in ("model.stats", "run.jsonl"))
    assert run_command("sensitivity", "--model", model, *data, "--output", path, "--log", log) == 0
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert [told[0]["event"], told[-1]["event"]] == ["start", "finished"] and told[0]["output"] == str(path)
    assert len([line for line in told if line["event"] == "block" and line["phase"] == "probe"]) == 2
    return path


def test_a_plan_is_saved_and_run(
    model: Path, data: list[str], statistics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    budget = ["--statistics", statistics, "--target-bpw", "2.3", "--refine", "1"]
    assert run_command("plan", "--model", model, *budget, "--save", plan) == 0
    printed = capfd.readouterr().out
    bpw = yaml.safe_load(plan.read_text())["planned"]["bits_per_weight"]
    assert f"{bpw:.3f} bits per weight all in" in printed and f"written to {plan}" in printed
    predicted = re.search(r"predicted loss (\d\.\d+) nats per token", printed)
    assert predicted and len(re.findall(r"^\d\.?\d* +\d\.\d{3} +\d\.\d{4}$", printed, re.MULTILINE)) >= 5
    assert run_command("quantize", "--model", model, *data, "--plan", plan, "--output", out, "--no-verify") == 0
    assert measure(out).bpw == pytest.approx(bpw, abs=1e-4)
    report = json.loads((out / "lord_report.json").read_text())
    assert report["config"]["lowrank"]["rank_pattern"] == yaml.safe_load(plan.read_text())["lowrank"]["rank_pattern"]
    assert f"{report['planned']['predicted_loss']:.4f}" == predicted.group(1)

    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.isfinite(loaded(torch.arange(8)[None]).logits).all()


def test_a_flag_wins_over_a_plan_and_leaves_the_rest_of_it(model: Path, statistics: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    budget = ["--model", model, "--statistics", statistics, "--target-bpw", "2.6", "--refine", "1"]
    assert run_command("plan", *budget, "--save", path) == 0
    plan = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(plan | {"joint": {"fisher_samples": 2, "anchor": False}}))
    settings = settings_from(Namespace(model=str(model), config=None, plan=str(path), fisher_samples=3))
    assert settings["joint"] == {"fisher_samples": 3, "anchor": False} and settings["gptq"] == plan["gptq"]


def test_overwriting_replaces_only_what_a_command_writes(
    model: Path, data: list[str], statistics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing that a command reads, or that is somebody's, however it is called."""
    copy, thesis = shutil.copytree(model, tmp_path / "model"), tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    own = tmp_path / "own.stats"
    shutil.copy(statistics, own)
    plan = ["plan", "--model", copy, "--statistics", own, "--target-bpw", "3", "--refine", "1", "--overwrite", "--save"]
    sense = ["sensitivity", "--model", copy, *data, "--overwrite", "--output"]
    measure_it = ["eval", "--model", copy, "--perplexity", thesis, "--overwrite", "--output"]
    weights, before = copy / "model.safetensors", {}
    for path in (thesis, own, copy / "config.json", weights):
        before[path] = path.read_bytes()
    for command, target in (
        (plan, own),
        (plan, weights),
        (plan, thesis),
        (sense, thesis),
        (measure_it, thesis),
        (measure_it, copy / "config.json"),
    ):
        assert run_command(*command, target) == OutputError.exit_code
        assert "--overwrite replaces nothing else" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    for _ in range(2):
        assert run_command(*plan, tmp_path / "plan.yaml") == 0


def test_a_prediction_is_of_the_plan_as_it_was_written(model: Path, statistics: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    budget = ["--model", model, "--statistics", statistics, "--target-bpw", "2.6", "--refine", "1"]
    assert run_command("plan", *budget, "--save", path) == 0
    plan, text = yaml.safe_load(path.read_text()), path.read_text()

    def predicted(**flags: Any) -> dict[str, Any] | None:
        settings = settings_from(Namespace(model=str(model), config=None, plan=str(path), **flags))
        return predicted_for(path, LordConfig.from_dict(settings))

    found = predicted()
    assert found is not None and found == {key: value for key, value in plan["planned"].items() if key != "plan_sha256"}
    assert predicted(fisher_samples=3) is None
    for edit in (
        {"gptq": plan["gptq"] | {"group_size": 32 if plan["gptq"]["group_size"] != 32 else 64}},
        {"planned": plan["planned"] | {"predicted_loss": 0.0}},
        {"planned": plan["planned"] | {"predicted_loss": datetime.date(2026, 1, 1)}},
        {"planned": {key: value for key, value in plan["planned"].items() if key != "plan_sha256"}},
    ):
        path.write_text(yaml.safe_dump(plan | edit))
        assert predicted() is None
    path.write_text("# somebody's words\n" + text)  # which change nothing
    assert predicted() == found


@pytest.mark.slow
def test_a_budget_alone_is_enough(model: Path, data: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run_command("quantize", "--model", model, *data, "--target-bpw", "3.0", "--output", out, "--no-verify") == 0
    assert "planned" in capfd.readouterr().out
    assert 2.85 < measure(out).bpw <= 3.0


def test_flags_restrict_the_choice(model: Path, statistics: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", model, "--statistics", statistics, "--target-bpw", "3.9", "--json", "--refine", "1"]
    assert (
        run_command("plan", *arguments, "--bits", "3", "--group-size", "64", "--form", "pivoted", "--targets", "mlp") == 0
    )
    layers = json.loads(capfd.readouterr().out)["layers"]
    assert {layer["bits"] for layer in layers} == {3} and {layer["group_size"] for layer in layers} == {64}
    assert all(layer["rank"] is None for layer in layers if "attn" in layer["name"])
    small = ["--model", model, "--statistics", statistics, "--target-bpw", "2.4", "--json", "--refine", "1"]
    for form, ranked in ((), True), (("--form", "dense"), False):
        assert run_command("plan", *small, *form) == 0
        assert any(layer["rank"] for layer in json.loads(capfd.readouterr().out)["layers"]) == ranked


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--target-bpw", "3", "--rank-ratio", "0.5"], "ConfigError: a budget and --rank-ratio are given"),
        (["--target-bpw", "3", "--target-size", "4MB"], "BudgetError: 2 budgets are given"),
        (["--target-bpw", "-3"], "BudgetError: target_bpw is -3.0; wanted a positive number"),
        (["--target-size", "huge"], "BudgetError: size 'huge'; wanted a number of bytes"),
        (["--target-bpw", "0.2"], r"BudgetError: no plan is as small as 0\.2; what can be reached is"),
        (["--target-bpw", "3", "--bits", "16"], "BudgetError: no plan is as small as 3"),
        (["--target-bpw", "3", "--form", "shared"], "ConfigError: .*form is 'shared'"),
        (["--target-bpw", "3", "--param-ratio", "0.5"], "ConfigError: a budget and --param-ratio are given"),
        (["--target-bpw", "3", "--force-rank"], "ConfigError: a budget and --force-rank are given"),
        (["--target-bpw", "3", "--stack", "naive"], "ConfigError: .*a budget is given for the naive stack"),
        (["--target-bpw", "3", "--no-sym", "--mse", "0"], "BudgetError: .*other settings: mse 2.0, now 0.0"),
        (["--rank-ratio", "0.5"], "ConfigError: --statistics is given without a budget"),
        (["--min-param-ratio", "0.5"], "ConfigError: --min-param-ratio, --statistics is given without a budget; wanted"),
        (["--target-bpw", "3", "--min-param-ratio", "1.5"], "BudgetError: min_param_ratio is 1.5"),
        (
            ["--target-bpw", "3", "--min-param-ratio", "1", "--form", "pivoted", "--bits", "8"],
            "BudgetError: no plan is as small",
        ),
    ],
)
def test_plan_refuses(
    flags: list[str], error: str, model: Path, statistics: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command("plan", "--model", model, "--statistics", statistics, "--refine", "1", *flags) == exit_code_of(error)
    printed = capfd.readouterr()
    assert re.search(error, printed.err, re.DOTALL) and not printed.out


def test_a_file_restricts_the_choice_too(
    model: Path, statistics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("gptq: {bits: 3, group_size: 64}\nlowrank: {form: pivoted, rank_ratio: 0.5}\njoint: {refine: 1}")
    arguments = ["--model", model, "--statistics", statistics, "--target-bpw", "3.9", "--json", "--config", file]
    assert run_command("plan", *arguments) == 0
    printed = json.loads(capfd.readouterr().out)
    assert {(layer["bits"], layer["group_size"]) for layer in printed["layers"]} == {(3, 64)}
    assert printed["planned"]["predicted_loss"] > 0
    file.write_text("gptq: {bits_pattern: {mlp: 3}}\njoint: {refine: 1}")
    assert run_command("plan", *arguments) == ConfigError.exit_code
    assert "a budget and bits_pattern are given" in capfd.readouterr().err


def test_a_file_may_hold_the_budget_and_flags_win(
    model: Path, statistics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {model}\njoint: {{refine: 1}}\n"
        f"budget: {{target_bpw: 2.4, min_param_ratio: 0.9, statistics: {statistics}}}\n"
    )

    def planned(*flags: str) -> dict[str, Any]:
        assert run_command("plan", "--config", file, "--json", *flags) == 0
        return json.loads(capfd.readouterr().out)

    kept, limited = planned(), planned("--min-param-ratio", "0.4")
    for found, floor in ((kept, 0.9), (limited, 0.4)):
        shares = [layer["weights"] / (layer["in_features"] * layer["out_features"]) for layer in found["layers"]]
        assert found["totals"]["bpw"] <= 2.4 and floor <= min(shares)
    assert limited["planned"]["predicted_loss"] < kept["planned"]["predicted_loss"]
    assert 3.2 < planned("--target-bpw", "3.4")["totals"]["bpw"] <= 3.4
    smaller = planned("--target-size", str(kept["totals"]["tensor_bytes"]))
    assert smaller["totals"]["tensor_bytes"] <= kept["totals"]["tensor_bytes"]
    ranks = planned("--rank-ratio", "0.5", "--group-size", "32")
    assert "planned" not in ranks and set(ranks["rank_pattern"].values()) == {64}
    file.write_text(file.read_text() + "lowrank: {param_ratio: 0.5}\n")
    assert run_command("plan", "--config", file) == ConfigError.exit_code
    assert "a budget and param_ratio are given" in capfd.readouterr().err


def test_a_plan_of_other_tokens_or_settings_is_told(
    model: Path, data: list[str], statistics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    budget = ["--model", model, *data, "--statistics", statistics, "--target-bpw", "3", "--dry-run"]
    told = "the plan's losses were predicted on other calibration tokens"
    assert run_command("quantize", *budget) == 0
    assert told not in capfd.readouterr().err
    assert run_command("quantize", *budget, "--seed", "1") == 0
    assert f"warning: {told}" in capfd.readouterr().err
    plan = ["--model", model, "--plan", tmp_path / "plan.yaml", *data, "--dry-run"]
    assert run_command("plan", *budget[:2], *budget[-5:-1], "--refine", "1", "--save", plan[3]) == 0
    capfd.readouterr()
    assert run_command("quantize", *plan) == 0
    assert told not in capfd.readouterr().err
    assert run_command("quantize", *plan, "--seed", "1") == 0
    assert f"warning: {told}" in capfd.readouterr().err
    assert run_command("quantize", *plan, "--sym", "--mse", "0") == 0
    settings = "the plan's losses were predicted with other settings: sym False, now True, mse 2.0, now 0.0"
    assert capfd.readouterr().err == f"warning: {settings}; wanted the same for both\n"


@pytest.mark.slow
def test_budgets_are_swept(
    model: Path, data: list[str], statistics: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    heldout = tmp_path / "heldout.py"
    heldout.write_text(Path(calendar.__file__).read_text())
    run = ["--model", model, *data, "--statistics", statistics, "--heldout", heldout, "--max-windows", "3"]
    assert run_command("plan", *run, "--sweep", "2.5", "4", "2.5", "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert [point["budget"] for point in printed["budgets"]] == [2.5, 4.0]
    assert printed["dense"]["num_windows"] == 3 and printed["in_nats"]
    for point in printed["budgets"]:
        assert 0 < point["bpw"] <= point["budget"] and point["predicted_loss"] > 0
        ratio = point["perplexity"] / printed["dense"]["perplexity"]
        assert point["measured_loss"] == pytest.approx(math.log(ratio), abs=1e-9)
    assert run_command("plan", *run, "--sweep", "4", "--plots", tmp_path / "plots") == 0
    table = capfd.readouterr().out
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["plots.json", "sweep.png"]
    drawn = json.loads((tmp_path / "plots" / "plots.json").read_text())
    (point,), (again,) = drawn["measured"], drawn["about"]["budgets"]
    assert point == {"bpw": again["bpw"], "loss": again["measured_loss"]}
    assert point["loss"] == pytest.approx(printed["budgets"][1]["measured_loss"]) and drawn["unit"] == "nats per token"
    assert run_command("plan", *run, "--sweep", "4", "--plots", tmp_path / "plots") == OutputError.exit_code
    assert f"{printed['budgets'][1]['perplexity']:.3f}" in table and "3 windows of 256 tokens of heldout.py" in table


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--sweep", "3"], "EvaluationError: --sweep measures on text .* wanted --heldout"),
        (["--sweep", "3", "--heldout", "no.py"], "CalibrationError: .*no.py"),
        (["--sweep", "3", "--heldout", "python-stdlib", "--target-bpw", "3"], "ConfigError: --sweep and --target-bpw are"),
        (["--sweep", "3", "--heldout", "python-stdlib", "--save", "p"], "ConfigError: --sweep and --save are given"),
        (
            ["--sweep", "3", "--heldout", "python-stdlib", "--rank-ratio", "0.5"],
            "ConfigError: a budget and --rank-ratio are",
        ),
        (["--heldout", "python-stdlib", "--target-bpw", "3"], "ConfigError: --heldout is given without --sweep"),
    ],
)
def test_a_sweep_refuses(
    flags: list[str], error: str, model: Path, statistics: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command("plan", "--model", model, "--statistics", statistics, "--refine", "1", *flags) == exit_code_of(error)
    printed = capfd.readouterr()
    assert re.search(error, printed.err, re.DOTALL) and not printed.out


def test_a_run_with_a_budget_reads_its_text_once(
    model: Path, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def load(dataset: str, **asked: Any) -> Corpus:
        read.append(dataset)
        return load_corpus(dataset, **asked)

    monkeypatch.setattr(pipeline, "load_corpus", load)
    run = ["--model", model, *data, "--output", tmp_path / "out", "--no-verify", "--target-bpw", "3"]
    assert run_command("quantize", *run) == 0 and len(read) == 1
    assert run_command("quantize", *run) == 0 and len(read) == 2  # finished, says the second run


def test_a_budget_out_of_reach_costs_no_second_measurement(
    model: Path, data: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = ["--model", model, *data, "--output", tmp_path / "out", "--no-verify"]
    assert run_command("quantize", *run, "--max-loss", "1e-30") == BudgetError.exit_code
    (kept,) = tmp_path.iterdir()
    made = kept.stat().st_mtime_ns
    assert run_command("quantize", *run, "--max-loss", "1e-29", "--overwrite") == BudgetError.exit_code
    assert [path.name for path in tmp_path.iterdir()] == [kept.name] and kept.stat().st_mtime_ns == made
    assert run_command("quantize", *run, "--target-bpw", "3") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--target-bpw", "0.1"), r"no plan is as small as 0\.1; what can be reached is \d\.\d+ to"),
        (("--target-size", "10kB"), r"no plan is as small as 10kB; what can be reached is \d+ to"),
        (("--max-loss", "0.1", "--no-fisher"), "losses without a backward pass are output errors"),
    ],
)
def test_what_shapes_and_flags_rule_out_is_not_measured(
    dry: tuple[str, ...], flags: tuple[str, ...], error: str, model: Path, data: list[str], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    log, run = tmp_path / "log", ["--model", model, *data, "--output", tmp_path / "out"]
    assert run_command("quantize", *run, *flags, *dry, "--log", log) == BudgetError.exit_code
    assert re.search(error, capfd.readouterr().err)
    assert not log.exists() or "probe" not in log.read_text()
    assert {path.name for path in tmp_path.iterdir()} <= {"log"}
    if not dry:
        assert run_command("plan", "--model", model, *data, *flags) == BudgetError.exit_code


def test_a_second_pass_into_one_file_is_refused(
    model: Path, data: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with claimed(tmp_path / "x.stats"):
        code = run_command("sensitivity", "--model", model, *data, "--output", tmp_path / "x.stats")
    assert code == OutputError.exit_code and "another run is writing" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_plan_is_written_where_a_link_leads(model: Path, statistics: Path, tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text("planned: {}\n")
    (tmp_path / "link.yaml").symlink_to("real.yaml")
    run = ["--model", model, "--statistics", statistics, "--target-bpw", "2.6", "--refine", "1", "--overwrite"]
    assert run_command("plan", *run, "--save", tmp_path / "link.yaml") == 0
    assert (tmp_path / "link.yaml").is_symlink() and "planned" in yaml.safe_load((tmp_path / "real.yaml").read_text())


FINISHED = "finished      by an earlier run of the same command"


def test_a_finished_budget_says_so_and_reports_what_was_predicted(
    model: Path, data: list[str], statistics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, own = tmp_path / "out", tmp_path / "own.stats"
    own.write_bytes(statistics.read_bytes())
    run = ["--model", model, *data, "--output", out, "--no-verify", "--statistics", own, "--target-bpw", "3"]
    assert run_command("quantize", *run) == 0
    report = json.loads((out / "lord_report.json").read_text())
    planned = report["planned"]
    assert planned["budget"] == {"target_bpw": 3.0} and planned["bits_per_weight"] == round(report["totals"]["bpw"], 4)
    assert planned["predicted_loss"] > 0 and str(tmp_path) not in json.dumps(report)
    seconds = report["seconds"]
    assert seconds["budget"] == planned["seconds"] > 0
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"], abs=0.01)
    assert f"nats per token | {planned['predicted_loss']:.4f}" in re.sub(" +", " ", (out / "README.md").read_text())
    capfd.readouterr()
    assert run_command("quantize", *run) == 0
    assert capfd.readouterr().out == f"{FINISHED}: {out}\n"
    for other in (["--target-bpw", "2.9"], ["--form", "dense"], ["--group-size", "32"], ["--seed", "1"]):
        assert run_command("quantize", *run, *other) == OutputError.exit_code
        assert "is not empty; wanted a new folder, or --overwrite" in capfd.readouterr().err
    (tmp_path / "copy.stats").write_bytes(statistics.read_bytes())  # of the file, what is in it counts, not its place
    assert run_command("quantize", *run, "--statistics", tmp_path / "copy.stats") == 0
    assert FINISHED in capfd.readouterr().out
    own.write_bytes(statistics.read_bytes() + b" ")
    assert run_command("quantize", *run) == OutputError.exit_code
    own.write_bytes(statistics.read_bytes())
    (out / "model.safetensors").unlink()  # what is not there is not finished
    assert run_command("quantize", *run) == OutputError.exit_code
    assert run_command("quantize", *run, "--statistics", tmp_path / "none.stats") == CheckpointError.exit_code


@pytest.mark.slow
def test_a_finished_budget_is_not_measured_again(
    model: Path, data: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, out = tmp_path / "run.jsonl", tmp_path / "out"
    run = ["--model", model, *data, "--output", out, "--no-verify", "--log", log, "--target-bpw", "3"]
    assert run_command("quantize", *run) == 0
    assert '"probe"' in log.read_text()
    log.unlink()
    capfd.readouterr()
    assert run_command("quantize", *run) == 0
    assert capfd.readouterr().out == f"{FINISHED}: {out}\n" and '"probe"' not in log.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run.jsonl"]


def test_planning_leaves_nothing_beside_an_output_that_a_file_names(
    model: Path, data: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {model}\noutput: {tmp_path / 'new' / 'out'}\nbudget: {{target_bpw: 3}}\n")
    assert run_command("plan", "--config", tmp_path / "run.yaml", *data) == 0
    told = capfd.readouterr()
    assert "bits per weight" in told.out and "`lord sensitivity` keeps it for any budget" in told.err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_saving_needs_a_budget_and_a_free_place(
    model: Path, data: list[str], statistics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_command("plan", "--model", model, "--rank-ratio", "0.5", "--save", tmp_path / "plan.yaml")
        == ConfigError.exit_code
    )
    assert "--save is given without a budget" in capfd.readouterr().err
    budget = ["--statistics", statistics, "--target-bpw", "3", "--refine", "1"]
    assert run_command("plan", "--model", model, *budget, "--save", tmp_path) == OutputError.exit_code
    assert "is a folder; wanted a file" in capfd.readouterr().err
    assert run_command("quantize", "--model", model, *data[:6], "--target-bpw", "3", "--dry-run") == 0
    told = capfd.readouterr().out
    assert "calibration   4 x 64 tokens" in told and "planned       nothing: that takes statistics" in told
    assert re.search(r"^sensitivity   about \d.* on cpu \(within a factor of three\)", told, re.MULTILINE)
    assert not any(tmp_path.iterdir())


def test_plots_need_a_budget_and_a_place_of_their_own(
    model: Path, statistics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_command("plan", "--model", model, "--rank-ratio", "0.5", "--plots", tmp_path / "plots") == ConfigError.exit_code
    )
    assert "--plots is given without a budget" in capfd.readouterr().err
    # Refused before the statistics are even looked for.
    budget = ["plan", "--model", model, "--statistics", tmp_path / "none", "--target-bpw", "3", "--refine", "1"]
    assert run_command(*budget, "--plots", statistics.parent) == OutputError.exit_code
    assert "is not empty; wanted a new folder, or --overwrite" in capfd.readouterr().err
    assert run_command(*budget, "--plots", statistics.parent, "--overwrite") == OutputError.exit_code
    assert "no folder of plots" in capfd.readouterr().err
    for save, plots in (("out/plan.yaml", "out"), ("out", "out"), ("out", "out/plots")):
        assert run_command(*budget, "--save", tmp_path / save, "--plots", tmp_path / plots) == ConfigError.exit_code
        assert "lie in each other; wanted places apart" in capfd.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_plots_are_of_the_plan_that_is_printed(
    model: Path, statistics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    budget = ["plan", "--model", model, "--statistics", statistics, "--target-bpw", "2.6", "--refine", "1"]
    assert run_command(*budget, "--plots", out, "--json") == 0
    printed, drawn = json.loads(capfd.readouterr().out), json.loads((out / "plots.json").read_text())
    assert drawn["about"] == printed["planned"] and drawn["unit"] == "nats per token"
    keys = ("form", "rank", "bits", "group_size", "bpw")
    for told, each in zip(printed["layers"], drawn["layers"], strict=True):
        assert told["name"] == each["layer"] and [told[key] for key in keys] == [each[key] for key in keys]
    assert run_command(*budget, "--plots", out) == OutputError.exit_code
    assert run_command(*budget, "--plots", out, "--overwrite") == 0
    assert f"plots written to {out}" in capfd.readouterr().out


def test_files_that_are_wrong_are_refused(
    model: Path, data: list[str], statistics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_command("plan", "--model", model, "--statistics", tmp_path / "none", "--target-bpw", "3")
        == CheckpointError.exit_code
    )
    assert "CheckpointError: statistics" in capfd.readouterr().err
    assert run_command("sensitivity", "--model", model, *data, "--output", statistics) == OutputError.exit_code
    assert "OutputError: output" in capfd.readouterr().err
    out = tmp_path / "out"
    assert (
        run_command("quantize", "--model", model, *data, "--plan", tmp_path / "none", "--output", out)
        == ConfigError.exit_code
    )
    assert "ConfigError: configuration file" in capfd.readouterr().err
    assert (
        run_command("quantize", "--model", model, *data, "--plan", statistics, "--bits", "4", "--output", out)
        == ConfigError.exit_code
    )
    assert "--plan and --bits are given" in capfd.readouterr().err
    assert not out.exists()
