# SPDX-License-Identifier: Apache-2.0
"""What a process cost is its own; what it raised is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest


EVAL = Path(__file__).resolve().parents[2] / "eval"
WORK = """
import sys, time

def hold():
    held = bytearray(b"x") * int(sys.argv[1])
    time.sleep(0.3)
    return {"held": len(held)}

def work():
    end = time.process_time() + float(sys.argv[1])
    while time.process_time() < end:
        pass
    return "done"

def leave():
    raise SystemExit(0)

def fail():
    raise ValueError("no such thing")

def die():
    import os
    os._exit(3)
"""


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    (tmp_path / "chore.py").write_text(WORK, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(EVAL))
    import processes

    yield processes
    sys.modules.pop("processes", None)


def test_time_memory_and_result_are_those_of_the_process(processes: Any) -> None:
    parents = bytearray(b"x") * 10**9  # which a child must not be charged for
    del parents
    small, large = (processes.measured("chore:hold", str(size)) for size in (10**6, 2 * 10**8))
    assert large.returned == {"held": 2 * 10**8} and large.gpu_bytes is None
    assert large.peak_bytes - small.peak_bytes == pytest.approx(2 * 10**8, rel=0.1)
    assert small.peak_bytes < 10**8 and 0.3 < small.wall_s < 60


def test_processor_time_is_counted_and_limited(processes: Any) -> None:
    whole, cut = (processes.measured("chore:work", "0.6", limit=limit) for limit in (None, 0.3))
    assert whole.finished and whole.returned == "done" and 0.6 < whole.processor_s < 60
    # What is read in the end is cut down to whole ticks, user's and system's time each.
    assert not cut.finished and cut.returned is None and 0.3 - 0.05 < cut.processor_s < 0.6


def test_a_command_line_may_leave_in_good_order(processes: Any) -> None:
    assert processes.measured("chore:leave").returned is None


def test_what_was_raised_is_told(processes: Any) -> None:
    with pytest.raises(
        processes.ProcessFailed, match=r"chore:fail 7 failed with exit code 1: ValueError: no such thing"
    ) as caught:
        processes.measured("chore:fail", "7")
    assert caught.value.reason == "ValueError: no such thing"
    assert isinstance(caught.value, SystemExit)  # ends a script with its message
    with pytest.raises(processes.ProcessFailed, match="exit code 3: no message"):
        processes.measured("chore:die")
