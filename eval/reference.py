# SPDX-License-Identifier: Apache-2.0
"""What decomposition and quantization cost in perplexity: each alone, stacked naively, and stacked jointly.

Every row is a checkpoint written by the real command line and loaded again in another process; bytes and bits per weight
are summed over the tensors in its files. The *stacking penalty* of a row is its perplexity over that of float LoRD with
the same seed, minus one: for the naive stack, what quantizing the factors added. The joint stack truncates otherwise;
*rounding alone* is over its own float row, with the same seed. Calibration and held-out text must be disjoint; that is the
caller's responsibility. Started again with the same --output, a run that was cut off goes on.

    python eval/reference.py --models DIR … --calibration code.jsonl --heldout other.jsonl --output reference.json
"""

from __future__ import annotations

import argparse
from typing import Any

from provenance import model_name
from rows import Results, Row, Settings, add_arguments, run_rows
from tables import markdown, summary_line
from variants import OPTIMUM_DEFAULTS


DENSE, FLOAT, JOINT_FLOAT = "dense", "LoRD float", "joint float"
LABELS = (
    DENSE, "GPTQ 4-bit", "GPTQ 3-bit", FLOAT, "naive 4-bit",
    JOINT_FLOAT, "joint 8-bit", "joint 4-bit", "joint 3-bit", "joint pivoted 4-bit",
)  # fmt: skip
COLUMNS = (
    "bpw",
    "MB",
    "perplexity",
    "over dense",
    "stacking penalty",
    "rounding alone",
    "HumanEval pass@1",
    "s to compress",
)
NOTE = (
    "Means over seeds, with the smallest and largest value. GPTQ rows: Optimum's quantizer on the dense model at its best "
    "settings. naive: float LoRD, then Optimum's quantizer at its defaults. Stacking penalty: perplexity over that of "
    "LoRD float with the same seed (the naive stack's, for least output error); below zero where the joint stack's "
    "own truncation gains more than rounding loses. Rounding alone: perplexity over that of joint float with the same seed."
)


def main() -> None:
    """Runs all rows of all models and seeds, prints a table per model, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", "--model", nargs="+", required=True, metavar="DIR", help="folders of dense models")
    add_arguments(parser, seeds=(0, 1, 2))
    parser.add_argument("--rank-ratio", type=float, default=0.75, help="forced on all layers (default: 0.75)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", nargs="+", choices=LABELS, default=list(LABELS), metavar="LABEL", help="; ".join(LABELS))
    args = parser.parse_args()
    every = [row for model in args.models for row in model_rows(model, args.seeds, args.rank_ratio, args.group_size)]
    results = run_rows(
        [row for row in every if row.label in args.rows], Settings.from_args(args), args.output, args.workers
    )
    # Rows that an earlier run left in the file are shown too: ratios need the dense and the float row.
    summary = {model_name(model): summarise(results, [row for row in every if row.model == model]) for model in args.models}
    tables = [f"### {name}\n\n{markdown(lines, COLUMNS)}" for name, lines in summary.items()]
    results.finish(every, summary, "\n\n".join([*tables, NOTE]))


def model_rows(model: str, seeds: list[int], rank_ratio: float, group_size: int) -> list[Row]:
    """Returns the rows of one model."""
    group = ("--group-size", str(group_size), "--force-rank")
    rank = ("--rank-ratio", str(rank_ratio), *group)
    flags: dict[str, tuple[str, ...]] = {
        "GPTQ 4-bit": ("--stack", "naive", "--rank-ratio", "1", "--bits", "4", *group),
        "GPTQ 3-bit": ("--stack", "naive", "--rank-ratio", "1", "--bits", "3", *group),
        FLOAT: ("--stack", "naive", "--bits", "16", *rank),
        "naive 4-bit": (*OPTIMUM_DEFAULTS, "--bits", "4", *rank),
        JOINT_FLOAT: ("--stack", "joint", "--bits", "16", *rank),
        "joint 8-bit": ("--stack", "joint", "--bits", "8", *rank),
        "joint 4-bit": ("--stack", "joint", "--bits", "4", *rank),
        "joint 3-bit": ("--stack", "joint", "--bits", "3", *rank),
        "joint pivoted 4-bit": ("--stack", "joint", "--form", "pivoted", "--bits", "4", *rank),
    }
    rows = [Row(model, DENSE, None, 0)]
    return rows + [Row(model, label, flags[label], seed) for label in LABELS if label in flags for seed in seeds]


def summarise(results: Results, rows: list[Row]) -> list[dict[str, Any]]:
    """Returns one line per label of one model, over the seeds that are finished."""
    runs = {label: results.by_seed(rows, label) for label in LABELS}
    stacked = {label for label in LABELS if label.startswith(("naive", "joint"))}
    packed = {label for label in LABELS if label.startswith("joint ") and label != JOINT_FLOAT}
    return [
        summary_line(
            label,
            runs[label],
            runs[DENSE],
            runs[FLOAT] if label in stacked else {},
            runs[JOINT_FLOAT] if label in packed else {},
        )
        for label in LABELS
        if runs[label]
    ]


if __name__ == "__main__":
    main()
