# SPDX-License-Identifier: Apache-2.0
"""What plans lose beside other plans: of the same budget and seed, over the dense model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "differences.py"


def results(path: Path, rows: dict[tuple[str, int], float]) -> Path:
    found = [{"label": label, "seed": seed, "flags": [], "perplexity": value} for (label, seed), value in rows.items()]
    path.write_text(json.dumps({"rows": [{"label": "dense", "seed": 0, "flags": None, "perplexity": 10.0}, *found]}))
    return path


def test_excess_is_compared_by_budget_and_seed(tmp_path: Path) -> None:
    first = {("planned:2.5", 0): 12.0, ("planned:2.5", 1): 14.0, ("planned:3.0", 0): 11.0, ("planned:3.5", 0): 10.5}
    second = {("planned:2.5", 0): 11.0, ("planned:2.5", 1): 14.0, ("planned:3.0", 0): 11.5, ("planned-dense:3.5", 0): 10.1}
    one, other = results(tmp_path / "one.json", first), results(tmp_path / "other.json", second)
    output = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--output", str(output), "--pair"]
    done = subprocess.run([*command, "an idea", f"{one}:planned", f"{other}:planned"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["found"][0]
    assert found["budgets"] == {"2.5": 5 / 6 - 1, "3.0": 0.5}
    assert found["all"] == {"mean": (5 / 6 - 1 + 0.5) / 2, "min": -0.5, "max": 0.5, "runs": 3}
    assert "| an idea" in output.with_suffix(".md").read_text() and "-17%" in done.stdout
    done = subprocess.run([*command, "none", f"{one}:planned-dense", f"{other}:planned"], capture_output=True, text=True)
    assert done.returncode and "holds no rows of planned-dense" in done.stderr
