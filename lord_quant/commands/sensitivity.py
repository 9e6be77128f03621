# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli lord sensitivity`: measures once what every layer would lose, so that any budget can be planned."""

from __future__ import annotations

import argparse
import sys
import time

from lord_quant.commands.options import add_log_flag, add_run_flags, add_source_flags, config_from
from lord_quant.distributed import refuse_torchrun


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
    """Measures and writes.

    Raises:
        LordError: Anything wrong, before any weight is read.
    """
    refuse_torchrun("the sensitivity pass")
    output = args.output
    del args.output  # a file, not the folder of a run
    args.rank_ratio = 1.0
    config = config_from(args)
    from lord_quant.silence import import_hosts

    import_hosts()
    from lord_quant.budget import dense_job, sense, sensing_seconds, told_apart
    from lord_quant.checkpoint import check_file
    from lord_quant.claim import forget_sensed, sensing_beside
    from lord_quant.progress import Progress
    from lord_quant.report import human_bytes, human_seconds
    from lord_quant.statistics import save_statistics

    places = {"model": config.model, "dataset": config.calibration.dataset}
    path = check_file(output, overwrite=args.overwrite, **places)
    places["output"], start = output, time.perf_counter()
    job = dense_job(config)
    expected = human_seconds(sensing_seconds(job))
    sys.stdout.write(f"estimate      about {expected} on {job.device} (within a factor of three)\n")
    sys.stdout.flush()
    with Progress(args.log, about=places, apart=places) as progress:
        statistics = sense(config, progress, job, sensing_beside(path, told_apart(config, job)))
        save_statistics(statistics, path)
    forget_sensed(path)
    took = human_seconds(time.perf_counter() - start)
    size = human_bytes(path.stat().st_size)
    sys.stdout.write(f"{len(statistics.losses)} layers measured in {took}; {size} written to {output}\n")
    return 0
