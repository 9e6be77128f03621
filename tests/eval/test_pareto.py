# SPDX-License-Identifier: Apache-2.0
"""The comparison at equal bytes, on canned rows whose figures can be worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def pareto(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import pareto

    yield pareto
    for name in ("pareto", "provenance", "reference", "rows", "tables", "variants"):
        sys.modules.pop(name, None)


# label → bits per weight, perplexities by seed; the dense model's is 10
RUNS = {
    "planned:2.5": (2.5, [10.5, 11.5]),
    "planned-dense:2.5": (2.4, [12.0, 12.5]),
    "two_factor:1:3:128": (3.0, [11.0]),
    "GPTQ 2:128": (2.0, [20.0, 12.0]),
    "GPTQ 3:128": (3.0, [13.0, 11.0]),
}


@pytest.fixture
def summary(pareto: Any, tmp_path: Path) -> tuple[dict[str, Any], str]:
    results = pareto.Results(tmp_path / "results.json", {}, {})

    def rows(label: str, bpw: float, perplexities: list[float]) -> list[Any]:
        made = [
            pareto.Row("model", label, None if label == pareto.DENSE else (), seed) for seed in range(len(perplexities))
        ]
        for row, perplexity in zip(made, perplexities, strict=True):
            config = {"lowrank": {"rank_pattern": dict.fromkeys("abc"[: row.seed], 32) if label == "planned:2.5" else None}}
            scores = {"bpw": bpw, "tensor_bytes": 1, "perplexity": perplexity, "seconds": 1.0, "config": config}
            results.add(row, scores)
        return made

    (dense,) = rows(pareto.DENSE, 16.0, [10.0])
    made = {label: rows(label, *run) for label, run in RUNS.items()}
    plain = [row for label, own in made.items() if label.startswith("GPTQ") for row in own]
    ours = [row for label, own in made.items() if not label.startswith("GPTQ") for row in own]
    return pareto.summarise(results, dense, ours, plain, [2.5, 3.0])


def test_excess_saved_is_over_the_line_at_a_schemes_own_bytes(summary: tuple[dict[str, Any], str]) -> None:
    lines = {line["label"]: line for line in summary[0]["ours"]}
    # The line falls from 16 to 12 between 2 and 3 bits: its excess is 4 at 2.5 bits and 4.4 at 2.4.
    planned, dense = lines["planned:2.5"]["excess_saved"], lines["planned-dense:2.5"]["excess_saved"]
    assert planned == {"mean": 0.75, "min": 1 - 1.5 / 4, "max": 1 - 0.5 / 4, "runs": 2}
    assert (dense["min"], dense["max"]) == pytest.approx((1 - 2.5 / 4.4, 1 - 2 / 4.4))
    assert lines["two_factor:1:3:128"]["excess_saved"]["mean"] == 0.5


def test_budgets_show_what_was_planned_for_them_over_seeds(summary: tuple[dict[str, Any], str]) -> None:
    first, second = summary[0]["budgets"]
    assert first["planned"]["perplexity"] == {"mean": 11.0, "min": 10.5, "max": 11.5, "runs": 2}
    # Read at the whole budget, where the line of the first seed is at 16.5, that of the second at 11.5.
    saved = [first[kind]["excess_saved"] for kind in ("planned", "planned-dense")]
    assert [(each["min"], each["max"]) for each in saved] == [
        (0, 1 - 0.5 / 6.5),
        (pytest.approx(1 - 2.5 / 1.5), 1 - 2 / 6.5),
    ]
    assert first["planned"]["over_plain_line"]["mean"] == pytest.approx((10.5 / 16.5 + 1) / 2 - 1)
    assert first["planned"]["no_worse"] == [2, 2] and first["planned-dense"]["no_worse"] == [1, 2]  # 12.5 is over 12
    assert second["planned"] is None and second["planned-dense"] is None
    table = summary[1].split("### Budgets")[1].split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == [
        "bpw at most", "best plain GPTQ", "plain line there", "planned-dense", "decomposed", "over the line",
        "excess saved", "no worse", "planned", "decomposed", "over the line", "excess saved", "no worse",
    ]  # fmt: skip
    assert cells[2] == [
        "2.50", "16.000 (2:128)", "14.000", "12.250 (12.000 … 12.500)", "0 (0 … 0)",
        "-9.29% (-27.27% … +8.70%)", "1.3% (-66.7% … 69.2%)", "1 of 2",
        "11.000 (10.500 … 11.500)", "0.5 (0 … 1)", "-18.18% (-36.36% … +0.00%)", "46.2% (0.0% … 92.3%)", "2 of 2",
    ]  # fmt: skip
    assert cells[3][3:] == ["n/a"] * 10


def test_there_is_no_excess_to_save_where_the_line_is_as_good_as_the_dense_model(pareto: Any) -> None:
    assert pareto.excess_saved([10.0], 10.0, 10.0) is None and pareto.excess_saved([10.0], 10.0, None) is None
