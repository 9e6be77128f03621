# SPDX-License-Identifier: Apache-2.0
"""Ranks chosen for a budget against one rank ratio everywhere, at the same bytes: how much excess perplexity is saved.

The goal: allocated ranks have at least 30 % less excess perplexity than uniform ones of the same bytes, in float and at 4
bits. Excess is perplexity minus that of the dense model; saved is 1 - (allocated - dense) / (uniform - dense), seed by
seed. A uniform plan's bytes are known from shapes alone; the planner gets them as its budget, at the same bits. Where
weights are packed it has the same group size too, but for factors whose rank is no multiple of it; once more it may choose
group sizes as well. What it spends is at most that.

Uniform ranks come in two ways. Forced, every layer is decomposed, also where that makes it larger (at rank ratio 0.75 a
square layer grows by half), which is easy to beat by leaving layers dense. Not forced, such layers stay dense.

    python eval/ranks.py --model DIR --calibration code.jsonl --heldout other.jsonl --output ranks.json

The tables lie beside the JSON as Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from provenance import model_name
from reference import DENSE
from rows import Results, Row, Settings, add_arguments, run_rows
from tables import Found, decomposed, grid, spread, stats, summary_line


RANK_RATIOS = (0.75, 0.5)
BITS = (16, 4)
FLOAT_BITS = 16
GOAL = 0.3
"""Share of the excess that allocation is to save."""
KINDS = {"two_factor": ("--form", "two_factor"), "all forms": (), "all forms, groups": ()}
"""What the planner may choose from, dense layers always among it; two_factor is the form of the uniform plans."""
FREE_GROUPS = "all forms, groups"
"""Where weights are packed, the planner may also choose group sizes."""
NOTE = (
    "Every line compares with the uniform plan of the same rank ratio and bits, whose bits per weight are the budget; bpw "
    "counts every stored bit of the linear layers, from the files. decomposed: how many linear layers are; the others stay "
    "dense. Excess saved: 1 - (allocated - dense) / (uniform - dense), the mean over seeds, with the smallest and largest "
    f"value; the goal is {GOAL:.0%}. Where the budget reaches the dense layers' own bytes, nothing needs to be decomposed "
    "and all excess but that of rounding is saved, which says more about the uniform plan than about the planner."
)


class Uniform(NamedTuple):
    """One rank ratio for every layer.

    Attributes:
        rank_ratio: The ratio.
        bits: Bits of weights.
        group_size: Inputs per scale; of float weights only the step of ranks.
        forced: Whether layers are decomposed also where that makes them larger.
    """

    rank_ratio: float
    bits: int
    group_size: int
    forced: bool

    @property
    def label(self) -> str:
        """Its name in the tables."""
        return f"uniform {self.rank_ratio:g}{', forced' if self.forced else ''}, {self.bits}-bit"

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of `quantize` that make it."""
        flags = ("--stack", "joint", "--rank-ratio", f"{self.rank_ratio:g}", "--bits", str(self.bits))
        return (*flags, "--group-size", str(self.group_size), *(("--force-rank",) if self.forced else ()))


class Size(NamedTuple):
    """What a uniform plan takes, from shapes alone.

    Attributes:
        num_bytes: Bytes of the linear layers that count towards bits per weight.
        dense_weights: Weights of the dense linear layers.
        decomposed: How many layers are decomposed.
        layers: How many linear layers there are.
    """

    num_bytes: int
    dense_weights: int
    decomposed: int
    layers: int

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.num_bytes / self.dense_weights

    @property
    def budget(self) -> float:
        """Bits per weight with half a byte on top: a plan of the very same bytes fits whatever rounding does."""
        return 8 * (self.num_bytes + 0.5) / self.dense_weights


class Comparison(NamedTuple):
    """A uniform plan and what the planner makes of its bytes.

    Attributes:
        uniform: The plan.
        size: What it takes.
        allocated: Labels of the rows with its budget, by kind.
    """

    uniform: Uniform
    size: Size
    allocated: dict[str, str]


def main() -> None:
    """Runs all rows, prints the tables, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the dense model")
    add_arguments(parser, seeds=(0, 1, 2))
    parser.add_argument("--rank-ratios", type=float, nargs="+", default=list(RANK_RATIOS), metavar="RATIO")
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS), metavar="BITS", help="16 is float")
    parser.add_argument("--group-size", type=int, default=64, help="where weights are packed (default: 64)")
    parser.add_argument(
        "--force-rank", action=argparse.BooleanOptionalAction, default=True,
        help="also compare with uniform ranks of all layers, those that get no smaller by it too (default: yes)",
    )  # fmt: skip
    args = parser.parse_args()
    comparisons = []
    for uniform in uniform_plans(args.rank_ratios, args.bits, args.group_size, forced=args.force_rank):
        size = size_of(args.model, uniform)
        if size is not None:
            labels = {kind: allocated_label(kind, uniform.bits, size) for kind in kinds_of(uniform.bits)}
            comparisons.append(Comparison(uniform, size, labels))
    dense = Row(args.model, DENSE, None, 0)
    rows = [dense, *(row for each in comparisons for seed in args.seeds for row in rows_of(args.model, each, seed))]
    results = run_rows(rows, Settings.from_args(args), args.output, args.workers)
    summary = summarise(results, dense, rows, comparisons)
    results.finish(rows, {"dense": results.by_seed([dense], DENSE)[0]["perplexity"], "comparisons": summary},
                   tables(model_name(args.model), summary))  # fmt: skip


def uniform_plans(rank_ratios: Sequence[float], bits: Sequence[int], group_size: int, *, forced: bool) -> list[Uniform]:
    """Returns the plans to be beaten: without force, and with it if that is wanted too."""
    ways = (True, False) if forced else (False,)
    return [Uniform(ratio, width, group_size, way) for width in bits for ratio in rank_ratios for way in ways]


def size_of(model: str, uniform: Uniform) -> Size | None:
    """Plans a run from shapes alone; None where no layer would be decomposed, so that there is nothing to beat.

    Raises:
        SystemExit: Ratio, bits or group size is illegal for the model.
    """
    from lord_quant.silence import import_hosts

    import_hosts()
    from lord_quant.config import GptqConfig, LordConfig, LowrankConfig
    from lord_quant.errors import LordError, RankError
    from lord_quant.runs.pipeline import make_plan

    try:
        lowrank = LowrankConfig(rank_ratio=uniform.rank_ratio, force_rank=uniform.forced)
        gptq = GptqConfig(bits=uniform.bits, group_size=uniform.group_size)
        _, plan = make_plan(LordConfig(model, lowrank=lowrank, gptq=gptq))
    except RankError as error:
        print(f"no row {uniform.label!r}: {error}")
        return None
    except LordError as error:
        raise SystemExit(str(error)) from None
    num_bytes, weights = (sum(getattr(layer, what) for layer in plan.layers) for what in ("counted_bytes", "dense_weights"))
    return Size(num_bytes, weights, len(plan.rank_pattern), len(plan.layers))


def kinds_of(bits: int) -> list[str]:
    """Returns what the planner may choose from at so many bits; in float, groups are always its own."""
    return [kind for kind in KINDS if kind != FREE_GROUPS or bits != FLOAT_BITS]


def allocated_label(kind: str, bits: int, size: Size) -> str:
    """Names what a budget chooses; uniform plans of the same bytes share it, and its rows."""
    return f"allocated, {kind}, {bits}-bit, {size.bpw:.4f} bpw"


def allocated_flags(kind: str, uniform: Uniform, size: Size) -> tuple[str, ...]:
    """Returns the flags of `quantize` that make a plan of at most the same bytes; in float, groups are the planner's."""
    free = uniform.bits == FLOAT_BITS or kind == FREE_GROUPS
    group = () if free else ("--group-size", str(uniform.group_size))
    return ("--stack", "joint", "--bits", str(uniform.bits), *group, "--target-bpw", repr(size.budget), *KINDS[kind])


def rows_of(model: str, comparison: Comparison, seed: int) -> list[Row]:
    """Returns the rows of a comparison."""
    uniform, size, allocated = comparison
    rows = [Row(model, allocated[kind], allocated_flags(kind, uniform, size), seed) for kind in allocated]
    return [Row(model, uniform.label, uniform.flags, seed), *rows]


def summarise(results: Results, dense: Row, rows: Sequence[Row], comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Returns the lines of the summary: one per uniform plan, with what was allocated within its bytes."""
    base = results.by_seed([dense], DENSE)
    reference = base[0]["perplexity"]
    lines = []
    for uniform, size, allocated in comparisons:
        runs = results.by_seed(rows, uniform.label)
        line = summary_line(uniform.label, runs, base) | {"decomposed": stats([size.decomposed] * len(runs))}
        line |= {"rank_ratio": uniform.rank_ratio, "bits": uniform.bits, "forced": uniform.forced, "layers": size.layers}
        line["allocated"] = {}
        for kind, label in allocated.items():
            mine = results.by_seed(rows, label)
            saved = excess_saved(mine, runs, reference)
            line["allocated"][kind] = summary_line(label, mine, base) | {
                "decomposed": stats([decomposed(row) for row in mine.values()]),
                "excess_saved": saved,
                "goal_met": None if saved is None else saved["mean"] >= GOAL,
            }
        lines.append(line)
    return lines


def excess_saved(allocated: dict[int, Found], uniform: dict[int, Found], dense: float) -> dict[str, Any] | None:
    """Returns, over seeds, which share of uniform ranks' excess is gone; None if one of them has no excess."""
    pairs = [(row["perplexity"], uniform[seed]["perplexity"]) for seed, row in allocated.items() if seed in uniform]
    if any(theirs <= dense for _, theirs in pairs):
        return None
    return stats([1 - (mine - dense) / (theirs - dense) for mine, theirs in pairs])


def tables(model: str, lines: Sequence[dict[str, Any]]) -> str:
    """Renders the comparisons: forced uniform ranks in one table, the others in another."""
    titles = {False: "uniform ranks where they make a layer smaller", True: "uniform ranks forced on every layer"}
    parts = []
    for forced, title in titles.items():
        chosen = [line for line in lines if line["forced"] is forced]
        if chosen:
            parts.append(f"### {model}: {title}\n\n{comparison_table(chosen)}")
    return "\n\n".join([*parts, NOTE])


def comparison_table(lines: Sequence[dict[str, Any]]) -> str:
    """Renders uniform plans, each with what was allocated within its bytes below it."""
    cells = []
    for line in lines:
        start = [f"{line['rank_ratio']:g}", "float" if line["bits"] == FLOAT_BITS else str(line["bits"])]
        cells.append([*start, "uniform", *_figures(line, line["layers"]), "", ""])
        for kind, each in line["allocated"].items():
            met = {None: "n/a", True: "yes", False: "no"}[each["goal_met"]]
            saved = "n/a" if each["excess_saved"] is None else spread(each["excess_saved"], ".1%")
            cells.append([*start, f"allocated, {kind}", *_figures(each, line["layers"]), saved, met])
    headers = ["rank ratio", "bits", "ranks", "decomposed", "bpw", "perplexity", "over dense", "excess saved", "goal"]
    return grid(headers, cells)


def _figures(line: dict[str, Any], layers: int) -> list[str]:
    count = f"{spread(line['decomposed'], '.3g')} of {layers}"
    return [count, f"{line['bpw']:.3f}", f"{line['perplexity']:.3f}", spread(line["over_dense"])]


if __name__ == "__main__":
    main()
