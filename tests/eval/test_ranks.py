# SPDX-License-Identifier: Apache-2.0
"""Allocated against uniform ranks: budgets from shapes, and canned rows whose figures can be worked out by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lord_quant.sizes.layer_bytes import linear_bytes


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import ranks

    yield ranks
    for name in ("ranks", "provenance", "reference", "rows", "tables", "variants"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(model_folder: Callable[..., Path]) -> str:
    """Two float32 blocks of width 64: q and o 64x64, k and v 32x64, gate and up 128x64, down 64x128; no biases."""
    return str(model_folder("llama", hidden_size=64, intermediate_size=128))


DENSE_WEIGHTS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)


def test_bytes_are_those_of_the_plan_from_shapes_alone(ranks: Any, folder: str) -> None:
    # Rank 32 everywhere. Only gate, up and down shrink by it, to 6144 weights from 8192, and get a bias.
    shrinking = 2 * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 32 * 192 + 128 + 128 + 64)
    size = ranks.size_of(folder, ranks.Uniform(0.5, 16, 32, forced=False))
    assert size == (shrinking, DENSE_WEIGHTS, 6, 14)
    assert size.bpw == 8 * shrinking / DENSE_WEIGHTS
    forced = ranks.size_of(folder, ranks.Uniform(0.5, 16, 32, forced=True))
    outputs = 64 + 64 + 32 + 32 + 128 + 128 + 64
    factors = 32 * (2 * 128 + 2 * 96 + 3 * 192)
    assert forced == (2 * 4 * (factors + outputs), DENSE_WEIGHTS, 14, 14)
    packed = sum(
        linear_bytes(inputs, 32, False, 4, 32, 4).weight + linear_bytes(32, m, False, 4, 32, 4).weight + 2 * m
        for inputs, m in ((64, 64), (64, 64), (64, 32), (64, 32), (64, 128), (64, 128), (128, 64))
    )
    assert ranks.size_of(folder, ranks.Uniform(0.5, 4, 32, forced=True)).num_bytes == 2 * packed


def test_there_is_no_row_where_no_layer_would_shrink(ranks: Any, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks.size_of(folder, ranks.Uniform(0.9, 16, 64, forced=False)) is None
    assert "no row 'uniform 0.9, 16-bit': no layer would be decomposed" in capsys.readouterr().out


@pytest.mark.parametrize(("ratio", "bits", "why"), [(1.5, 4, "rank_ratio is 1.5"), (0.5, 5, "bits is 5")])
def test_illegal_settings_end_the_script(ranks: Any, folder: str, ratio: float, bits: int, why: str) -> None:
    with pytest.raises(SystemExit, match=why):
        ranks.size_of(folder, ranks.Uniform(ratio, bits, 32, forced=True))


def test_budget_admits_the_same_bytes_and_not_one_more(ranks: Any) -> None:
    for num_bytes in (1, 333_333, 1_425_408, 10**12 + 1):
        for weights in (3, 688_128, 4_128_767, 7 * 10**11):
            budget = float(repr(ranks.Size(num_bytes, weights, 1, 1).budget))
            assert num_bytes <= budget * weights / 8 < num_bytes + 1  # as the planner turns it into bytes


def test_flags(ranks: Any) -> None:
    size = ranks.Size(100, 800, 3, 4)
    assert ranks.Uniform(0.75, 4, 64, forced=True).flags == (
        "--stack", "joint", "--rank-ratio", "0.75", "--bits", "4", "--group-size", "64", "--force-rank",
    )  # fmt: skip
    packed, plain = ranks.Uniform(0.5, 4, 64, forced=False), ranks.Uniform(0.5, 16, 64, forced=False)
    assert "--force-rank" not in packed.flags
    assert ranks.allocated_flags("two_factor", packed, size) == (
        "--stack", "joint", "--bits", "4", "--group-size", "64", "--target-bpw", "1.005", "--form", "two_factor",
    )  # fmt: skip
    assert ranks.allocated_flags("all forms, groups", packed, size) == (
        "--stack", "joint", "--bits", "4", "--target-bpw", "1.005",
    )  # fmt: skip
    assert ranks.kinds_of(4) == [*ranks.kinds_of(16), "all forms, groups"]
    assert ranks.allocated_flags("all forms", plain, size) == (
        "--stack", "joint", "--bits", "16", "--target-bpw", "1.005",
    )  # fmt: skip


def test_force_adds_plans_and_replaces_none(ranks: Any) -> None:
    both = ranks.uniform_plans([0.75, 0.5], [16, 4], 64, forced=True)
    assert len({plan.label for plan in both}) == len(both) == 8
    without = ranks.uniform_plans([0.75, 0.5], [16, 4], 64, forced=False)
    assert without == [plan for plan in both if not plan.forced] and len(without) == 4


def test_rows_of_the_same_bytes_are_shared(ranks: Any) -> None:
    size = ranks.Size(100, 800, 3, 4)
    labels = {kind: ranks.allocated_label(kind, 16, size) for kind in ranks.kinds_of(16)}
    comparisons = [ranks.Comparison(ranks.Uniform(0.5, 16, 64, forced), size, labels) for forced in (True, False)]
    rows = [row for each in comparisons for row in ranks.rows_of("model", each, 0)]
    assert len(rows) == 6 and len(dict.fromkeys(rows)) == 4


# The dense model has perplexity 10. Excesses by seed: uniform 2 and 4, allocated 1 and 3, then 1.5 and 3.
RUNS = {"uniform": [12.0, 14.0], "two_factor": [11.0, 13.0], "all forms": [11.5, 13.0]}


def test_summary_and_table(ranks: Any, tmp_path: Path) -> None:
    uniform, size = ranks.Uniform(0.5, 16, 64, forced=False), ranks.Size(1000, 800, 3, 4)
    labels = {kind: ranks.allocated_label(kind, 16, size) for kind in ranks.kinds_of(16)}
    comparison = ranks.Comparison(uniform, size, labels)
    results, dense = ranks.Results(tmp_path / "results.json", {}, {}), ranks.Row("model", ranks.DENSE, None, 0)
    stored = {"tensor_bytes": 1, "seconds": 1.0}
    results.add(dense, stored | {"bpw": 16.0, "perplexity": 10.0})
    rows = [row for seed in (0, 1) for row in ranks.rows_of("model", comparison, seed)]
    names = {label: kind for kind, label in labels.items()}
    for row in rows:
        pattern = {"first": 32} if row.seed else None  # without a rank, a plan has no pattern
        config = {"lowrank": {"rank_pattern": pattern}}
        perplexity = RUNS[names.get(row.label, "uniform")][row.seed]
        results.add(row, stored | {"bpw": 10.0, "perplexity": perplexity, "config": config})
    (line,) = ranks.summarise(results, dense, rows, [comparison])
    two, every = line["allocated"]["two_factor"], line["allocated"]["all forms"]
    assert two["excess_saved"] == {"mean": 0.375, "min": 0.25, "max": 0.5, "runs": 2} and two["goal_met"] is True
    assert every["excess_saved"] == {"mean": 0.25, "min": 0.25, "max": 0.25, "runs": 2} and every["goal_met"] is False
    assert line["decomposed"]["mean"] == 3 and two["decomposed"] == {"mean": 0.5, "min": 0, "max": 1, "runs": 2}

    text = ranks.tables("model", [line])
    assert text.startswith("### model: uniform ranks where they make a layer smaller") and "forced on every" not in text
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.split("\n\n")[1].splitlines()]
    assert cells[2] == [
        "0.5", "float", "uniform", "3 (3 … 3) of 4", "10.000", "13.000", "+30.00% (+20.00% … +40.00%)", "", "",
    ]  # fmt: skip
    assert cells[3] == [
        "0.5", "float", "allocated, two_factor", "0.5 (0 … 1) of 4", "10.000", "12.000", "+20.00% (+10.00% … +30.00%)",
        "37.5% (25.0% … 50.0%)", "yes",
    ]  # fmt: skip
    assert cells[4][-2:] == ["25.0% (25.0% … 25.0%)", "no"]


def test_nothing_is_saved_where_a_uniform_plan_has_no_excess(ranks: Any) -> None:
    rows = {seed: {"perplexity": 11.0} for seed in (0, 1)}
    assert ranks.excess_saved(rows, {0: {"perplexity": 12.0}, 1: {"perplexity": 10.0}}, 10.0) is None
    assert ranks.excess_saved(rows, {0: {"perplexity": 12.0}}, 10.0)["runs"] == 1
