# SPDX-License-Identifier: Apache-2.0
"""From finished rows to the lines of a table: means over seeds, their spread, and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate


Found = dict[str, Any]
"""A finished row."""


def mean(values: Sequence[float]) -> float:
    """Returns the mean."""
    return sum(values) / len(values)


def stats(values: Sequence[float]) -> dict[str, Any] | None:
    """Returns mean, smallest and largest value and how many there are, or None of nothing."""
    return {"mean": mean(values), "min": min(values), "max": max(values), "runs": len(values)} if values else None


def spread(values: dict[str, Any] | None, form: str = "+.2%") -> str:
    """Renders `stats`: the mean, and the smallest and largest value where there are several."""
    if values is None:
        return "-"
    several = f" ({values['min']:{form}} … {values['max']:{form}})" if values["runs"] > 1 else ""
    return f"{values['mean']:{form}}{several}"


def ratios(runs: dict[int, Found], base: dict[int, Found]) -> list[float]:
    """Returns the perplexity of every run over that of the base run with the same seed, minus one."""
    return [row["perplexity"] / base[seed]["perplexity"] - 1 for seed, row in runs.items() if seed in base]


def decomposed(row: Found) -> int:
    """Counts the layers that a planned row decomposed: a plan names each of them."""
    return len(row["config"]["lowrank"]["rank_pattern"] or {})


def summary_line(
    label: str,
    runs: dict[int, Found],
    dense: dict[int, Found],
    floats: dict[int, Found] | None = None,
    unrounded: dict[int, Found] | None = None,
) -> dict[str, Any]:
    """Sums up the runs of one label.

    Args:
        label: Their name.
        runs: Finished rows by seed, at least one.
        dense: The dense row, which has no seed: alone under any key, or empty if it is not there.
        floats: Rows of float LoRD by seed for the stacking penalty, or None for rows that are no stack.
        unrounded: Rows of the same stack in float by seed, or None.
    """
    every = list(runs.values())
    compressed = every[0]["flags"] is not None
    reference = next(iter(dense.values()), None)
    line = {
        "label": label,
        "seeds": list(runs) if compressed else [],
        "bpw": mean([row["bpw"] for row in every]),
        "tensor_bytes": round(mean([row["tensor_bytes"] for row in every])),
        "perplexity": mean([row["perplexity"] for row in every]),
        "over_dense": stats(ratios(runs, dict.fromkeys(runs, reference)) if compressed and reference else []),
        "stacking_penalty": stats(ratios(runs, floats or {})),
        "rounding": stats(ratios(runs, unrounded or {})),
        "seconds": mean([row["seconds"] for row in every]) if compressed else None,
    }
    return line | ({"pass@1": stats([row["pass@1"] for row in every])} if "pass@1" in every[0] else {})


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "bpw": ("bpw", "{:.3f}".format),
    "MB": ("tensor_bytes", lambda size: f"{size / 1e6:.2f}"),
    "perplexity": ("perplexity", "{:.3f}".format),
    "over dense": ("over_dense", spread),
    "stacking penalty": ("stacking_penalty", spread),
    "rounding alone": ("rounding", spread),
    "worse by": ("worse_by", lambda points: spread(points, "+.2f")),
    "HumanEval pass@1": ("pass@1", lambda passed: spread(passed, ".3f")),
    "s to compress": ("seconds", "{:.0f}".format),
}
"""What a column shows: a value of the line, and how it is rendered."""


def markdown(lines: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Renders lines as a Markdown table; a column without any value is left out."""
    kept = [name for name in columns if any(line.get(COLUMNS[name][0]) is not None for line in lines)]
    cells = [[line["label"], *(_cell(line.get(COLUMNS[name][0]), COLUMNS[name][1]) for name in kept)] for line in lines]
    return grid(["", *kept], cells)


def grid(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Renders cells as a Markdown table: first column to the left, all others to the right."""
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True, colalign=align)


def _cell(value: Any, render: Callable[[Any], str]) -> str:
    return "-" if value is None else render(value)
