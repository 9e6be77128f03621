# SPDX-License-Identifier: Apache-2.0
"""``optimum-cli lord eval``: evaluates a model, optionally beside its baseline."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lord_quant.distributed import launched


if TYPE_CHECKING:
    from lord_quant.evaluation.harness import EvalResult

PARTS_SUFFIX = ".incomplete"
HELP = "Evaluate a model with lm-eval tasks, token perplexity and speed, optionally beside a baseline."
EXAMPLES = """\
examples:
  # HumanEval (runs the code the model writes, in a sandbox) and perplexity, beside the model before compression
  optimum-cli lord eval --model compressed/ --baseline original/ --tasks lord_humaneval --perplexity \\
      --confirm-run-unsafe-code --batch-size 16

  # any task of lm-eval, on the first 100 documents, into a file
  optimum-cli lord eval --model compressed/ --tasks arc_easy,lord_code_ppl --limit 100 --output scores.json

  # perplexity of your own text, windows overlapping by half
  optimum-cli lord eval --model compressed/ --perplexity my_sources/ --window 1024 --stride 512

  # the same tasks with lm-eval's own command line
  lm_eval run --model hf --model_args pretrained=compressed/ --tasks lord_humaneval --confirm_run_unsafe_code \\
      --include_path "$(optimum-cli lord eval --print-include-path)"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="folder or hub name of the model")
    parser.add_argument("--tasks", metavar="A,B", default="", help="lm-eval tasks, groups or tags, and lord_* tasks")
    parser.add_argument("--baseline", metavar="DIR", help="model to compare with, evaluated in the same way")
    parser.add_argument("--batch-size", metavar="N", default="1", help="sequences at a time, or auto (default: 1)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: CUDA if there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the checkpoint's own)")
    parser.add_argument("--limit", type=float, metavar="N", help="documents of each task, or a fraction; for trying out")
    parser.add_argument(
        "--gen-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="replace generation settings: max_gen_toks=256"
    )
    parser.add_argument("--seed", type=int, help="of all random generators (default: lm-eval's own, 0 and 1234)")
    parser.add_argument(
        "--perplexity",
        nargs="?",
        const="python-stdlib",
        metavar="DATASET",
        help="also token perplexity, on a file, a folder, a hub data set, or held-out files of the Python standard library",
    )
    parser.add_argument(
        "--window", type=int, metavar="TOKENS", help="perplexity window (default: 1024, or a shorter context of the model)"
    )
    parser.add_argument("--stride", type=int, metavar="TOKENS", help="perplexity stride (default: the window)")
    parser.add_argument("--max-windows", type=int, default=64, metavar="N", help="perplexity windows (default: 64)")
    parser.add_argument("--speed", action="store_true", help="also measure prefill and decode speed, and memory")
    parser.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="consent to tasks that run code the model generates"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="write the result to this file, and until then what is known to FILE.json.incomplete",
    )
    parser.add_argument("--overwrite", action="store_true", help="let --output replace a file")
    parser.add_argument(
        "--print-include-path", action="store_true", help="print the folder of the lord_* tasks for lm_eval, and stop"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; errors of the user's making are `LordError`s for the caller to print.

    Raises:
        LordError: As `lord_quant.evaluation.harness.evaluate`.
        OutputError: The output file exists already, or cannot be written.
        EvaluationError: No model given.
    """
    if args.print_include_path:
        from lord_quant.evaluation.preflight import tasks_path

        print(tasks_path())
        return 0
    from lord_quant.errors import EvaluationError

    if not args.model:
        raise EvaluationError("--model is missing; wanted the folder or hub name of a model")
    if args.output is not None:
        from lord_quant.checkpoint import check_file

        kind: dict[str, Any] = {"kind": "result of an evaluation", "is_kind": _is_result}
        check_file(args.output, overwrite=args.overwrite, **kind)
        check_file(_incomplete(args.output), overwrite=True, **kind)  # an evaluation that was cut off leaves one
    from lord_quant.evaluation.harness import evaluate
    from lord_quant.evaluation.preflight import read_settings

    parts = _Parts(args.output)
    with parts:
        result = evaluate(
            args.model,
            [name.strip() for name in args.tasks.split(",") if name.strip()],
            baseline=args.baseline,
            batch_size=args.batch_size,
            device=args.device,
            dtype=args.dtype,
            limit=args.limit,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
            perplexity_dataset=args.perplexity,
            window=args.window,
            stride=args.stride,
            max_windows=args.max_windows,
            speed=args.speed,
            seed=args.seed,
            gen_kwargs=read_settings(args.gen_kwargs),
            on_part=parts.keep,
        )
        if not launched().first:  # lm-eval shares the documents of tasks out, the first process knows the results
            return 0
        if args.output is not None:
            _write(args.output, result)
    print(format_table(result))
    return 0


class _Parts:
    """Keeps what is measured already beside the output, and prints it if the rest fails or is interrupted.

    Args:
        output: Where the whole result will be; None for nowhere.
    """

    def __init__(self, output: Path | None) -> None:
        self.path = None if output is None else _incomplete(output)
        self.last: EvalResult | None = None
        self.kept = False

    def __enter__(self) -> _Parts:
        return self

    def keep(self, result: EvalResult) -> None:
        """Replaces what was kept before by `result`, which holds it; an evaluation does not end because that cannot be."""
        from lord_quant.errors import OutputError

        if launched().first:
            self.last = result
            if self.path is not None:
                try:
                    _write(self.path, result)
                    self.kept = True
                except OutputError as error:
                    sys.stderr.write(f"warning: what is measured until now is not kept: {error}\n")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.last is None:
            return
        if kind is None:
            if self.path is not None and self.kept:
                self.path.unlink(missing_ok=True)
            return
        place = f", and in {self.path}" if self.kept else ""
        print(f"{format_table(self.last)}\n\nnot all that was asked for: above is what was measured until then{place}")


def _incomplete(output: Path) -> Path:
    """Returns where results wait until all are there."""
    return output.expanduser().with_name(f"{output.name}{PARTS_SUFFIX}")


def _is_result(path: Path) -> bool:
    """Tells whether a file looks like what an evaluation writes."""
    from lord_quant.files.reading import parse_json

    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"metrics", "settings"} <= found.keys()


def format_table(result: EvalResult) -> str:
    """One row for each metric; with a baseline also its value, and the model's over it."""
    from tabulate import tabulate

    base = result.baseline
    rows: list[list[object]] = []
    for task, metrics in result.metrics.items():
        for metric, value in metrics.items():
            up = result.higher_is_better.get(task, {}).get(metric)
            arrow = "" if up is None else "↑" if up else "↓"
            rows.append([task, metric, arrow, value, base.metrics.get(task, {}).get(metric) if base else None])
    if result.perplexity is not None:
        other = base.perplexity.perplexity if base and base.perplexity else None
        rows.append([result.perplexity.source, "token perplexity", "↓", result.perplexity.perplexity, other])
    if result.speed is not None:
        mine, theirs = result.speed.model, result.speed.baseline
        for name, arrow, key in (
            ("prefill tokens/s", "↑", "prefill_tokens_per_second"),
            ("decode tokens/s", "↑", "decode_tokens_per_second"),
            ("weights MiB", "↓", "weight_bytes"),
            ("peak above weights MiB", "↓", "working_bytes"),
        ):
            scale = 2**20 if key.endswith("_bytes") else 1
            own, other = (getattr(speed, key) if speed else None for speed in (mine, theirs))
            if own is not None:
                rows.append(["speed", name, arrow, own / scale, None if other is None else other / scale])
    if result.peak_memory_bytes is not None:
        other = base.peak_memory_bytes / 2**20 if base and base.peak_memory_bytes else None
        rows.append(["memory", "peak of a process of its own, MiB", "↓", result.peak_memory_bytes / 2**20, other])
    headers = ["task", "metric", "", "value"]
    if base is None:
        return tabulate([row[:4] for row in rows], headers, floatfmt=".4f")
    table = [[*row, _ratio(row[3], row[4])] for row in rows]
    return tabulate(table, [*headers, "baseline", "ratio"], floatfmt=".4f", missingval="-")


def _ratio(value: object, base: object) -> float | None:
    return value / base if isinstance(value, int | float) and isinstance(base, int | float) and base else None


def _write(path: Path, result: EvalResult) -> None:
    """Writes beside the target first: a reader sees the whole file or none of it."""
    from lord_quant.checkpoint import atomic_file

    with atomic_file(path) as staging:
        staging.write_text(
            json.dumps(_finite(result.to_dict()), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )


def _finite(values: Any) -> Any:
    """Returns plain values with null for numbers that JSON does not have, such as an infinite perplexity."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
