# SPDX-License-Identifier: Apache-2.0
"""What each idea of the joint stack brings: the full stack, one idea off at a time, all of them off, and the naive stack.

All rows of one bit width have the same ranks, the same bits and the same bytes (symmetric grids store their zeros too).
The *stacking penalty* of a row is its perplexity over that of float LoRD with the same seed, minus one;
what an idea brings is the penalty without it minus the penalty of the full stack, paired by seed, in percentage points.

    python eval/ablation.py --model DIR --calibration code.jsonl --heldout other.jsonl --output ablation.json
"""

from __future__ import annotations

import argparse
from typing import Any

from reference import DENSE, FLOAT, OPTIMUM_DEFAULTS
from rows import Results, Row, Settings, add_arguments, run_rows
from tables import markdown, stats, summary_line


FULL = "joint"
IDEAS: dict[str, tuple[str, ...]] = {
    "no fisher": ("--no-fisher",),
    "no anchor": ("--no-anchor",),
    "no residual": ("--no-residual",),
    "no rotation": ("--no-rotate",),
    "no refit": ("--no-refit",),
    "no deflation": ("--no-deflate",),
    "no refinement": ("--refine", "0"),
    "one-sided": ("--no-two-sided",),
    "order down first": ("--order", "down_first"),
}
SOLVER: dict[str, tuple[str, ...]] = {"no scale search": ("--mse", "0"), "symmetric": ("--sym",)}
STACKED: dict[str, tuple[str, ...]] = {
    FULL: ("--stack", "joint"),
    **{label: ("--stack", "joint", *flags) for label, flags in (IDEAS | SOLVER).items()},
    "all ideas off": ("--stack", "joint", *(flag for flags in IDEAS.values() for flag in flags)),
    "naive": ("--stack", "naive"),
    "naive, Optimum's defaults": OPTIMUM_DEFAULTS,
}
COLUMNS = ("bpw", "perplexity", "over dense", "stacking penalty", "worse by", "HumanEval pass@1", "s to compress")
NOTE = (
    "Stacking penalty: perplexity over that of LoRD float with the same seed. Worse by: penalty of the row minus that of "
    "the full joint stack, paired by seed, in percentage points: what the idea brings. Means over seeds, with the smallest "
    "and largest value. All ideas off: those of the joint stack; scale search and asymmetric grids stay on."
)


def main() -> None:
    """Runs all rows, prints a table per bit width, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the dense model")
    add_arguments(parser, seeds=(0, 1, 2))
    parser.add_argument("--rank-ratio", type=float, default=0.75, help="forced on all layers (default: 0.75)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--rows", nargs="+", choices=STACKED, metavar="LABEL", help=f"default: all; {'; '.join(STACKED)}")
    args = parser.parse_args()
    shape = ("--rank-ratio", str(args.rank_ratio), "--group-size", str(args.group_size), "--force-rank")
    base = [Row(args.model, DENSE, None, 0)]
    base += [Row(args.model, FLOAT, ("--stack", "naive", "--bits", "16", *shape), seed) for seed in args.seeds]
    table = {bits: stacked_rows(args.model, bits, args.seeds, shape) for bits in args.bits}
    chosen = [row for rows in table.values() for row in rows if args.rows is None or row.label in args.rows]
    results = run_rows([*base, *chosen], Settings.from_args(args), args.output, args.workers)
    dense, floats = results.by_seed(base, DENSE), results.by_seed(base, FLOAT)
    summary = {"unquantized": [summary_line(DENSE, dense, dense), summary_line(FLOAT, floats, dense)]}
    summary |= {f"{bits}-bit": summarise(results, base, rows) for bits, rows in table.items()}
    shown = [f"### {title}\n\n{markdown(lines, COLUMNS)}" for title, lines in summary.items()]
    results.finish([*base, *(row for rows in table.values() for row in rows)], summary, "\n\n".join([*shown, NOTE]))


def stacked_rows(model: str, bits: int, seeds: list[int], shape: tuple[str, ...]) -> list[Row]:
    """Returns the rows of one bit width; the bits are in their flags."""
    return [
        Row(model, label, (*flags, "--bits", str(bits), *shape), seed) for label, flags in STACKED.items() for seed in seeds
    ]


def summarise(results: Results, base: list[Row], rows: list[Row]) -> list[dict[str, Any]]:
    """Returns one line per finished label of one bit width."""
    dense, floats, full = results.by_seed(base, DENSE), results.by_seed(base, FLOAT), results.by_seed(rows, FULL)
    lines = []
    for label in STACKED:
        runs = results.by_seed(rows, label)
        if not runs:
            continue
        paired = [seed for seed in runs if seed in full and label != FULL]
        worse = [(runs[seed]["perplexity"] - full[seed]["perplexity"]) / floats[seed]["perplexity"] for seed in paired]
        lines.append(summary_line(label, runs, dense, floats) | {"worse_by": stats([100 * value for value in worse])})
    return lines


if __name__ == "__main__":
    main()
