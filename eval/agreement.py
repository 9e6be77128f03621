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
    "column_pivoted": "column-pivoted, rounded",
}
PREDICTORS = {
    "predicted": "Fisher",
    "crossed": "cross-fitted",
    "sloped": "with slope",
    "output_error": "output error",
}
BASES = ("predicted", "crossed", "sloped")
"""Predictions in nats, what measurements are divided by."""
YARDSTICKS = {"heldout": "loss", "heldout_divergence": "divergence"}
"""What rank correlations are with."""
MEASURED = {
    "calibration": "calibration",
    "heldout": "held out",
    "calibration_divergence": "divergence on calibration",
    "heldout_divergence": "divergence",
}
RATIOS = (
    ("predicted", "calibration_divergence"),
    ("predicted", "heldout_divergence"),
    ("crossed", "heldout_divergence"),
    ("crossed", "heldout"),
    ("sloped", "heldout"),
    ("sloped", "calibration"),
)
"""What is divided by what: the slope is of the loss, the others foretell divergence."""
CLEAR = 2.0
"""Standard errors from which on the measured order of two candidates is taken for certain."""
NOTE = (
    "Spearman's rank correlation of predictions with what was measured on held-out text; n compressions of single layers. "
    "Loss: the rise of its cross entropy. Divergence: from the dense model's predictions, which is what the Fisher metric "
    "approximates; it has no term of first order, and far less noise. Cross-fitted: truncations are chosen on one half of "
    "the calibration windows, their loss is predicted from the other, both ways. With slope: and the slope of the text's "
    "own loss is counted, in truncation and in rounding, which is what plans count on; divergence does not see it. Output "
    "error: predicted without a backward pass. Last column: how well the measured divergence itself ranks the loss."
)
RATIO_NOTE = (
    "Medians. Calibration and held out: the rise of the loss of such text; divergence: from the dense model's predictions, "
    "on held-out text if nothing else is said. Each over a prediction, which is made from calibration text: in the Fisher "
    "metric, cross-fitted, and with the slope of the loss."
)
PAIR_NOTE = (
    "Share of pairs ordered right: candidates of one layer whose bytes differ by 3 % at most, and that differ in form, "
    "rank, bits or group size. Clear pairs: those whose measured "
    "losses differ by more than 2 standard errors. By divergence: all pairs, by the measured divergence."
)
TOGETHER_NOTE = (
    "Measured over predicted loss of layers compressed at once, every prediction being the sum over single layers: medians "
    "over blocks and types, and the whole model."
)
FLOOR = 1e-5
"""Smallest rise of the loss in the plot; smaller ones, or negative ones, stand at the edge."""


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
        **{
            name: {
                "all": ordered(rows, pairs, name, "heldout"),
                "clear": ordered(rows, clear, name, "heldout"),
                "divergence": ordered(rows, pairs, name, "heldout_divergence"),
            }
            for name in PREDICTORS
        },
    }
    return {"kinds": by_kind, "types": by_type, "equal_bytes": equal}


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Returns Spearman's rank correlation, ties at their mean rank; None of fewer than three, or of constants."""
    if len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return correlation(_ranks(one), _ranks(other))


def ordered(
    rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], predictor: str, yardstick: str
) -> float | None:
    """Returns the share of pairs whose predicted order is the measured one, or None of no pair."""
    signs = []
    for pair in pairs:
        first, second = (rows[place] for place in pair["rows"])
        signs.append((first[predictor] < second[predictor]) == (first[yardstick] < second[yardstick]))
    return sum(signs) / len(signs) if signs else None


def tables(content: dict[str, Any]) -> str:
    """Renders the results as Markdown."""
    summary = content["summary"]
    names = {"all": "all", **KINDS}
    kinds = {names[name]: line for name, line in summary["kinds"].items()}
    equal = summary["equal_bytes"]
    pair_cells = [
        [label, *(_number(equal[name][which], ".0%") for which in ("all", "clear", "divergence"))]
        for name, label in PREDICTORS.items()
    ]
    pair_headers = ["", f"{equal['pairs']} pairs", f"{equal['clear']} clear pairs", "by divergence"]
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
            ratios = [f"{median(line[name] / line[base] for line in own):.2f}" for base, name in RATIOS]
            cells.append([f"{what}, {label}", str(len(own)), *ratios])
    return grid(["", "runs", *_over()], cells)


def _line(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    correlations = {
        yardstick: {
            name: spearman([row[name] for row in rows], [row[yardstick] for row in rows])
            for name in (*PREDICTORS, "heldout_divergence")
        }
        for yardstick in YARDSTICKS
    }
    return {
        "compressions": len(rows),
        "correlations": correlations,
        **{f"over_{base}": {name: median(row[name] / row[base] for row in rows) for name in MEASURED} for base in BASES},
    }


def _ranks(values: Sequence[float]) -> list[float]:
    ascending = sorted(values)
    return [(bisect_left(ascending, value) + bisect_right(ascending, value) - 1) / 2 for value in values]


def _grid(corner: str, lines: dict[str, dict[str, Any]]) -> str:
    shown = ("predicted", "crossed", "sloped", "output_error")
    columns = [(yardstick, name) for yardstick in YARDSTICKS for name in shown] + [("heldout", "heldout_divergence")]
    headers = [corner, "n", *(f"{what}: {PREDICTORS[name]}" for what in YARDSTICKS.values() for name in shown)]
    cells = [
        [
            name,
            str(line["compressions"]),
            *(_number(line["correlations"][yardstick][predictor], ".3f") for yardstick, predictor in columns),
        ]
        for name, line in lines.items()
    ]
    return grid([*headers, "loss: divergence"], cells)


def _ratios(corner: str, lines: dict[str, dict[str, Any]]) -> str:
    cells = [[name, *(f"{line[f'over_{base}'][key]:.2f}" for base, key in RATIOS)] for name, line in lines.items()]
    return grid([corner, *_over()], cells)


def _over() -> list[str]:
    return [f"{MEASURED[name]} / {PREDICTORS[base]}" for base, name in RATIOS]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _whiskers(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Returns standard errors of the loss, downwards and upwards; none leaves the plot below."""
    below = [min(row["heldout_error"], max(row["heldout"], FLOOR) - FLOOR) for row in rows]
    return [below, [row["heldout_error"] for row in rows]]


def draw(rows: Sequence[dict[str, Any]], summary: dict[str, Any], title: str, path: Path) -> None:
    """Draws what was measured over what was predicted: the loss above, the divergence below, a column per prediction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = {
        "predicted": "predicted, nats per token (Fisher metric)",
        "crossed": "predicted, nats per token (cross-fitted)",
        "sloped": "predicted, nats per token (with slope)",
        "output_error": "squared output error",
    }
    labels = {"heldout": "rise of the held-out loss", "heldout_divergence": "divergence on held-out text"}
    figure, grids = plt.subplots(2, 4, figsize=(18, 9), sharex="col", sharey="row", layout="constrained")
    for line, (yardstick, label) in zip(grids, labels.items(), strict=True):
        ends = [FLOOR, max(row[yardstick] for row in rows)]
        for axes, name in zip(line, columns, strict=True):
            for index, kind in enumerate(KINDS):
                own = [row for row in rows if row["kind"] == kind]
                is_loss = yardstick == "heldout"
                axes.errorbar(
                    [row[name] for row in own], [max(row[yardstick], FLOOR) if is_loss else row[yardstick] for row in own],
                    yerr=_whiskers(own) if is_loss else None, linestyle="none", marker="osD^v"[index],
                    markersize=4.5, color=f"C{index}", elinewidth=0.6, alpha=0.8, label=KINDS[kind],
                )  # fmt: skip
            found = _number(summary["kinds"]["all"]["correlations"][yardstick][name], ".3f")
            axes.set(xscale="log", yscale="log", title=f"rank correlation {found}")
            axes.grid(alpha=0.3)
            if name != "output_error":
                axes.plot(ends, ends, color="0.5", linewidth=1, linestyle=":", zorder=0)
        line[0].set_ylabel(f"{label}, nats per token")
    for axes, label in zip(grids[1], columns.values(), strict=True):
        axes.set_xlabel(label)
    grids[0][0].set_ylim(bottom=0.8 * FLOOR)
    grids[0][0].legend(frameon=False, loc="upper left")
    figure.suptitle(f"{title}: {len(rows)} compressions of single layers")
    figure.savefig(path, dpi=130)
    plt.close(figure)
