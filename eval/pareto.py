# SPDX-License-Identifier: Apache-2.0
"""Perplexity against true bits per weight: the joint stack's schemes beside plain GPTQ of the dense model.

A scheme is FORM:RANK:BITS:GROUP, such as pivoted:0.5:3:64, or planned:BPW, what a budget of so many bits per weight
chooses (planned-dense:BPW: among bits and group sizes of dense layers only); a plain point is BITS:GROUP. Ranks snap *up*
to multiples of lcm(32, group size), so two ratios may give one checkpoint: what counts is the bits per weight that the
files show. Plain GPTQ is Optimum's quantizer at its best settings, drawn as a line: its non-dominated points, joined.
Beyond its largest point the line goes on flat, below its smallest there is none.

    python eval/pareto.py --model DIR --calibration code.jsonl --heldout other.jsonl --output pareto.json

The table lies beside the JSON as Markdown, the plot as PNG.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from provenance import model_name
from reference import DENSE
from rows import Results, Row, Settings, add_arguments, run_rows
from tables import Found, decomposed, grid, spread, stats, summary_line


BUDGETS = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.25)
PLANNED = {"planned": (), "planned-dense": ("--form", "dense")}
"""Schemes that are a budget: any form, or bits and group sizes of dense layers alone."""
SCHEMES = tuple(f"{kind}:{budget}" for kind in PLANNED for budget in BUDGETS)
PLAIN = ("2:128", "2:64", "2:32", "3:128", "3:32", "4:128")
DENSE_LAYERS = "dense layers"
OFF_SCALE = 1.6
"""The plot ends at so many times the dense model's perplexity."""
NOTE = (
    "Rank 1 decomposes nothing: the joint stack's quantization of dense layers. bpw counts every stored bit of the linear "
    "layers. Plain line: the non-dominated points of plain GPTQ, joined, read at "
    "the same bpw; n/a where plain GPTQ has nothing so small. Difference: perplexity over the line's, minus one; negative "
    "is better than plain GPTQ at equal bytes. Excess saved: the share of the line's excess over the dense model that is "
    "gone, 1 - (ours - dense) / (line - dense)."
)
BUDGET_NOTE = (
    "Perplexities of what the planner chooses for so many bits per weight at most (planned-dense: among bits and group "
    "sizes of dense layers only). Decomposed: how many linear layers a plan decomposes. Over the line and excess saved are "
    "against the line of the same calibration seed, read at the whole budget, although a plan may need less. No worse: for "
    "how many seeds the plan's perplexity is at most that of the best plain point of at most the same bits and the same "
    "seed."
)


class Point(NamedTuple):
    """One scheme, averaged over seeds."""

    label: str
    bpw: float
    perplexity: float


def main() -> None:
    """Runs all rows, prints the tables, writes JSON, Markdown and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the dense model")
    add_arguments(parser, seeds=(0, 1, 2))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--plain", nargs="+", default=list(PLAIN), metavar="BITS:GROUP")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), metavar="BPW")
    parser.add_argument(
        "--force-rank", action=argparse.BooleanOptionalAction, default=True,
        help="decompose also layers that get no smaller by it (default: yes)",
    )  # fmt: skip
    parser.add_argument("--summary", action="store_true", help="make no rows, sum up those that --output holds")
    args = parser.parse_args()
    dense = Row(args.model, DENSE, None, 0)
    force = ("--force-rank",) if args.force_rank else ()
    flags = {text: scheme_flags(text) + (() if text.split(":")[0] in PLANNED else force) for text in args.schemes}
    ours = [Row(args.model, text, flags[text], seed) for text in args.schemes for seed in args.seeds]
    plain = [Row(args.model, f"GPTQ {text}", plain_flags(text), seed) for text in args.plain for seed in args.seeds]
    results = run_rows([dense, *plain, *ours], Settings.from_args(args), args.output, args.workers, make=not args.summary)
    ours, plain = ([row for row in rows if results.find(row) is not None] for rows in (ours, plain))
    summary, tables = summarise(results, dense, ours, plain, args.budgets)
    picture = args.output.with_suffix(".png")
    draw(summary, f"{model_name(args.model)}, {len(args.seeds)} seed{'s' * (len(args.seeds) > 1)}", picture)
    results.finish([dense, *plain, *ours], summary, tables)
    print(f"plot in {picture}")


def scheme_flags(text: str) -> tuple[str, ...]:
    """Turns FORM:RANK:BITS:GROUP, planned:BPW or planned-dense:BPW into flags.

    Raises:
        SystemExit: It is no such thing.
    """
    parts = text.split(":")
    if len(parts) == 2 and parts[0] in PLANNED:
        return ("--stack", "joint", "--target-bpw", parts[1], *PLANNED[parts[0]])
    if len(parts) != 4:
        raise SystemExit(f"scheme {text!r}; wanted FORM:RANK:BITS:GROUP, such as two_factor:0.5:4:64, or planned:BPW")
    form, rank, bits, group = parts
    return ("--stack", "joint", "--form", form, "--rank-ratio", rank, "--bits", bits, "--group-size", group)


def plain_flags(text: str) -> tuple[str, ...]:
    """Turns BITS:GROUP into flags.

    Raises:
        SystemExit: It is no such thing.
    """
    parts = text.split(":")
    if len(parts) != 2:
        raise SystemExit(f"plain point {text!r}; wanted BITS:GROUP, such as 3:64")
    return ("--stack", "naive", "--rank-ratio", "1", "--bits", parts[0], "--group-size", parts[1])


def frontier(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other beats in both ways, by rising bits per weight; broken models are left out."""
    kept: list[Point] = []
    finite = [point for point in points if math.isfinite(point.perplexity)]
    for point in sorted(finite, key=lambda point: (point.bpw, point.perplexity)):
        if not kept or point.perplexity < kept[-1].perplexity:
            kept.append(point)
    return kept


def read_line(line: Sequence[Point], bpw: float) -> float | None:
    """Returns a frontier's perplexity at so many bits per weight: linear between points, flat beyond the last one."""
    if not line or bpw < line[0].bpw:
        return None
    for left, right in pairwise(line):
        if bpw < right.bpw:
            share = (bpw - left.bpw) / (right.bpw - left.bpw)
            return left.perplexity + share * (right.perplexity - left.perplexity)
    return line[-1].perplexity


def best_within(points: Sequence[Point], budget: float) -> Point | None:
    """Returns the point of lowest perplexity with at most so many bits per weight."""
    return min((point for point in points if point.bpw <= budget), key=lambda point: point.perplexity, default=None)


def summarise(
    results: Results, dense: Row, ours: list[Row], plain: list[Row], budgets: list[float]
) -> tuple[dict[str, Any], str]:
    """Returns the summary for the results file, and the tables."""
    base = results.by_seed([dense], DENSE)
    lines = {
        kind: [
            summary_line(label, results.by_seed(rows, label), base) for label in dict.fromkeys(row.label for row in rows)
        ]
        for kind, rows in (("ours", ours), ("plain", plain))
    }
    points = [Point(x["label"], x["bpw"], x["perplexity"]) for x in lines["plain"]]
    line, reference = frontier(points), base[0]["perplexity"]
    plain_points = points_by_seed(results, plain)
    by_label = {found["label"]: results.by_seed(ours, found["label"]) for found in lines["ours"]}
    for found in lines["ours"]:
        found["plain_line"] = read_line(line, found["bpw"])
        found["over_plain_line"] = excess(found["perplexity"], found["plain_line"])
        perplexities = [row["perplexity"] for row in by_label[found["label"]].values()]
        found["excess_saved"] = excess_saved(perplexities, reference, found["plain_line"])
    for found in lines["plain"]:
        found["on_line"] = found["label"] in {point.label for point in line}
    by_budget = []
    for budget in budgets:
        compared = budget_line(budget, points, line)
        plans = {kind: planned_line(by_label, kind, budget, reference, plain_points) for kind in PLANNED}
        by_budget.append(compared | plans)
    summary = {"dense": reference, **lines, "budgets": by_budget}
    return summary, "\n\n".join(
        [
            f"### Schemes (dense: perplexity {reference:.3f})\n\n{scheme_table(lines['ours'])}\n\n{NOTE}",
            f"### Plain GPTQ\n\n{plain_table(lines['plain'])}",
            f"### Budgets\n\n{budget_table(by_budget)}\n\n{BUDGET_NOTE}",
        ]
    )


def budget_line(budget: float, plain: list[Point], line: list[Point]) -> dict[str, Any]:
    """Returns what plain GPTQ reaches within a budget."""
    best = best_within(plain, budget)
    return {"budget": budget, "plain": best and best._asdict(), "plain_line": read_line(line, budget)}


def points_by_seed(results: Results, rows: list[Row]) -> dict[int, list[Point]]:
    """Returns the points of rows, by their seed."""
    points: dict[int, list[Point]] = {}
    for label in dict.fromkeys(row.label for row in rows):
        for seed, found in results.by_seed(rows, label).items():
            points.setdefault(seed, []).append(Point(label, found["bpw"], found["perplexity"]))
    return points


def planned_line(
    by_label: dict[str, dict[int, Found]], kind: str, budget: float, dense: float, plain: dict[int, list[Point]]
) -> dict[str, Any] | None:
    """Returns, over seeds, how what the planner chose for a budget compares with plain GPTQ of the same seed.

    Args:
        by_label: Our rows, by label and seed.
        kind: Which plans, an element of `PLANNED`.
        budget: Bits per weight.
        dense: Perplexity of the dense model.
        plain: Points of plain GPTQ by seed.

    Returns:
        None without such a row.
    """
    labels = [label for label in by_label if label.split(":")[0] == kind and float(label.split(":")[1]) == budget]
    if not labels:
        return None
    found = by_label[labels[0]]
    over, saved, beaten = [], [], []
    perplexities = {seed: row["perplexity"] for seed, row in found.items()}
    for seed, perplexity in perplexities.items():
        own = plain.get(seed, [])
        line, best = read_line(frontier(own), budget), best_within(own, budget)
        if line is None or best is None:
            continue
        over.append(perplexity / line - 1)
        beaten.append(perplexity <= best.perplexity)
        if line > dense:
            saved.append(1 - (perplexity - dense) / (line - dense))
    return {
        "decomposed": stats([decomposed(row) for row in found.values()]),
        "perplexity": stats(list(perplexities.values())),
        "over_plain_line": stats(over),
        "excess_saved": stats(saved),
        "no_worse": [sum(beaten), len(beaten)],
    }


def excess_saved(perplexities: Iterable[float], dense: float, line: float | None) -> dict[str, Any] | None:
    """Returns, over seeds, which share of the plain line's excess over the dense model is gone; None without an excess."""
    if line is None or line <= dense:
        return None
    return stats([1 - (perplexity - dense) / (line - dense) for perplexity in perplexities])


def excess(value: float | None, base: float | None) -> float | None:
    """Returns how far a value lies over another, as a fraction; None if one is not there."""
    return None if value is None or base is None else value / base - 1


def scheme_table(lines: list[dict[str, Any]]) -> str:
    """Renders our points, by rising bits per weight."""
    scored = "pass@1" in lines[0]
    headers = ["scheme", "bpw", "perplexity", "over dense", "plain line at this bpw", "difference", "excess saved"]
    cells = [
        [
            *_start(line),
            _number(line["plain_line"], ".3f"),
            _number(line["over_plain_line"], "+.2%"),
            _spread(line["excess_saved"], ".1%"),
            *([spread(line["pass@1"], ".3f")] if scored else []),
        ]
        for line in sorted(lines, key=lambda line: line["bpw"])
    ]
    return grid([*headers, "HumanEval pass@1"] if scored else headers, cells)


def plain_table(lines: list[dict[str, Any]]) -> str:
    """Renders the points of plain GPTQ, by rising bits per weight."""
    scored = "pass@1" in lines[0]
    cells = [
        [*_start(line), "yes" if line["on_line"] else "no", *([spread(line["pass@1"], ".3f")] if scored else [])]
        for line in sorted(lines, key=lambda line: line["bpw"])
    ]
    headers = ["BITS:GROUP", "bpw", "perplexity", "over dense", "on the line"]
    return grid([*headers, "HumanEval pass@1"] if scored else headers, cells)


def budget_table(lines: list[dict[str, Any]]) -> str:
    """Renders the comparison within budgets."""
    kinds = [kind for kind in reversed(PLANNED) if any(line[kind] for line in lines)]
    headers = ["bpw at most", "best plain GPTQ", "plain line there"]
    headers += [name for kind in kinds for name in (kind, "decomposed", "over the line", "excess saved", "no worse")]
    cells = [
        [
            f"{line['budget']:.2f}",
            _best(line["plain"]),
            _number(line["plain_line"], ".3f"),
            *(cell for kind in kinds for cell in _planned(line[kind])),
        ]
        for line in lines
    ]
    return grid(headers, cells)


def _start(line: dict[str, Any]) -> list[str]:
    return [line["label"], f"{line['bpw']:.3f}", f"{line['perplexity']:.3f}", spread(line["over_dense"])]


def _best(point: dict[str, Any] | None) -> str:
    return "n/a" if point is None else f"{point['perplexity']:.3f} ({point['label'].removeprefix('GPTQ ')})"


def _planned(line: dict[str, Any] | None) -> list[str]:
    if line is None:
        return ["n/a"] * 5
    beaten, seeds = line["no_worse"]
    return [
        spread(line["perplexity"], ".3f"),
        spread(line["decomposed"], ".3g"),
        _spread(line["over_plain_line"], "+.2%"),
        _spread(line["excess_saved"], ".1%"),
        f"{beaten} of {seeds}",
    ]


def _spread(values: dict[str, Any] | None, form: str) -> str:
    return "n/a" if values is None else spread(values, form)


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def draw(summary: dict[str, Any], title: str, path: Path) -> None:
    """Draws perplexity over bits per weight; what is far above the dense model stands at the upper edge, with its value."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dense, ours, plain = summary["dense"], summary["ours"], summary["plain"]
    highest = max(line["perplexity"] for line in [*ours, *plain])
    top = dense + 1.08 * (min(max(highest, 1.02 * dense), OFF_SCALE * dense) - dense)
    figure, axes = plt.subplots(figsize=(10, 6.4), layout="constrained")
    axes.set(
        xlabel="stored bits per weight of the linear layers, all in", ylabel="perplexity (lower is better)", title=title
    )
    axes.set_ylim(dense - 0.06 * (top - dense), top)
    axes.axhline(dense, color="0.6", linewidth=1, linestyle=":", label=f"dense, 16 bits ({dense:.2f})")
    best = [line for line in ours if _kind(line["label"]) != "planned, dense"] or ours  # that is a baseline
    for lines, colour, style, label in ((plain, "0.25", "-", "plain GPTQ"), (best, "C3", "--", "joint, lower envelope")):
        edge = frontier([Point(line["label"], line["bpw"], line["perplexity"]) for line in lines])
        bpw, perplexity = [point.bpw for point in edge], [point.perplexity for point in edge]
        axes.plot(bpw, perplexity, color=colour, linewidth=1.3, linestyle=style, zorder=2, label=label)
    _scatter(axes, plain, "0.25", "s", None)
    for index, kind in enumerate(dict.fromkeys(_kind(line["label"]) for line in ours)):
        mine = [line for line in ours if _kind(line["label"]) == kind]
        _scatter(axes, mine, f"C{index}", "oDv^"[index % 4], f"joint, {kind}", below=kind == DENSE_LAYERS)
    axes.margins(x=0.1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="points: rank ratio, bits, group size", alignment="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _kind(label: str) -> str:
    """Returns what a scheme makes of layers."""
    form, rank = label.split(":")[:2]
    if form in PLANNED:
        return form.replace("-", ", ")
    return DENSE_LAYERS if float(rank) == 1 else form.replace("_", "-")


def _scatter(
    axes: Any, lines: list[dict[str, Any]], colour: str, marker: str, label: str | None, *, below: bool = False
) -> None:
    """Draws points with their names; those above the plot as triangles at its upper edge, with their values."""
    low, top = axes.get_ylim()
    inside = [line for line in lines if line["perplexity"] <= top]
    bpw, perplexity = [line["bpw"] for line in inside], [line["perplexity"] for line in inside]
    axes.scatter(bpw, perplexity, color=colour, marker=marker, s=42, zorder=3, label=label)
    for line in lines:
        *rank, bits, group = line["label"].removeprefix("GPTQ ").split(":")[-3:]
        name = " ".join([*(part for part in rank if part != "1"), f"{bits}b", f"g{group}"])
        name = "" if bits in PLANNED else name  # their place says all there is
        height = line["perplexity"]
        style: dict[str, Any] = {"xytext": (-5, -12), "horizontalalignment": "right"} if below else {"xytext": (5, 4)}
        if height > top:
            name, height = f"{name}: {height:.0f}", top - 0.015 * (top - low)
            style = {"xytext": (-3, -7), "rotation": -90, "verticalalignment": "top"}
            axes.scatter(line["bpw"], height, color=colour, marker="^", s=42, zorder=3)
        axes.annotate(name, (line["bpw"], height), textcoords="offset points", color=colour, fontsize=7.5, **style)


if __name__ == "__main__":
    main()
