# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli lord quantize`: from a dense model to a checkpoint folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from lord_quant.commands.budget_options import add_budget_flags, menu_from, run_of
from lord_quant.commands.options import add_log_flag, add_plan_flags, add_run_flags
from lord_quant.distributed import World, joined


if TYPE_CHECKING:
    from pathlib import Path

    from lord_quant.calibration import TokenWindows
    from lord_quant.config import LordConfig
    from lord_quant.progress import Progress
    from lord_quant.runs.pipeline import Job

HELP = "Decompose a model, quantize both factors, write a checkpoint that from_pretrained loads."
EXAMPLES = """examples:
  optimum-cli lord quantize --model bigcode/starcoder --output starcoder-lord --rank-ratio 0.8 --targets mlp --bits 4
  optimum-cli lord quantize --model ./my-model --output out --param-ratio 0.8 --bits 8 --dataset ./my-code --dry-run
  optimum-cli lord quantize --model ./my-model --output out --rank-ratio 0.8 --bits 16      # float factors, trainable
  optimum-cli lord quantize --model ./my-model --output out --rank-ratio 1 --bits 4         # GPTQ only
  optimum-cli lord quantize --model ./my-model --output out --target-bpw 3.0 --dataset ./my-code
  optimum-cli lord quantize --model ./my-model --output out --plan plan.yaml --dataset ./my-code
  optimum-cli lord quantize --config run.yaml --overwrite --log run.jsonl
  torchrun --nproc_per_node 8 --no-python -- optimum-cli lord quantize --config run.yaml   # 8 GPUs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_plan_flags(parser)
    add_budget_flags(parser)
    add_run_flags(parser)
    parser.add_argument("--plan", metavar="FILE", help="run a plan that `lord plan --save` wrote, perhaps edited")
    parser.add_argument("--output", default=argparse.SUPPRESS, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that stands at --output")
    add_log_flag(parser)
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false",
        help="do not let a fresh process load what was written, and compare logits, before it is put in place",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything, print plan and estimate, read no weights")


def run(args: argparse.Namespace) -> int:
    """Runs the job, in all processes that torchrun started if it did, and prints plan, estimate and results.

    Raises:
        LordError: Anything wrong, before any weight is read.
    """
    from lord_quant.errors import ElsewhereError

    try:
        with joined() as world:
            with world.together():
                config, progress = _checked(args, world)
            with contextlib.nullcontext() if args.dry_run else progress:
                with world.together():
                    job = _prepare(args, config, progress, world)
                if job is not None:
                    _execute(job, progress, world, args.verify)
            return 0
    except ElsewhereError:  # told by the process that failed; torchrun tells of one that is gone
        return 2


def _checked(args: argparse.Namespace, world: World) -> tuple[LordConfig, Progress]:
    """Returns what is asked for, and where it is told how far that is: by the first process."""
    from lord_quant.errors import ConfigError

    config = run_of(args)
    if config.output is None and not args.dry_run:
        raise ConfigError("output is not given; wanted a folder to write (--output DIR), or --dry-run")
    from lord_quant.runs.execution import refuse_several
    from lord_quant.silence import import_hosts

    refuse_several(config, world)
    import_hosts()
    from lord_quant.progress import Progress

    places = {"model": config.model, "dataset": config.calibration.dataset, "output": config.output}
    return config, Progress(args.log if world.first else None, about=places, apart=places, quiet=not world.first)


def _prepare(args: argparse.Namespace, config: LordConfig, progress: Progress, world: World) -> Job | None:
    """Plans the job and prints what is to be done; returns None if that is nothing."""
    from lord_quant.budgets.budget import PLANNED
    from lord_quant.budgets.plan_file import apply_plan, origin_of_plan, predicted_for
    from lord_quant.checkpoint import REPORT_NAME, whole_path
    from lord_quant.losses.sensing import other_settings
    from lord_quant.report import human_bytes, human_seconds, plan_summary, plan_table
    from lord_quant.runs.execution import clear_away, is_finished
    from lord_quant.runs.pipeline import prepare

    say = sys.stdout.write if world.first else str
    origin = origin_of_plan(args.plan) if args.plan is not None else {}
    measured_on, odd = origin.get("calibration_sha256"), other_settings(origin, config) if origin else ""
    output = None if config.output is None or args.overwrite else whole_path(config.output)
    # The first process writes, and on its disk the report lies.
    there = world.broadcast(output if output is not None and os.path.isfile(output / REPORT_NAME) else None)
    planned, windows = predicted_for(args.plan, config) if origin and not odd else None, None
    if config.budget is not None:
        settings, windows = _choose(args, config, there, progress, world)
        if settings is None:
            return None
        planned = settings.get(PLANNED)
        measured_on, config = (planned or {}).get("calibration_sha256"), apply_plan(config, settings)
    if there is not None:
        earlier = prepare(dataclasses.replace(config, output=None), windows=windows)
        windows = earlier.windows
        if world.broadcast(is_finished(earlier, there, world.size, verified=args.verify)):
            if world.first:
                clear_away(earlier, there, world.size)
            say(f"finished      by an earlier run of the same command: {config.output}\n")
            return None
    job = prepare(config, overwrite=args.overwrite, measured_on=measured_on, windows=windows)
    job = dataclasses.replace(job, planned=planned)
    say((plan_table(job.plan) if args.dry_run else plan_summary(job.plan)) + "\n")
    say(_calibration(job))
    if world.size > 1:
        say(f"processes     {world.size}, each with its share of the windows; the estimate is for one that has them all\n")
    cost = job.estimate
    say(
        f"estimate      about {human_seconds(cost.seconds)} on {job.device} (within a factor of three), "
        f"{human_bytes(cost.memory_bytes)} of memory, {human_bytes(job.plan.tensor_bytes)} on disk\n"
    )
    if world.first:
        changed = [f"the plan's losses were predicted with other settings: {odd}; wanted the same for both"] if odd else []
        sys.stderr.writelines(f"warning: {warning}\n" for warning in [*job.warnings, *changed])
    sys.stdout.flush()
    return None if args.dry_run else job


def _choose(
    args: argparse.Namespace, config: LordConfig, there: Path | None, progress: Progress, world: World
) -> tuple[dict[str, Any] | None, TokenWindows]:
    """Returns the plan for a budget, and what its report says of it; None of a dry run, which may not measure. Also the
    run's calibration tokens.

    If a finished run with the same budget wrote the folder that is there, it is that one's plan: nothing is measured.
    """
    from lord_quant.budgets.budget import PLANNED, Planner, refuse_unreachable
    from lord_quant.budgets.plan_file import asked_of, chosen_before
    from lord_quant.losses.sensing import sensing_seconds, statistics_of, unplanned
    from lord_quant.report import human_seconds
    from lord_quant.runs.pipeline import prepare

    assert config.budget is not None  # the caller asked
    budget, dense, menu, windows = config.budget, unplanned(config), menu_from(args), None
    if there is not None:
        job = prepare(dataclasses.replace(dense, output=None))
        windows = job.windows
        settings = world.broadcast(chosen_before(there, asked_of(job, config, menu, world.size)) if world.first else None)
        if settings is not None:
            return settings, windows
    say = sys.stdout.write if world.first else str
    job = prepare(dense, overwrite=args.overwrite, windows=windows)  # refuses what is wrong before the sensitivity pass
    if not budget.statistics:
        refuse_unreachable(config, menu, [budget])
        expected = human_seconds(sensing_seconds(job))
        say(f"sensitivity   about {expected} on {job.device} (within a factor of three), if none was kept\n")
        sys.stdout.flush()
    if args.dry_run and not budget.statistics:
        say(_calibration(job))
        say("planned       nothing: that takes statistics, and --dry-run reads no weights; all else is in order\n")
        return None, job.windows
    settings, began = {}, time.perf_counter()
    statistics = statistics_of(config, progress, world, keep=True, windows=job.windows)
    if world.first:  # one process chooses, so that all run the same plan
        planner = Planner(config, statistics, menu)
        allocation = planner.choose(budget)
        settings = planner.settings(allocation)
        took = round(time.perf_counter() - began, 3)
        asked = {"asked_sha256": asked_of(job, config, menu, world.size), "budget": budget.asked, "seconds": took}
        settings[PLANNED] = asked | settings[PLANNED]
        say(f"planned       {planner.bpw(allocation):.3f} bits per weight, {planner.tell(allocation)}\n")
    found: dict[str, Any] = world.broadcast(settings)
    return found, job.windows


def _calibration(job: Job) -> str:
    samples, seq_len = job.windows.input_ids.shape
    return f"calibration   {samples} x {seq_len} tokens of {job.windows.source}, sha256 {job.windows.sha256[:12]}\n"


def _execute(job: Job, progress: Progress, world: World, verify: bool) -> None:
    from lord_quant.artifact.verification import Verified
    from lord_quant.report import report_table
    from lord_quant.runs.execution import execute

    report = execute(job, progress, world, verify=verify)
    if world.first:
        verified = f"verified      {Verified.of(report).tell()}\n" if verify else ""
        sys.stdout.write(f"\n{report_table(report)}\n\n{verified}written to {job.output}\n")
