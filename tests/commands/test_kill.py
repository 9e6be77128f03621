# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment and started again, a run ends with the bytes of one that was not killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from families import different_tensors


pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("LORD_QUANT_KILLS", "1"))
"""How often the run is killed in all, over as many starts as that takes."""
START = "from optimum.commands.optimum_cli import main; main()"
# Stands in for a kill behind the rename of the finished folder.
DIE_WHEN_DONE = """
import os, signal
from lord_quant.runs.journal import Journal
Journal.close = lambda journal: os.kill(os.getpid(), signal.SIGKILL)
"""


def start(model: Path, corpus: Path, output: Path, before: str = "") -> subprocess.Popen[str]:
    flags = ["--model", model, "--dataset", corpus, "--output", output, "--rank-ratio", "0.5", "--group-size", "32"]
    flags += ["--seq-len", "64", "--num-samples", "32"]
    return subprocess.Popen(
        [sys.executable, "-c", before + START, "lord", "quantize", "--no-verify", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_resume_ends_with_the_same_bytes(
    model_folder: Callable[..., Path], corpus_file: Path, tmp_path: Path
) -> None:
    model = model_folder("llama")
    began = time.monotonic()
    whole = start(model, corpus_file, tmp_path / "whole")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    seconds, generator, kills, resumed = time.monotonic() - began, random.Random(0), 0, 0
    while kills < KILLS:
        output = tmp_path / f"killed-{kills}"
        while True:  # again and again, until it was left alone long enough
            process = start(model, corpus_file, output)
            try:
                _, errors = process.communicate(timeout=generator.uniform(0.3, 1.1) * seconds if kills < KILLS else 300)
                assert process.returncode == 0, errors
                break
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.communicate()
                kills += 1
                # All or nothing: a kill may come after the rename.
                assert not output.exists() or (output / "lord_report.json").is_file()
        assert different_tensors(tmp_path / "whole", output) == []
        assert (output / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()
        resumed += json.loads((output / "lord_report.json").read_text())["blocks_resumed"]
    print(f"{kills} kills, {resumed} blocks resumed")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_sensitivity_pass_goes_on_and_ends_with_the_same_bytes(
    sent: signal.Signals, model_folder: Callable[..., Path], corpus_file: Path, tmp_path: Path
) -> None:
    model = model_folder("llama", num_hidden_layers=4)

    def sense(name: str, *flags: str) -> subprocess.Popen[str]:
        given = ["--model", model, "--dataset", corpus_file, "--output", tmp_path / name / "x.stats", "--seq-len", "64"]
        command = [sys.executable, "-c", START, "lord", "sensitivity", *map(str, given), "--num-samples", "16", *flags]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    whole = sense("whole")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    killed, until = sense("killed"), time.monotonic() + 300
    while not list((tmp_path / "killed").glob(".x.stats.sensing-*")):
        assert killed.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    killed.send_signal(sent)
    _, errors = killed.communicate()
    if sent == signal.SIGTERM:
        assert killed.returncode == 143 and "lord: terminated; finished blocks are kept" in errors
    assert not (tmp_path / "killed" / "x.stats").exists()
    (tmp_path / "killed" / "..x.stats.sensing-0123.partial-abc").write_text("of a pass killed while it wrote")
    again = sense("killed", "--log", str(tmp_path / "log"))
    said, errors = again.communicate(timeout=300)
    assert again.returncode == 0 and "layers measured" in said, errors
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert 1 <= sum(line.get("phase") == "probe" and line["event"] == "block" for line in lines) <= 3
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["x.stats"]
    assert (tmp_path / "killed" / "x.stats").read_bytes() == (tmp_path / "whole" / "x.stats").read_bytes()


def test_a_finished_run_says_so_and_does_nothing(
    model_folder: Callable[..., Path], corpus_file: Path, tmp_path: Path
) -> None:
    for expected in ("written to", "finished      by an earlier run of the same command"):
        process = start(model_folder("llama"), corpus_file, tmp_path / "out")
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and expected in said, errors
        stamp = (tmp_path / "out" / "lord_report.json").stat().st_mtime_ns
    assert stamp == (tmp_path / "out" / "lord_report.json").stat().st_mtime_ns


def test_what_a_run_killed_at_its_very_end_left_behind_is_cleared_away_by_the_next(
    model_folder: Callable[..., Path], corpus_file: Path, tmp_path: Path
) -> None:
    killed = start(model_folder("llama"), corpus_file, tmp_path / "out", DIE_WHEN_DONE)
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.unfinished", "out"]
    (tmp_path / ".out.sensed-0123").write_text("of a budget")
    again = start(model_folder("llama"), corpus_file, tmp_path / "out")
    said, errors = again.communicate(timeout=300)
    assert again.returncode == 0 and "finished      by an earlier run of the same command" in said, errors
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
