# SPDX-License-Identifier: Apache-2.0
"""Several processes agree with one, end together, and go on together. Real ones, started by torchrun, on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from families import VOCABULARY, different_tensors, stored_tensors

from lord_quant.commands import quantize as quantize_command
from lord_quant.commands import sensitivity as sensitivity_command
from lord_quant.config import LordConfig
from lord_quant.distributed import ALONE, World, joined
from lord_quant.errors import ConfigError, OutputError
from lord_quant.losses.statistics import load_statistics
from lord_quant.runs.execution import refuse_several


START = "from optimum.commands.optimum_cli import main; main()"
TEXT = ["--num-samples", "8", "--seq-len", "32", "--batch-size", "2", "--float64"]
"""Sums in float64: what rounding of float32 leaves open decides about codes, and then about those of all later layers."""
MEASURED = ["--fisher-samples", "3"]  # fewer windows than processes
PLANNED = ["--group-size", "32", "--bits", "4", "--target-bpw", "4.2", *MEASURED]
LIMIT = 240
"""Seconds after which a job counts as hung; it takes a tenth of that."""


class Ended(NamedTuple):
    """How a job ended: torchrun's exit code, and what every process wrote."""

    code: int
    stdout: list[str]
    stderr: list[str]


def torchrun(count: int, script: str, folder: Path, *arguments: str | Path) -> Ended:
    folder.mkdir(exist_ok=True)
    program = folder / "program.py"
    program.write_text(textwrap.dedent(script))
    launch = ["--standalone", "--nproc_per_node", str(count), "--log-dir", str(folder / "logs"), "--redirects", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
    )
    logs = [[path.read_text() for path in sorted(folder.glob(f"logs/*/*/*/{name}.log"))] for name in ("stdout", "stderr")]
    return Ended(done.returncode, *logs)


def alone(command: Any, *arguments: str | Path) -> None:
    """Runs a command in this process."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([*map(str, arguments)])) == 0


# The pieces, without a model.

COLLECTIVES = """
    import json, os, sys, torch
    from typing import NamedTuple
    from lord_quant.distributed import joined
    from lord_quant.errors import ElsewhereError
    from lord_quant.moments import PairedAccumulator, pooled
    from lord_quant.silence import import_hosts

    class Pair(NamedTuple):
        name: str
        parts: dict

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64) + 30
    y = torch.randn(60, 7, generator=generator, dtype=torch.float64) - 20 + x[:, :1]
    whole = PairedAccumulator(7, torch.float64, dense_features=5)
    whole.update(x, y)
    found = {}
    with joined() as world:
        own = PairedAccumulator(7, torch.float64, dense_features=5)
        start, stop = [0, 7, 31, 60][world.rank : world.rank + 2]
        own.update(x[start:stop], y[start:stop])
        both = zip(pooled(own.result(), world)[:5], whole.result()[:5], strict=True)
        found["moments"] = max(float(torch.as_tensor(a - b).abs().max()) for a, b in both)
        sums = world.totals({"all": torch.ones(2)} | ({"one": torch.ones(3)} if world.rank == 2 else {}), "cpu")
        found["totals"] = {name: tensor.tolist() for name, tensor in sums.items()}
        sent = world.broadcast(Pair("sent", {"rows": torch.eye(4)[1:2]}) if world.rank == 1 else None, 1)
        found["sent"] = [sent.name, sent.parts["rows"].tolist()]
        tasks = [lambda number=number: (number, world.rank) for number in range(4)]
        found["tasks"] = list(world.share_out(tasks, [1, 1, 3, 1], 1, "cpu"))
        try:
            with world.together():
                if world.rank > 0:
                    raise KeyError(f"of {world.rank}")
                world.total(torch.ones(1))
        except (KeyError, ElsewhereError) as error:
            found["error"] = f"{type(error).__name__}: {error}"
        import_hosts()
        world.wait()
    found["threads"] = [open(f"/proc/self/task/{number}/comm").read().strip() for number in os.listdir("/proc/self/task")]
    print(json.dumps(found))
"""


TRAINING = """
import torch
from torch.nn.parallel import DistributedDataParallel
from lord_quant.modules import ColumnPivotedLinear, LowRankLinear, PivotedLinear
torch.distributed.init_process_group("gloo")
torch.manual_seed(torch.distributed.get_rank())
for form in (LowRankLinear, PivotedLinear, ColumnPivotedLinear):
    layer = form(12, 4, 8, True)
    if form is not LowRankLinear:
        layer.order.copy_(torch.randperm(len(layer.order)))
    together = DistributedDataParallel(layer)
    together(torch.randn(3, 12)).square().sum().backward()
    seen = (*layer.buffers(), layer.up.weight, layer.up.weight.grad)
    print(form.__name__, [round(float(value.sum()), 4) for value in seen])
    print([*layer.state_dict().get("order", torch.zeros(0)).tolist()])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_every_form_trains_in_several_processes(tmp_path: Path) -> None:
    """Which begin with what the first has, buffers too, and end with the same gradients."""
    ended = torchrun(2, TRAINING, tmp_path / "job")
    assert ended.code == 0, ended.stderr
    one, other = ended.stdout
    assert one == other and "ColumnPivotedLinear" in one


@pytest.mark.slow
def test_collectives_are_those_of_one_process_and_errors_reach_all(tmp_path: Path) -> None:
    ended = torchrun(3, COLLECTIVES, tmp_path / "job")
    assert ended.code == 0, ended.stderr
    found = [json.loads(text) for text in ended.stdout]
    for own in found:
        assert own["moments"] < 1e-12
        assert own["totals"] == {"all": [3, 3], "one": [1, 1, 1]}
        assert own["sent"] == ["sent", [[0, 1, 0, 0]]]
        assert own["tasks"] == [[0, 2], [1, 0], [2, 1], [3, 2]]
        # A thread of the group that outlives it can abort a process whose work is done.
        assert any(name.startswith("python") for name in own["threads"])
        assert not any("gloo" in name for name in own["threads"])
    failed = "process 1 failed: KeyError: 'of 1'"
    assert [own["error"] for own in found] == [f"ElsewhereError: {failed}", "KeyError: 'of 1'", f"ElsewhereError: {failed}"]


def test_windows_are_shared_without_rest() -> None:
    windows = torch.arange(22).view(11, 2)
    batches = list(windows.split(3))
    assert all(torch.equal(one, other) for one, other in zip(ALONE.share(batches), batches, strict=True))
    for size in (2, 4, 16):
        shares = [World(rank, size).share(batches) for rank in range(size)]
        rows = [torch.cat(share) if share else windows[:0] for share in shares]
        assert torch.equal(torch.cat(rows).sort(dim=0).values, windows)
        assert max(map(len, rows)) - min(map(len, rows)) <= 1
        assert all(len(batch) <= 3 for share in shares for batch in share)


def test_work_is_dealt_to_whoever_has_least_in_turn() -> None:
    assert World(0, 2).deal([4, 1, 1, 1]) == [0, 1, 1, 1]
    assert World(1, 3).deal([5.0], turn=2) == World(0, 3).deal([5.0], turn=5) == [2]
    assert sorted(World(0, 4).deal([1, 1, 1], turn=3)) == [0, 1, 3]


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # set by schedulers as well
    with joined() as world:
        assert world == ALONE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": "naive"}, "stack is 'naive' in 4 processes; wanted a start without torchrun, or --stack joint"),
        ({"output": None}, "output is not given"),
        ({"calibration": {"num_samples": 3}}, "num_samples is 3 .*nearest legal value 4"),
        ({"device": "cuda:1"}, "device is 'cuda:1' in 4 processes"),
    ],
)
def test_what_several_cannot_share_is_refused(changes: dict[str, Any], message: str) -> None:
    config = LordConfig.from_dict({"model": "model", "output": "out", "lowrank": {"rank_ratio": 0.5}, **changes})
    refuse_several(config, ALONE)
    with pytest.raises(ConfigError, match=message):
        refuse_several(config, World(1, 4))


# Runs with a budget, by one, two and four processes.


class Runs(NamedTuple):
    """Checkpoints of one model by how many processes made them, and how those ended.

    Attributes:
        source: Flags that name model and text.
        statistics: Flags that name what `lord sensitivity` measured.
        folders: The checkpoints.
        ended: The jobs.
    """

    source: list[str | Path]
    statistics: list[str | Path]
    folders: dict[int, Path]
    ended: dict[int, Ended]


def quantize(count: int, script: str, output: Path, *flags: str | Path) -> Ended:
    work = output.parent / f"job-{time.monotonic_ns()}"
    return torchrun(count, script, work, "lord", "quantize", "--no-verify", "--output", output, *flags)


@pytest.fixture(scope="module")
def runs(model_folder: Callable[..., Path], corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    source = ["--model", model_folder("compressible"), "--dataset", corpus_file, *TEXT]
    statistics = ["--statistics", root / "statistics"]
    folders = {count: root / f"by-{count}" for count in (1, 2, 4)}
    alone(sensitivity_command, *source, *MEASURED, "--output", statistics[1])
    alone(quantize_command, *source, *PLANNED, *statistics, "--output", folders[1])
    ended = {count: quantize(count, START, folders[count], *source, *PLANNED, *statistics) for count in (2, 4)}
    for one in ended.values():
        assert one.code == 0, one.stderr
    return Runs(source, statistics, folders, ended)


def values_of(runs: Runs, count: int, file: str) -> dict[str, Any]:
    return json.loads((runs.folders[count] / file).read_text())


@pytest.mark.slow
def test_any_number_of_processes_runs_the_same_plan(runs: Runs) -> None:
    plans = [values_of(runs, count, "config.json")["quantization_config"] for count in (1, 2, 4)]
    assert plans[0]["rank_pattern"] and plans[0] == plans[1] == plans[2]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_sensitivity_pass_is_that_of_one_process(
    count: int, model_folder: Callable[..., Path], corpus_file: Path, tmp_path: Path
) -> None:
    """Of three processes one has no window of a half in the backward pass, and two none of the other. Either half has more
    tokens than layers have features: directions that it never saw would be in no order."""
    text = ["--num-samples", "16", "--seq-len", "64", "--batch-size", "2", "--float64"]
    flags = ["--model", model_folder("llama"), "--dataset", corpus_file, *text, *MEASURED, "--output"]
    alone(sensitivity_command, *flags, tmp_path / "alone" / "x.stats")
    ended = torchrun(count, START, tmp_path / "job", "lord", "sensitivity", *flags, tmp_path / "x.stats")
    assert ended.code == 0, ended.stderr
    assert "layers measured" in ended.stdout[0] and ended.stdout[1:] == [""] * (count - 1)
    one, other = load_statistics(tmp_path / "alone" / "x.stats"), load_statistics(tmp_path / "x.stats")
    assert (other.origin, other.sites) == (one.origin, one.sites)
    assert list(other.losses) == list(one.losses) and list(other.groups) == list(one.groups) != []
    for name, loss in [*one.losses.items(), *one.groups.items()]:
        found = (other.losses | other.groups)[name]  # type: ignore[operator]
        for ours, theirs in ((found.tail, loss.tail), (found.cut, loss.cut)):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9 * float(loss.tail[0]))
        assert found.dense == pytest.approx(loss.dense, rel=1e-6) and found.groups == pytest.approx(loss.groups, rel=1e-6)
        assert found.dense_orders == pytest.approx(loss.dense_orders, rel=1e-5, abs=1e-9 * loss.dense_orders.second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "job", "x.stats"]


# Of the second block's layers one is not measured to its end, by the second process; otherwise tells of how many blocks
# layers were measured.
FAILS = """
    import os, signal, sys
    from optimum.commands.optimum_cli import main
    import lord_quant.losses.probing as probing
    from lord_quant.errors import NumericsError

    how, measured, probe = sys.argv.pop(), set(), probing._Seen.probed
    def fail(seen, names, **settings):
        measured.add(id(seen))
        if how != "counted" and os.environ["RANK"] == "1" and len(measured) == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise NumericsError("spoilt")
        return probe(seen, names, **settings)
    probing._Seen.probed = fail
    try:
        main()
    finally:
        print("blocks measured:", len(measured))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["told", "killed"])
def test_a_sensitivity_pass_that_one_process_ends_goes_on(
    how: str, model_folder: Callable[..., Path], corpus_file: Path, tmp_path: Path
) -> None:
    flags = ["--model", model_folder("llama"), "--dataset", corpus_file, *TEXT, *MEASURED, "--output", tmp_path / "x.stats"]
    began = time.monotonic()
    ended = torchrun(2, FAILS, tmp_path / "job", "lord", "sensitivity", *flags, how)
    assert ended.code != 0 and time.monotonic() - began < LIMIT / 2
    assert not any("Traceback" in text for text in ended.stderr)
    if how == "told":
        assert [text.count("optimum-cli lord: NumericsError: spoilt") for text in ended.stderr] == [0, 1]
    assert len(list(tmp_path.glob(".x.stats.sensing-*"))) == 1 and not (tmp_path / "x.stats").exists()
    again = torchrun(2, FAILS, tmp_path / "again", "lord", "sensitivity", *flags, "counted")
    assert again.code == 0, again.stderr
    assert all("blocks measured: 1\n" in said for said in again.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "job", "x.stats"]


@pytest.mark.slow
def test_a_budget_is_measured_together_and_gives_the_plan_of_one_process(runs: Runs, tmp_path: Path) -> None:
    ended = quantize(2, START, tmp_path / "out", *runs.source, *PLANNED)
    assert ended.code == 0, ended.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == values_of(runs, 1, "config.json")["quantization_config"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def code_share(one: Path, other: Path) -> float:
    """Returns the share of 4-bit codes in which two checkpoints differ."""
    left, right = stored_tensors(one), stored_tensors(other)
    assert left.keys() == right.keys()
    different = total = 0
    for name in left:
        if name.endswith("qweight"):
            codes = [(side[name][..., None] >> torch.arange(0, 32, 4)) & 15 for side in (left, right)]
            different += int((codes[0] != codes[1]).sum())
            total += codes[0].numel()
    return different / total


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_codes_and_losses_are_those_of_one_process(count: int, runs: Runs) -> None:
    from transformers import AutoModelForCausalLM

    share = code_share(runs.folders[1], runs.folders[count])
    tokens = torch.randint(1, VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(3))
    losses = []
    for folder in (runs.folders[1], runs.folders[count]):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            losses.append(float(model(input_ids=tokens, labels=tokens).loss))
    print(f"{count} processes: {100 * share:.4f} % of codes differ, loss {losses[0]:.6f} and {losses[1]:.6f}")
    assert share <= 0.005
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_report_says_what_every_process_did(count: int, runs: Runs) -> None:
    report = values_of(runs, count, "lord_report.json")
    assert "processes" not in values_of(runs, 1, "lord_report.json")
    assert [own["tokens"] for own in report["processes"]] == [8 * 32 // count] * count
    assert sum(own["layers"] for own in report["processes"]) == len(report["layers"])
    assert all(own["layers"] > 0 and own["seconds"] > 0 for own in report["processes"])
    spent = sum(
        layer["decompose_seconds"] + sum(part["seconds"] for part in layer["gptq"].values()) for layer in report["layers"]
    )
    assert sum(own["seconds"] for own in report["processes"]) == pytest.approx(spent, abs=0.01)
    assert report["calibration"]["num_tokens"] == 8 * 32


@pytest.mark.slow
def test_only_the_first_process_prints(runs: Runs) -> None:
    for count in (2, 4):
        first, *others = runs.ended[count].stdout
        assert "written to" in first and f"processes     {count}" in first and not any(others)
        assert not any("warning:" in text or "Traceback" in text for text in runs.ended[count].stderr[1:])


@pytest.mark.slow
def test_the_command_of_the_readme_takes_every_flag(runs: Runs, tmp_path: Path) -> None:
    """Without `--` in front of the command torchrun takes `--log` for one of its own."""
    launch = ["--standalone", "--nproc_per_node", "2", "--no-python", "--"]
    command = [Path(sys.executable).parent / "optimum-cli", "lord", "quantize", *runs.source, "--rank-ratio", "0.5"]
    flags = ["--group-size", "32", "--output", tmp_path / "out", "--log", tmp_path / "run.jsonl", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, *command, *flags],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "processes     2" in done.stdout and not (tmp_path / "run.jsonl").exists()


# Runs that fail.

KILLED = """
    import os, signal
    from optimum.commands.optimum_cli import main
    from lord_quant.runs.joint import JointRun

    step = JointRun.step
    def die(self, index):
        if index == 1 and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, index)
    JointRun.step = die
    main()
"""
# An error of one process alone, which the other hears of when it wants to meet.
SPOILT = """
    from optimum.commands.optimum_cli import main
    import lord_quant.runs.execution as execution
    from lord_quant.errors import NumericsError

    def spoil(config, world):
        if world.rank == 1:
            raise NumericsError("spoilt")
    execution.refuse_several = spoil
    main()
"""


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_the_same_command_goes_on(runs: Runs, tmp_path: Path) -> None:
    output, flags = tmp_path / "out", [*runs.source, *PLANNED, *runs.statistics]
    began = time.monotonic()
    killed = quantize(2, KILLED, output, *flags)
    assert killed.code != 0 and time.monotonic() - began < LIMIT / 2
    assert not any("Traceback" in text for text in killed.stderr)
    assert not output.exists() and (tmp_path / ".out.unfinished").is_dir()
    with pytest.raises(OutputError, match="processes was 2, now 1"):
        alone(quantize_command, *flags, "--output", output)
    resumed = quantize(2, START, output, *flags)
    assert resumed.code == 0, resumed.stderr
    assert json.loads((output / "lord_report.json").read_text())["blocks_resumed"] == 1
    assert different_tensors(runs.folders[2], output) == []
    assert not (tmp_path / ".out.unfinished").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "stack", "teller", "message"),
    [
        (SPOILT, "joint", 1, "optimum-cli lord: NumericsError: spoilt"),
        (START, "naive", 0, "optimum-cli lord: ConfigError: stack is 'naive' in 2 processes; wanted a start without"),
    ],
    ids=["of one process", "of all"],
)
def test_an_error_is_told_once_and_ends_the_job(
    script: str, stack: str, teller: int, message: str, model_folder: Any, corpus_file: Path, tmp_path: Path
) -> None:
    source = ["--model", model_folder("llama"), "--dataset", corpus_file, *TEXT, "--stack", stack]
    ended = quantize(2, script, tmp_path / "out", *source, "--rank-ratio", "0.5", "--group-size", "32")
    assert ended.code not in (0, -signal.SIGKILL)
    assert [ended.stderr[rank].count("optimum-cli lord:") for rank in (teller, 1 - teller)] == [1, 0]
    assert message in ended.stderr[teller] and not any("Traceback" in text for text in ended.stderr)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.unfinished").exists()
