# SPDX-License-Identifier: Apache-2.0
"""On a device that is not the processor: nothing meets what was left behind, and what comes out is as good.

The device is made for this (`elsewhere/device.cpp`). Like a GPU it rounds rows of a step as independent, in loops on the
processor; `test_cuda.py` is for what only a GPU shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere.device import NAME, lacking
from families import build, save


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(lacking()), reason=f"compiling a device needs {lacking()}")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("elsewhere")
    for family, dtype, name in (
        ("gpt_bigcode", torch.float32, "gpt_bigcode"),
        ("gpt_bigcode", torch.bfloat16, "gpt_bigcode-half"),
        ("llama", torch.bfloat16, "llama-half"),
    ):
        save(build(family).to(dtype), root / name)
    output, paths = root / "found.json", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "elsewhere.runs", *map(str, (root / "build", root, corpus_file, output))]
    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize("what", ["sum", "product", "write", "mask", "drawn"])
def test_the_device_tells_what_was_left_behind(what: str, found: dict[str, Any]) -> None:
    assert "same device" in found["meetings"][what] or "expected a generator" in found["meetings"][what]


def test_loops_come_back_from_the_processor_with_all_they_found(found: dict[str, Any]) -> None:
    here, there = found["cpu"]["loops"]["values"], found[NAME]["loops"]["values"]
    assert len(here) > 9 * 16 * 40 and there == here


def test_float_factors_are_those_of_the_cpu(found: dict[str, Any]) -> None:
    assert found[NAME]["float"] == pytest.approx(found["cpu"]["float"], rel=1e-3)


@pytest.mark.parametrize("what", ["bigcode", "llama", "pivoted"])
def test_both_factors_at_4_bits_lose_what_they_lose_on_the_cpu(what: str, found: dict[str, Any]) -> None:
    """But for what rows of a step do not take back from each other there."""
    here, there = found["cpu"][what], found[NAME][what]
    assert there == pytest.approx(here, rel=0.1)
    assert 0.99 < sum(there.values()) / sum(here.values()) < 1.02


def test_a_budget_is_measured_planned_and_run(found: dict[str, Any]) -> None:
    here, there = found["cpu"]["budget"], found[NAME]["budget"]
    assert here.keys() == there.keys()
    assert 0.8 < there["predicted"] / here["predicted"] < 1.3  # some 10 % are chance on so little text


def test_a_model_that_is_loaded_onto_the_device_is_compressed_and_runs_there(found: dict[str, Any]) -> None:
    assert found[NAME]["loaded"]["nll"] == pytest.approx(found["cpu"]["loaded"]["nll"], rel=0.02)
