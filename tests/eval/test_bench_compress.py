# SPDX-License-Identifier: Apache-2.0
"""The bench of whole runs: canned runs whose figures can be worked out by hand, and a tiny model through all libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import TOKENIZER


EVAL = Path(__file__).resolve().parents[2] / "eval"
MODULES = ("plain", "processes", "provenance", "random_model", "tables", "truncation", "variants")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import bench_compress

    yield bench_compress
    for name in ("bench_compress", *MODULES):
        sys.modules.pop(name, None)


def run(repeat: int, side: str, seconds: float, megabytes: int, gpu: int | None = None) -> dict[str, Any]:
    phases = {"load": 1.0, "quantize" if side != "joint" else "stack": seconds - 1}
    return {
        "repeat": repeat, "turn": 0, "side": side, "phases": phases, "wall_s": seconds + 10,
        "peak_bytes": megabytes * 10**6, "gpu_bytes": gpu,
    }  # fmt: skip


RUNS = [
    run(0, "joint", 4.0, 700), run(0, "optimum", 8.0, 900),
    run(1, "optimum", 10.0, 900), run(1, "joint", 6.0, 600),
    run(2, "joint", 20.0, 800), run(2, "optimum", 10.0, 1100),
]  # fmt: skip


def test_medians_and_ratios_of_canned_runs(bench: Any) -> None:
    found = bench.summarise(RUNS, 500 * 10**6)
    assert found["joint"]["seconds"] == {"median": 6.0, "min": 4.0, "max": 20.0}
    assert found["joint"]["memory_bytes"]["median"] == 200 * 10**6 and found["joint"]["gpu_bytes"] is None
    assert found["joint"]["phases"] == {"load": 1.0, "stack": 5.0} and "ratios" not in found["joint"]
    ratios = found["optimum"]["ratios"]
    assert ratios["seconds"] == {"of_medians": 0.6, "min": 0.5, "max": 2.0}  # pairs: 4/8, 6/10, 20/10
    assert ratios["memory_bytes"] == {"of_medians": 0.5, "min": 0.25, "max": 0.5}  # 200/400, 100/400, 300/600
    assert ratios["gpu_bytes"] is None


def test_tables_of_canned_runs(bench: Any) -> None:
    text = bench.markdown(bench.summarise(RUNS, 500 * 10**6))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line]
    assert cells[0] == ["", "seconds", "wall, s", "memory, MB"]
    assert cells[2] == ["joint, decomposed", "6.0 (4.0 … 20.0)", "16.0 (14.0 … 30.0)", "200 (100 … 300)"]
    assert cells[4][:2] == ["ratio to Optimum GPTQ, dense", "0.60 (0.50 … 2.00)"]
    assert cells[7:] == [["joint, decomposed", "1.0", "5.0", "-"], ["Optimum GPTQ, dense", "1.0", "-", "9.0"]]


def test_a_side_that_failed_is_told_with_its_error(bench: Any) -> None:
    failed = {"repeat": 0, "turn": 1, "side": "gptqmodel", "error": "ValueError: no"}
    found = bench.summarise([*RUNS, failed], 0)
    assert found["gptqmodel"] == {"error": "ValueError: no"}
    assert "GPTQModel, dense failed: `ValueError: no`" in bench.markdown(found)
    alone = bench.markdown(bench.summarise([failed], 0))
    assert alone == "GPTQModel, dense failed: `ValueError: no`"


def test_gpu_memory_is_shown_where_there_is_one(bench: Any) -> None:
    runs = [run(0, "joint", 2.0, 600, 5 * 10**8), run(0, "optimum", 4.0, 600, 10**9)]
    text = bench.markdown(bench.summarise(runs, 0))
    assert "GPU memory, MB" in text and "500 (500 … 500)" in text and "0.50 (0.50 … 0.50)" in text


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--model", "a", "--tokenizer", "b"), "wanted one of them"),
        (("--model", "a"), "no --calibration"),
        (("--shapes", "none"), "nothing to do"),
        (("--repeats", "0"), "--repeats is 0; wanted 1 at least"),
        (("--tokenizer", str(TOKENIZER), "--calibration", "x", "--width", "200"), "width 200; wanted a multiple of 128"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    bench: Any, tmp_path: Path, flags: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_compress.py", "--output", str(tmp_path / "b.json"), *flags])
    with pytest.raises(SystemExit, match=why):
        bench.main()
    assert not (tmp_path / "b.json").exists()


@pytest.mark.slow
def test_a_tiny_model_through_every_library(corpus_file: Path, tmp_path: Path) -> None:
    flags = (
        "--tokenizer", str(TOKENIZER), "--width", "128", "--blocks", "2", "--calibration", str(corpus_file),
        "--num-samples", "2", "--seq-len", "64", "--group-size", "32", "--repeats", "1", "--shapes", "none",
    )  # fmt: skip
    path = tmp_path / "b.json"
    command = [sys.executable, str(EVAL / "bench_compress.py"), *flags, "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [one["side"] for one in found["runs"]] == ["joint", "optimum", "gptqmodel"]
    assert not [one for one in found["runs"] if "error" in one], done.stdout
    for one in found["runs"]:
        assert 0 < sum(one["phases"].values()) < one["wall_s"]
        assert one["peak_bytes"] > 0.9 * found["settings"]["baseline_bytes"] > 10**8
    assert {"sensitivity", "stack", "load", "write"} <= set(found["runs"][0]["phases"])
    assert str(tmp_path) not in path.read_text(encoding="utf-8")  # paths are not published
    assert "ratio to GPTQModel, dense" in path.with_suffix(".md").read_text(encoding="utf-8")
