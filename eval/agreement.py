# SPDX-License-Identifier: Apache-2.0
"""How well predictions agree with measurements: rank correlations, ratios, pairs ordered right; tables and a plot."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from statistics import correlation, median
from typing import Any

from tables import grid


KINDS = {
    "truncation": "truncated, float",
    "dense": "rounded dense",
    "two_factor": "two factors, rounded",
    "pivoted": "pivoted, rounded",
}
PREDICTORS = {
    "predicted": "Fisher metric",
    "crossed": "cross-fitted",
    "cautious": "as plans count it",
    "output_error": "output error",
}
MEASURED = {"calibration": "calibration", "heldout": "held out", "heldout_divergence": "divergence"}
CLEAR = 2.0
"""Standard errors from which on the measured order of two candidates is taken for certain."""
NOTE = (
    "Spearman's rank correlation with the measured rise of the held-out loss. Cross-fitted: truncations are chosen on one "
    "half of the calibration windows, their loss in the Fisher metric is predicted from the other, both ways. Divergence: "
    "correlation of that with the measured divergence from the dense model's predictions, which it approximates."
)
RATIO_NOTE = (
    "Medians. Calibration and held out: the rise of the loss of such text; divergence: from the dense model's predictions, "
    "on held-out text. Over the prediction in the Fisher metric, and over the cross-fitted one."
)
PAIR_NOTE = (
    "Pairs of candidates of one layer whose bytes differ by 3 % at most and that differ in form, bits or both; clear pairs "
    f"are those whose measured losses differ by more than {CLEAR:g} standard errors."
)
TOGETHER_NOTE = (
    "Measured over predicted loss of layers compressed at once, every prediction being the sum over single layers: medians "
    "over blocks and types, and the whole model."
)
FLOOR = 1e-5
"""Smallest loss in the plot; smaller ones, or negative ones, stand at the edge."""


def summarise(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the figures of all tables.

    Args:
        rows: One per compression, with predictions and measurements.
        pairs: Candidates of equal bytes, by their places among the rows.
    """
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    by_kind = {"all": _line(rows)} | {kind: _line([row for row in rows if row["kind"] == kind]) for kind in kinds}
    types = dict.fromkeys(row["type"] for row in rows)
    by_type = {name: _line([row for row in rows if row["type"] == name]) for name in types}
    clear = [pair for pair in pairs if pair["errors_apart"] > CLEAR]
    equal = {
        "pairs": len(pairs),
        "clear": len(clear),
        **{name: {"all": ordered(rows, pairs, name), "clear": ordered(rows, clear, name)} for name in PREDICTORS},
    }
    return {"kinds": by_kind, "types": by_type, "equal_bytes": equal}


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Returns Spearman's rank correlation, ties at their mean rank; None of fewer than three, or of constants."""
    if len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return correlation(_ranks(one), _ranks(other))


def ordered(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], predictor: str) -> float | None:
    """Returns the share of pairs whose predicted order is the measured one, or None of no pair."""
    signs = []
    for pair in pairs:
        first, second = (rows[place] for place in pair["rows"])
        signs.append((first[predictor] < second[predictor]) == (first["heldout"] < second["heldout"]))
    return sum(signs) / len(signs) if signs else None


def tables(content: dict[str, Any]) -> str:
    """Renders the results as Markdown."""
    summary = content["summary"]
    names = {"all": "all", **KINDS}
    kinds = {names[name]: line for name, line in summary["kinds"].items()}
    equal = summary["equal_bytes"]
    pair_cells = [
        [label, *(_number(equal[name][which], ".0%") for which in ("all", "clear"))] for name, label in PREDICTORS.items()
    ]
    pair_headers = ["ordered right by", f"of {equal['pairs']} pairs", f"of {equal['clear']} clear pairs"]
    return "\n\n".join(
        [
            f"### Rank correlation\n\n{_grid('', kinds)}\n\n{NOTE}",
            f"### Equal bytes\n\n{grid(pair_headers, pair_cells)}\n\n{PAIR_NOTE}",
            f"### Measured over predicted\n\n{_ratios('', kinds | summary['types'])}\n\n{RATIO_NOTE}",
            f"### Layers together\n\n{together_table(content['together'])}\n\n{TOGETHER_NOTE}",
        ]
    )


def together_table(lines: Sequence[dict[str, Any]]) -> str:
    """Renders what many layers lose at once."""
    cells = []
    for what in dict.fromkeys(line["what"] for line in lines):
        for by in dict.fromkeys(line["by"] for line in lines):
            own = [line for line in lines if line["what"] == what and line["by"] == by]
            label = "whole model" if by == "model" else f"all layers of a {by}"
            ratios = [
                f"{median(line[name] / line[base] for line in own):.2f}"
                for base in ("predicted", "crossed")
                for name in MEASURED
            ]
            cells.append([f"{what}, {label}", str(len(own)), *ratios])
    how = [f"{what}, {how}" for how in ("Fisher", "cross-fitted") for what in MEASURED.values()]
    return grid(["", "runs", *how], cells)


def _line(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    measured = [row["heldout"] for row in rows]
    crossed = [row["crossed"] for row in rows]
    return {
        "compressions": len(rows),
        **{name: spearman([row[name] for row in rows], measured) for name in PREDICTORS},
        "divergence": spearman(crossed, [row["heldout_divergence"] for row in rows]),
        "over_predicted": {name: median(row[name] / row["predicted"] for row in rows) for name in MEASURED},
        "over_crossed": {name: median(row[name] / row["crossed"] for row in rows) for name in MEASURED},
    }


def _ranks(values: Sequence[float]) -> list[float]:
    ascending = sorted(values)
    return [(bisect_left(ascending, value) + bisect_right(ascending, value) - 1) / 2 for value in values]


def _grid(corner: str, lines: dict[str, dict[str, Any]]) -> str:
    headers = [corner, "compressions", *PREDICTORS.values(), "divergence"]
    cells = [
        [name, str(line["compressions"]), *(_number(line[key], ".3f") for key in (*PREDICTORS, "divergence"))]
        for name, line in lines.items()
    ]
    return grid(headers, cells)


def _ratios(corner: str, lines: dict[str, dict[str, Any]]) -> str:
    headers = [corner, *(f"{what}, {how}" for how in ("Fisher", "cross-fitted") for what in MEASURED.values())]
    cells = [
        [name, *(f"{line[base][key]:.2f}" for base in ("over_predicted", "over_crossed") for key in MEASURED)]
        for name, line in lines.items()
    ]
    return grid(headers, cells)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _whiskers(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Returns standard errors, downwards and upwards; none leaves the plot below."""
    below = [min(row["heldout_error"], max(row["heldout"], FLOOR) - FLOOR) for row in rows]
    return [below, [row["heldout_error"] for row in rows]]


def draw(rows: Sequence[dict[str, Any]], summary: dict[str, Any], title: str, path: Path) -> None:
    """Draws measured over predicted loss, once for each metric."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "predicted": "predicted, nats per token (Fisher metric)",
        "crossed": "predicted, nats per token (cross-fitted)",
        "output_error": "squared output error",
    }
    figure, every = plt.subplots(1, 3, figsize=(14, 5), sharey=True, layout="constrained")
    for axes, (name, label) in zip(every, panels.items(), strict=True):
        for index, kind in enumerate(KINDS):
            own = [row for row in rows if row["kind"] == kind]
            heights = [max(row["heldout"], FLOOR) for row in own]
            axes.errorbar(
                [row[name] for row in own], heights, yerr=_whiskers(own), linestyle="none", marker="osD^"[index],
                markersize=4.5, color=f"C{index}", elinewidth=0.6, alpha=0.8, label=KINDS[kind],
            )  # fmt: skip
        found = _number(summary["kinds"]["all"][name], ".3f")
        axes.set(xscale="log", yscale="log", xlabel=label, title=f"rank correlation {found}")
        axes.set_ylim(bottom=0.8 * FLOOR)
        axes.grid(alpha=0.3)
    ends = [FLOOR, max(row["heldout"] for row in rows)]
    for axes in every[:2]:
        axes.plot(ends, ends, color="0.5", linewidth=1, linestyle=":", zorder=0)
    every[0].set_ylabel("measured rise of the held-out loss, nats per token")
    every[0].legend(frameon=False, loc="upper left")
    figure.suptitle(f"{title}: {len(rows)} compressions of single layers")
    figure.savefig(path, dpi=130)
    plt.close(figure)
