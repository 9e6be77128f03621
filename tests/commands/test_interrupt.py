# SPDX-License-Identifier: Apache-2.0
"""A run that is interrupted or killed leaves nothing that looks finished, and what stood there before still stands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


pytestmark = pytest.mark.slow

# Says when the first layer is being solved, and stays there until a signal comes.
WAIT_WHILE_SOLVING = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
    from optimum.commands.optimum_cli import main
    import lord_quant.runs.pipeline as pipeline

    make = pipeline.Gptq
    def make_slow(*arguments):
        solve = make(*arguments)
        def slow(weight, hessian):
            print("solving", file=sys.stderr, flush=True)
            time.sleep(100)
            return solve(weight, hessian)
        return slow
    pipeline.Gptq = make_slow
    main()
"""
# Stands in for a power cut at the worst moment: weights, configuration and tokenizer are in the staging folder.
DIE_WHILE_WRITING = """
    import os, signal, sys
    from optimum.commands.optimum_cli import main
    import lord_quant.runs.execution as execution

    write = execution.write_weights
    def write_and_die(*arguments, **others):
        write(*arguments, **others)
        os.kill(os.getpid(), signal.SIGKILL)
    execution.write_weights = write_and_die
    main()
"""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    stderr: str
    root: Path


@pytest.fixture(scope="module")
def ended(
    model_folder: Callable[..., Path], corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Ended]:
    """Runs all of them at once: they spend most of their time importing."""
    root = tmp_path_factory.mktemp("interrupted")
    starts = {
        "interrupted": WAIT_WHILE_SOLVING,
        "terminated": WAIT_WHILE_SOLVING,
        "killed": WAIT_WHILE_SOLVING,
        "killed while writing": DIE_WHILE_WRITING,
    }
    processes = {}
    for label, start in starts.items():
        folder = root / label.replace(" ", "-")
        (folder / "output").mkdir(parents=True)
        (folder / "output" / "config.json").write_text('{"model_type": "old"}')
        (folder / "output" / "old.safetensors").write_bytes(b"")
        flags = ["--model", model_folder("llama"), "--dataset", corpus_file, "--output", folder / "output", "--overwrite"]
        flags += ["--rank-ratio", "0.25", "--group-size", "32", "--seq-len", "32", "--num-samples", "4"]
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(start), "lord", "quantize", "--no-verify", *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr.txt").open("w"),
            text=True,
        )
        processes[label] = (process, folder)
    sent = {"interrupted": signal.SIGINT, "terminated": signal.SIGTERM, "killed": signal.SIGKILL}
    results = {}
    try:
        for label, number in sent.items():
            process, folder = processes[label]
            wait_for(lambda folder=folder: "solving" in (folder / "stderr.txt").read_text(), process)
            os.kill(process.pid, number)
        for label, (process, folder) in processes.items():
            process.communicate(timeout=120)
            results[label] = Ended(process.returncode, (folder / "stderr.txt").read_text(), folder)
    finally:
        for process, _ in processes.values():
            process.kill()  # nothing to one that has ended
    return results


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize(("label", "code"), [("interrupted", 130), ("terminated", 143)])
def test_an_interruption_is_reported_and_leaves_nothing(label: str, code: int, ended: dict[str, Ended]) -> None:
    result = ended[label]
    assert result.code == code
    assert (
        f"optimum-cli lord: {label}; finished blocks are kept, the same command goes on" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert sorted(path.name for path in result.root.iterdir()) == ["output", "stderr.txt"]


def test_a_kill_leaves_nothing_that_looks_finished(ended: dict[str, Ended]) -> None:
    for label in ("killed", "killed while writing"):
        assert ended[label].code == -signal.SIGKILL
        assert visible(ended[label].root) == ["output", "stderr.txt"]
    staging = list(ended["killed while writing"].root.glob(".output.partial-*"))
    assert len(staging) == 1, "the process was killed while it wrote"


@pytest.mark.parametrize("label", ["interrupted", "terminated", "killed", "killed while writing"])
def test_what_was_to_be_overwritten_still_stands(label: str, ended: dict[str, Ended]) -> None:
    output = ended[label].root / "output"
    assert json.loads((output / "config.json").read_text()) == {"model_type": "old"}
    assert sorted(os.listdir(output)) == ["config.json", "old.safetensors"]
