# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli lord sensitivity`: measures once what every layer would lose, so that any budget can be planned."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time

from lord_quant.commands.options import add_log_flag, add_run_flags, add_source_flags, config_from
from lord_quant.distributed import World, joined


HELP = "Measure what every layer would lose, once; `lord plan` and `lord quantize` plan any budget from the file."
EXAMPLES = """examples:
  optimum-cli lord sensitivity --model ./my-model --dataset ./my-code --output my-model.stats
  optimum-cli lord plan --model ./my-model --statistics my-model.stats --target-bpw 3.0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_source_flags(parser)
    add_run_flags(parser)
    add_log_flag(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that stands there")


def run(args: argparse.Namespace) -> int:
    """Measures, in all processes that torchrun started if it did, and writes.

    Raises:
        LordError: Anything wrong, before any weight is read.
    """
    from lord_quant.errors import ElsewhereError

    try:
        with joined() as world, world.together():
            _measure(args, world)
        return 0
    except ElsewhereError:  # told by the process that failed; torchrun tells of one that is gone
        return 2


def _measure(args: argparse.Namespace, world: World) -> None:
    output = args.output
    del args.output  # a file, not the folder of a run
    args.rank_ratio = 1.0
    config = config_from(args)
    from lord_quant.silence import import_hosts

    import_hosts()
    from lord_quant.checkpoint import check_file
    from lord_quant.files.claim import claimed, forget_sensed, sensing_beside
    from lord_quant.losses.sensing import dense_job, sense, sensing_seconds, told_apart
    from lord_quant.losses.statistics import is_statistics, save_statistics
    from lord_quant.progress import Progress
    from lord_quant.report import human_bytes, human_seconds
    from lord_quant.runs.execution import refuse_unshared

    refuse_unshared(config, world)
    say = sys.stdout.write if world.first else str
    places = {"model": config.model, "dataset": config.calibration.dataset}
    path = check_file(output, overwrite=args.overwrite, kind="file of statistics", is_kind=is_statistics, **places)
    places["output"], start = output, time.perf_counter()
    job = dense_job(config)
    if world.size > 1:
        say(f"processes     {world.size}, each with its share of the windows; the estimate is for one that has them all\n")
    say(f"estimate      about {human_seconds(sensing_seconds(job))} on {job.device} (within a factor of three)\n")
    sys.stdout.flush()
    told = Progress(args.log if world.first else None, about=places, apart=places, quiet=not world.first)
    with told as progress, claimed(path) if world.first else contextlib.nullcontext():
        statistics = sense(config, progress, job, sensing_beside(path, told_apart(config, job)), world)
        if world.first:
            save_statistics(statistics, path)
            forget_sensed(path)
    took = human_seconds(time.perf_counter() - start)
    if world.first:
        size = human_bytes(path.stat().st_size)
        say(f"{len(statistics.losses)} layers measured in {took}; {size} written to {output}\n")
