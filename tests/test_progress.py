# SPDX-License-Identifier: Apache-2.0
"""What a run tells of how far it is: lines of its log, bars on a terminal, and what stands in the way."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lord_quant.config import LordConfig
from lord_quant.errors import OutputError
from lord_quant.progress import Progress
from lord_quant.runs.execution import execute
from lord_quant.runs.journal import Journal
from lord_quant.runs.pipeline import prepare


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_log_tells_of_every_step_and_how_long_the_rest_will_take(tmp_path: Path) -> None:
    log = tmp_path / "new" / "run.jsonl"
    with Progress(log, about={"model": "m"}) as progress:
        with progress.phase("load"):
            pass
        with progress.phase("stack", 4, resumed=1):
            for index in (1, 2):
                time.sleep(0.05)
                with progress.layers(f"h.{index}.q", f"h.{index}.k"):
                    pass
                progress.block(f"h.{index}")
                last = lines_of(log)[-1]  # on disk before the run goes on
                assert last["event"] == "block" and last["name"] == f"h.{index}"
    lines = lines_of(log)
    steps = ["layer", "layer", "block"]
    assert [line["event"] for line in lines] == ["start", "phase", "phase", *steps, *steps, "finished"]
    assert lines[0]["model"] == "m" and "blocks_done" not in lines[1]
    assert [line["blocks_done"] for line in lines[2:-1]] == [1, 1, 1, 2, 2, 2, 3] and lines[2]["eta_seconds"] is None
    assert [line["name"] for line in lines[3:-1]] == ["h.1.q", "h.1.k", "h.1", "h.2.q", "h.2.k", "h.2"]
    for at, share in ((5, 2 / 1), (8, 1 / 2)):  # blocks left over blocks done here; the one done before counts as neither
        assert lines[at]["eta_seconds"] == pytest.approx((lines[at]["seconds"] - lines[2]["seconds"]) * share, abs=0.02)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[-1] >= 0.1
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert all(0.5 < line["rss_bytes"] / resident < 2 for line in lines)


def test_a_failure_is_told_and_another_run_goes_on_behind_the_last_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    with pytest.raises(ZeroDivisionError), Progress(log) as progress, progress.phase("stack", 2):
        progress.block("h.0")
        _ = 1 / 0
    assert lines_of(log)[-1]["error"] == "ZeroDivisionError: division by zero"
    with log.open("ab") as handle:
        handle.write(b'{"event": "blo')
    with Progress(log):
        pass
    assert [line["event"] for line in lines_of(log)] == ["start", "phase", "block", "failed", "start", "finished"]


def test_a_log_that_cannot_go_on_ends_and_the_run_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, reached = tmp_path / "run.jsonl", []
    with Progress(log) as progress:
        with files_no_larger_than(log.stat().st_size):
            progress.block("h.0")
            progress.block("h.1")
        reached.append("here")
    assert reached and [line["event"] for line in lines_of(log)] == ["start"]
    assert [record.message for record in caplog.records] == [
        f"the log {log} ends here, the run goes on: [Errno 27] File too large"
    ]


def test_places_where_no_log_can_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("mine\n")
    model, output = str(tmp_path / "model"), str(tmp_path / "out")
    refused = {
        tmp_path: "is a folder; wanted a file",
        thesis: "is there and no log of a run; wanted a new file",
        thesis / "log": "cannot be written",
        Path("/dev/null"): "is there and no log of a run",
        tmp_path / "model" / "log": "is or lies in the model itself",
        tmp_path / "out" / "log": "is or lies in the output itself",
    }
    for log, message in refused.items():
        with pytest.raises(OutputError, match=message):
            Progress(log, apart={"model": model, "output": output, "dataset": None})
    assert thesis.read_text() == "mine\n" and sorted(path.name for path in tmp_path.iterdir()) == ["model", "thesis.tex"]


SHOW = """
import time
from lord_quant.progress import Progress
progress = Progress()
with progress.phase("load"), progress.phase("stack", 3, 1):
    for index in (1, 2):
        with progress.layers(f"h.{index}.q"):
            time.sleep(0.2)
        progress.block(f"h.{index}")
"""


@pytest.mark.slow
def test_lines_now_and_then_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(every: float, quiet: bool = False) -> list[str]:
        monkeypatch.setattr("lord_quant.progress.SAY_EVERY", every)
        with Progress(quiet=quiet) as progress, progress.phase("stack", 4, resumed=1):
            for index in (1, 2):
                time.sleep(0.05)
                progress.block(f"h.{index}")
        return capsys.readouterr().err.splitlines()

    first, second = run(every=0.01)
    assert re.fullmatch(r"stack: 2 of 4 blocks, about 0\.0 min left, rss [\d.]+ GB", first) and "3 of 4 blocks" in second
    assert len(run(every=0.07)) == 1  # the first block is too early
    assert run(every=0.01, quiet=True) == run(every=20) == []


def test_bars_are_shown_on_a_terminal_and_no_bars_elsewhere() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    piped = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, env=environment, timeout=120)
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, "", "")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    shown = b""
    with subprocess.Popen([sys.executable, "-c", SHOW], stderr=theirs, env=environment) as process:
        os.close(theirs)
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # a terminal ends like this
                break
            shown += part
            if not part:
                break
    os.close(ours)
    text = shown.decode()
    assert process.returncode == 0 and "Traceback" not in text and "load" not in text
    assert "stack:  33%" in text and "1/3" in text and "stack: 100%" in text and "3/3" in text
    assert "h.1.q, rss 0." in text and "h.2.q, rss" in text


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["joint", "naive"])
def test_a_run_that_is_continued_tells_all_of_its_story(
    stack: str, model_folder: Callable[..., Path], corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LordConfig.from_dict(
        {
            "model": str(model_folder("llama")),
            "output": str(tmp_path / "out"),
            "stack": stack,
            "lowrank": {"rank_ratio": 0.5},
            "gptq": {"bits": 4, "group_size": 32},
            "calibration": {"dataset": str(corpus_file), "num_samples": 4, "seq_len": 32},
        }
    )
    log, finish = tmp_path / "run.jsonl", Journal.finish

    def break_off(journal: Journal, block: Any) -> None:
        finish(journal, block)
        if len(journal.blocks) == 1:
            raise KeyboardInterrupt

    if stack == "joint":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), Progress(log) as progress:
            patch.setattr(Journal, "finish", break_off)
            execute(prepare(config), progress, verify=False)
    with Progress(log) as progress:
        job = prepare(config)
        report = execute(job, progress, verify=False)
    lines = lines_of(log)
    phases = [line["phase"] for line in lines if line["event"] == "phase"]
    if stack == "naive":
        assert phases == ["load", "write"] and [lines[0]["event"], lines[-1]["event"]] == ["start", "finished"]
        return
    assert report["blocks_resumed"] == 1
    assert phases == ["load", "sensitivity", "stack", "load", "sensitivity", "stack", "write"]
    layers = [line["name"] for line in lines if line["event"] == "layer"]
    assert sorted(layers) == sorted(layer.name for layer in job.plan.layers)
    told = [(line["event"], line.get("name"), line.get("blocks_done")) for line in lines if line.get("phase") == "stack"]
    assert [one for one in told if one[0] != "layer"] == [
        ("phase", None, 0),
        ("phase", None, 1),
        ("block", "model.layers.1", 2),
    ]
    passed = [line["name"] for line in lines if line.get("phase") == "sensitivity" and line["event"] == "block"]
    assert passed == ["model.layers.0", "model.layers.1", "model.layers.1", "model.layers.0"] * 2
    ends = [line["event"] for line in lines if line["event"] in ("start", "failed", "finished")]
    assert ends == ["start", "failed", "start", "finished"]
