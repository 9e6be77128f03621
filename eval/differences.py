# SPDX-License-Identifier: Apache-2.0
"""What budgets lose beside other budgets of the same bits and seeds: how much an idea brings to plans, from finished rows.

Compared are schemes of two results files of `pareto.py`, or two schemes of one: of what the first loses over the dense
model, how much more (or less, negative) the second loses. Rows are found by bits per weight and seed; nothing is run.

    python eval/differences.py --output eval/results/differences.json \\
        --pair "ranks, Llama" pareto-llama.json:planned-dense pareto-llama.json:planned

The table lies beside the JSON as Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tables import grid, mean, spread, stats
from variants import write_json


NOTE = (
    "What the second loses beside the first, in perplexity over the dense model: of every budget the mean over seeds, in "
    "the last column the mean over budgets, with the smallest and largest single plan. Negative: the second loses less."
)


def main() -> None:
    """Compares, prints the table, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair", nargs=3, action="append", required=True, metavar=("NAME", "FIRST.json:KIND", "SECOND.json:KIND"),
        help="what to compare; KIND is planned or planned-dense",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    found = [{"name": name} | compare(excesses(first), excesses(second)) for name, first, second in args.pair]
    budgets = sorted({budget for each in found for budget in each["budgets"]}, key=float)
    lines = [
        [each["name"], *(change(each["budgets"].get(budget)) for budget in budgets), spread(each["all"], "+.0%")]
        for each in found
    ]
    text = f"{grid(['second beside first', *budgets, 'mean (single plans)'], lines)}\n\n{NOTE}\n"
    write_json(args.output, {"pairs": args.pair, "found": found})
    args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def excesses(source: str) -> dict[tuple[str, int], float]:
    """Returns perplexity minus the dense model's of a scheme's rows, by budget and seed.

    Raises:
        SystemExit: There are none.
    """
    path, _, kind = source.rpartition(":")
    rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    dense = next(row["perplexity"] for row in rows if row["flags"] is None)
    planned = [row for row in rows if row["label"].startswith(f"{kind}:")]
    if not planned:
        raise SystemExit(f"{path} holds no rows of {kind}; wanted planned or planned-dense")
    return {(row["label"].partition(":")[2], row["seed"]): row["perplexity"] - dense for row in planned}


def compare(first: dict[tuple[str, int], float], second: dict[tuple[str, int], float]) -> dict[str, Any]:
    """Returns how much more the second loses: per budget, their mean, and the smallest and largest of single plans."""
    both = [key for key in first if key in second]
    budgets = {}
    for budget in dict.fromkeys(budget for budget, _ in both):
        keys = [key for key in both if key[0] == budget]
        budgets[budget] = mean([second[key] for key in keys]) / mean([first[key] for key in keys]) - 1
    singles = stats([second[key] / first[key] - 1 for key in both])
    return {"budgets": budgets, "all": (singles or {}) | {"mean": mean(list(budgets.values()))}}


def change(value: float | None) -> str:
    """Renders how much more is lost."""
    return "n/a" if value is None else f"{value:+.0%}"


if __name__ == "__main__":
    main()
