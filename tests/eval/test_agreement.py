# SPDX-License-Identifier: Apache-2.0
"""How predictions are held against measurements: scipy's rank correlation, pairs counted by hand, a table, a plot."""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def agreement(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import agreement

    yield agreement
    for name in ("agreement", "tables"):
        sys.modules.pop(name, None)


def row(heldout: float, predicted: float, *, output_error: float = 1.0, kind: str = "dense") -> dict[str, Any]:
    return {
        "kind": kind,
        "type": "mlp.c_fc",
        "predicted": predicted,
        "crossed": 2 * predicted,
        "sloped": 3 * predicted,
        "output_error": output_error,
        "heldout": heldout,
        "heldout_error": 1e-5,
        "calibration": 2 * heldout,
        "heldout_divergence": 3 * heldout,
        "calibration_divergence": heldout,
    }


@pytest.mark.parametrize("values", [100, 4], ids=["distinct", "ties"])
def test_rank_correlation_is_that_of_scipy(agreement: Any, values: int) -> None:
    generator = random.Random(0)
    one = [generator.randrange(values) + 0.5 for _ in range(30)]
    other = [value + generator.gauss(0, 20) if values > 4 else generator.randrange(3) for value in one]
    assert agreement.spearman(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


def test_rank_correlation_of_too_little_is_none(agreement: Any) -> None:
    assert agreement.spearman([1.0, 2.0], [1.0, 2.0]) is None
    assert agreement.spearman([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) is None


def test_pairs_ordered_right_are_counted_alone_and_among_the_clear_ones(agreement: Any) -> None:
    rows = [row(1e-3, 1e-3, output_error=3.0), row(2e-3, 2e-3, output_error=2.0), row(3e-3, 1.5e-3, output_error=1.0)]
    pairs = [{"rows": [0, 1], "errors_apart": 9.0}, {"rows": [1, 2], "errors_apart": 1.0}]
    equal = agreement.summarise(rows, pairs)["equal_bytes"]
    assert (equal["pairs"], equal["clear"]) == (2, 1)
    assert equal["predicted"] == {"all": 0.5, "clear": 1.0, "divergence": 0.5}
    assert equal["output_error"] == {"all": 0.0, "clear": 0.0, "divergence": 0.0}


def test_summary_gives_ratios_by_kind_and_leaves_missing_kinds_out(agreement: Any) -> None:
    rows = [row(value, value / 2) for value in (1e-3, 2e-3, 4e-3)] + [row(5e-3, 1e-3, kind="truncation")]
    kinds = agreement.summarise(rows, [])["kinds"]
    assert list(kinds) == ["all", "truncation", "dense"]
    ratios = {"calibration": 4.0, "heldout": 2.0, "calibration_divergence": 2.0, "heldout_divergence": 6.0}
    assert kinds["dense"]["over_predicted"] == pytest.approx(ratios)
    assert kinds["dense"]["over_crossed"] == pytest.approx({name: ratio / 2 for name, ratio in ratios.items()})
    assert kinds["dense"]["over_sloped"] == pytest.approx({name: ratio / 3 for name, ratio in ratios.items()})
    correlations = [kinds[kind]["correlations"]["heldout"]["predicted"] for kind in ("dense", "truncation")]
    assert correlations == [pytest.approx(1.0), None]


def test_tables_and_plot(agreement: Any, tmp_path: Path) -> None:
    rows = [row(value, value, kind=kind) for kind in agreement.KINDS for value in (-1e-5, 1e-3, 1e-1)]
    joined = {
        "what": "rounded",
        "group": "all",
        "by": "model",
        "layers": 2,
        "predicted": 2.0,
        "crossed": 4.0,
        "sloped": 8.0,
    }
    content = {
        "summary": agreement.summarise(rows, []),
        "together": [
            joined | {"calibration": 3.0, "heldout": 4.0, "calibration_divergence": 2.0, "heldout_divergence": 5.0}
        ],
    }
    text = agreement.tables(content)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert next(line for line in lines if line[0] == "all")[:3] == ["all", "15", "1.000"]
    joint = next(line for line in lines if line[0] == "rounded, whole model")
    assert joint[1:] == ["1", "1.00", "2.50", "1.25", "1.00", "0.50", "0.38"]
    agreement.draw(rows, content["summary"], "model", tmp_path / "plot.png")
    data = (tmp_path / "plot.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 1000 and height > 500
