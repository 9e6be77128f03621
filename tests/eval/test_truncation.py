# SPDX-License-Identifier: Apache-2.0
"""Whitened SVD is one, and what is compared is the same problem solved twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def truncation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import truncation

    yield truncation
    for name in ("truncation", "plain", "tables"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_whitened_svd_reaches_the_least_error_there_is(truncation: Any, shape: tuple[int, int]) -> None:
    problem = truncation.make_problem(shape, 0.5, 3, "cpu")
    assert problem.rank == 32
    weight, covariance = problem.weight.double(), problem.covariance.double()
    for way in ("whitened", "lean", "ours"):
        left = truncation.run_way(way, problem).product().double() - weight
        # Eckart and Young: the discarded squared singular values of W Σ^½.
        tail = torch.linalg.eigvalsh(weight @ covariance @ weight.T).flip(0)[32:].clamp_min(0).sum()
        assert float((left @ covariance * left).sum()) == pytest.approx(float(tail), rel=1e-3)
    of_loss = truncation.run_way("ours_of_loss", problem)
    seen = torch.linalg.cholesky(problem.metric.double()).T
    costs = [
        float(
            (
                (seen @ (factors.product().double() - weight)) @ covariance * (seen @ (factors.product().double() - weight))
            ).sum()
        )
        for factors in (of_loss, truncation.run_way("ours", problem))
    ]
    assert costs[0] < 0.99 * costs[1]  # another metric, another optimum


def test_shapes_are_those_of_starcoder(truncation: Any) -> None:
    assert sum(m * n for m, n in truncation.SHAPES["starcoder-15b"].values()) * 40 == pytest.approx(15.16e9, rel=1e-3)
    assert truncation.SHAPES["small"]["mlp.c_proj"] == (768, 3072)


def test_every_way_is_timed_as_often_as_asked_for(truncation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(truncation.SHAPES, "small", {"fc": (128, 64), "proj": (64, 128)})
    rows = truncation.compare("small", 0.5, 2, 0, "cpu")
    assert [(row["layer"], row["rank"]) for row in rows] == [("fc", 32), ("proj", 32)]
    for row in rows:
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in row["seconds"].values())
        for other in ("whitened", "lean"):
            assert row["errors"]["ours"] == pytest.approx(row["errors"][other], rel=1e-3)
    assert all(line["same_error"] for line in truncation.summarise(rows, 1e-3))


def test_summary_of_canned_rows(truncation: Any) -> None:
    def row(name: str, ours: float, whitened: float, off: float) -> dict[str, Any]:
        seconds = {"ours": [ours, 9.0, ours], "whitened": [whitened] * 3, "lean": [5.0] * 3, "ours_of_loss": [2 * ours] * 3}
        errors = {"ours": 0.1, "whitened": 0.1, "lean": 0.1 + off, "ours_of_loss": 0.2}
        return {"layer": name, "shape": (4, 2), "rank": 32, "seconds": seconds, "errors": errors}

    first, second, whole = truncation.summarise([row("a", 1.0, 6.0, 0.0), row("b", 3.0, 6.0, 2e-4)], 1e-3)
    assert first["whitened_over_ours"] == 6 and first["same_error"]
    assert second["whitened_over_ours_of_loss"] == 1 and not second["same_error"]
    assert whole["whitened_over_ours"] == 3 and whole["layer"] == "all" and not whole["same_error"]
    assert whole["lean_over_ours"] == 2.5 and whole["lean_over_ours_of_loss"] == 1.25
    lines = truncation.markdown([first, second, whole]).splitlines()
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["b", "4x2", "3", "6", "2.00", "5", "1.67", "NO", "6", "1.00", "0.83"]
