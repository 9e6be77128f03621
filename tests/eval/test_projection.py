# SPDX-License-Identifier: Apache-2.0
"""The projection: the model it stands for, counts over speeds, and what it calls itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def projection(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import projection

    yield projection
    for name in ("projection", "provenance", "tables", "variants"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_default_is_starcoder_and_is_no_measurement(tmp_path: Path) -> None:
    command = [sys.executable, str(EVAL / "projection.py"), "--output", str(tmp_path / "p.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert found["projection"] is True and found["total"]["parameters"] == pytest.approx(15.5e9, rel=0.01)
    text = (tmp_path / "p.md").read_text(encoding="utf-8")
    assert "not a measurement" in text and "128 x 2048 tokens" in text
    phases = {row["phase"]: row for row in found["phases"]}
    assert list(phases) == [
        "sensitivity", "forward, both streams", "moments", "anchor", "decompose", "quantize", "pack", "files",
    ]  # fmt: skip
    # The dense stream alone: two operations per weight and token.
    assert phases["forward, both streams"]["work"]["passes"] > 2 * 15.16e9 * 128 * 2048
    assert found["total"]["seconds"]["total"] == pytest.approx(sum(row["seconds"]["total"] for row in phases.values()))
    before = {row["phase"]: row["work"] for row in found["sensitivity_pass"]["phases"]}
    assert before["gradients"]["passes"] > 7 * 2 * 15.16e9 * 2**16  # once forward, twice forward and back for two losses
    assert before["probe"]["turns"] > 3 * phases["quantize"]["work"]["turns"] and "The sensitivity pass" in text


def test_seconds_are_counts_over_speeds(projection: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--width", "256", "--inner", "1024", "--blocks", "2", "--num-samples", "4", "--seq-len", "64")
    speeds = ("--half-tflops", "1", "--single-tflops", "0.5", "--bandwidth", "2", "--efficiency", "0.25")
    rates = ("--eigen-efficiency", "0.1", "--kernel-us", "2", "--cpu-gflops", "3", "--pack-rate", "1e6", "--disk", "4")
    loops = ("--loop-ns", "3", "--copies", "5")
    monkeypatch.setattr(
        sys, "argv", ["projection.py", "--output", str(tmp_path / "p.json"), *small, *speeds, *rates, *loops]
    )
    projection.main()
    found = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    for row in found["phases"]:
        work, seconds = row["work"], row["seconds"]
        assert seconds["passes"] == pytest.approx(work["passes"] / 0.25e12)
        assert seconds["products"] == pytest.approx((work["products"] + work["solves"]) / 0.125e12)
        assert seconds["eigen"] == pytest.approx(work["eigen"] / 0.05e12)
        assert seconds["memory"] == pytest.approx(work["moved"] / 0.5e12)
        assert seconds["starts"] == pytest.approx(work["turns"] * 25 * 2e-6)
        assert seconds["loops"] == pytest.approx(work["looped"] * (3e-9 + 24 / 5e9))
        assert seconds["cpu"] == pytest.approx(work["rotations"] / 3e9 + work["packed"] / 1e6)
        assert seconds["files"] == pytest.approx(work["files"] / 4e9)
        assert seconds["total"] == pytest.approx(sum(value for part, value in seconds.items() if part != "total"))
    assert "by flags: half_flops, single_flops, bandwidth" in found["settings"]["speeds"]["source"]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--efficiency", "1.5"), "--efficiency is 1.5; wanted a share above 0, at most 1"),
        (("--disk", "0"), "--disk is 0.0; wanted a speed above 0"),
        (("--blocks", "0"), "--blocks is 0; wanted 1 at least"),
        (("--group-size", "48"), "group_size is 48"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    projection: Any, tmp_path: Path, flags: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["projection.py", "--output", str(tmp_path / "p.json"), *flags])
    with pytest.raises(SystemExit, match=why):
        projection.main()
    assert not (tmp_path / "p.json").exists()
