# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli lord plan`: what would become of every layer, from shapes alone or, for a budget, from statistics."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lord_quant.commands.budget_options import add_budget_flags, frontier_of, planner_from, run_of
from lord_quant.commands.options import add_plan_flags, add_run_flags
from lord_quant.commands.sweep_options import add_sweep_flags, run_sweep
from lord_quant.distributed import refuse_torchrun


HELP = "Show what would become of every layer: form, rank, bits, bytes. Reads weights only to measure."
EXAMPLES = """examples:
  optimum-cli lord plan --model bigcode/starcoder --rank-ratio 0.75 --targets mlp --bits 4
  optimum-cli lord plan --model ./my-model --param-ratio 0.8 --bits 16
  optimum-cli lord plan --model ./my-model --statistics my-model.stats --target-bpw 3.0 --save plan.yaml
  optimum-cli lord plan --model ./my-model --statistics my-model.stats --target-size 4GB
  optimum-cli lord plan --model ./my-model --statistics my-model.stats --target-bpw 3.0 --plots pictures
  optimum-cli lord plan --model ./my-model --statistics my-model.stats --sweep 2.5 3.0 3.5 --heldout ./other-code
  optimum-cli lord plan --config run.yaml --json > plan.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_plan_flags(parser)
    add_budget_flags(parser)
    add_sweep_flags(parser)
    add_run_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--save", metavar="FILE", help="write the plan of a budget as YAML, for `lord quantize --plan`")
    parser.add_argument(
        "--plots", metavar="DIR", help="draw a budget's plan and what it was chosen from, or a sweep: PNG, numbers as JSON"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what stands at --save and --plots")


def run(args: argparse.Namespace) -> int:
    """Prints the plan, and for a budget what other budgets would give."""
    from lord_quant.errors import ConfigError

    refuse_torchrun("planning")
    if args.sweep:
        return run_sweep(args)
    if args.heldout:
        raise ConfigError("--heldout is given without --sweep; wanted the budgets to measure")
    config = run_of(args)
    for flag in ("save", "plots"):
        if config.budget is None and getattr(args, flag):
            raise ConfigError(f"--{flag} is given without a budget; wanted --target-bpw, --target-size or --max-loss")
    from lord_quant.silence import import_hosts

    import_hosts()
    from lord_quant.budgets.budget import PLANNED
    from lord_quant.budgets.plan_file import apply_plan, is_plan, write_plan
    from lord_quant.checkpoint import check_file
    from lord_quant.drawing.plot_data import collect
    from lord_quant.drawing.plots import check_plots, write_plots
    from lord_quant.report import plan_dict, plan_table, to_json
    from lord_quant.runs.pipeline import make_plan

    about, below = {}, ""
    plan_kind: dict[str, Any] = {"kind": "plan", "is_kind": is_plan}
    file = check_file(args.save, overwrite=args.overwrite, **plan_kind) if args.save is not None else None
    folder = check_plots(args.plots, overwrite=args.overwrite) if args.plots else None
    if file and folder and (file == folder or folder in file.parents or file in folder.parents):
        raise ConfigError(f"--save {args.save} and --plots {args.plots} lie in each other; wanted places apart")
    if config.budget is not None:
        planner = planner_from(args, config, [config.budget])
        allocation = planner.choose(config.budget)
        settings = planner.settings(allocation)
        config, about = apply_plan(config, settings), {PLANNED: settings[PLANNED]}
        _, plan = make_plan(config)  # before anything is written
        if not args.json:
            below = f"\n{planner.tell(allocation)}; for other budgets:\n\n{frontier_of(planner)}\n"
        if folder:
            write_plots(collect(planner, allocation, settings[PLANNED]), folder, overwrite=args.overwrite)
            below += f"\nplots written to {args.plots}\n"
        if file:
            write_plan(settings, file)
            below += f"\nwritten to {args.save}\n"
    else:
        _, plan = make_plan(config)
    sys.stdout.write(to_json(plan_dict(plan) | about) if args.json else plan_table(plan) + "\n" + below)
    return 0
