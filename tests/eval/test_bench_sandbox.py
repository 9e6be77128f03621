# SPDX-License-Identifier: Apache-2.0
"""The benchmark of runners: both run the same samples, and a verdict they do not share ends it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lord_quant.evaluation.humaneval import load_problems


EVAL = Path(__file__).resolve().parents[2] / "eval"


def bench(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EVAL / "bench_sandbox.py"), "--output", str(tmp_path / "out.json"), "--repeats", "1"]
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)


def test_right_and_wrong_solutions_on_both_sides(tmp_path: Path) -> None:
    done = bench(tmp_path, "--set", "right", "wrong", "mixed", "--problems", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(line["set"], line["samples"], line["passed"]) for line in found["summary"]] == [
        ("right", 2, 2),
        ("wrong", 2, 0),
        ("mixed", 2, 2),
    ]
    for run in found["runs"]:
        line = next(line for line in found["summary"] if line["set"] == run["set"])
        assert line["per_second"][run["side"]] == pytest.approx(2 / run["seconds"])
    assert (tmp_path / "out.md").read_text().strip() in done.stdout


def test_mutations_change_what_is_returned_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem has one at least; without what stands behind `return` all are the published solution."""
    monkeypatch.syspath_prepend(EVAL)
    from mutations import mutations

    class Blank(ast.NodeTransformer):
        def visit_Return(self, node: ast.Return) -> ast.Return:
            return ast.Return(None)

    def shape(source: str) -> str:
        return ast.dump(Blank().visit(ast.parse(source)))

    for problem in load_problems().values():
        own, published = mutations(problem), problem.prompt + problem.canonical_solution
        dumps = {ast.dump(ast.parse(problem.prompt + other)) for other in own}
        assert own and ast.dump(ast.parse(published)) not in dumps
        assert {shape(problem.prompt + other) for other in own} == {shape(published)}


def test_other_verdicts_end_it(tmp_path: Path) -> None:
    """An object equal to everything passes in theirs; the sides then do not do the same work."""
    forged = "    class Yes:\n        def __eq__(self, other): return True\n    return Yes()\n"
    samples: list[dict[str, Any]] = [{"task_id": "HumanEval/0", "completion": forged}]
    (tmp_path / "forged.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    done = bench(tmp_path, "--samples", str(tmp_path / "forged.jsonl"), "--timeout", "20")
    assert done.returncode == 1
    assert "HumanEval/0: ours False, theirs True" in done.stderr
