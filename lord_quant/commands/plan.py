# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli lord plan`: what would become of every layer, from shapes alone."""

from __future__ import annotations

import argparse
import sys

from lord_quant.commands.options import add_plan_flags, config_from


HELP = "Show what would become of every layer: rank, bytes, bits per weight. Reads no weights."
EXAMPLES = """examples:
  optimum-cli lord plan --model bigcode/starcoder --rank-ratio 0.75 --targets mlp --bits 4
  optimum-cli lord plan --model ./my-model --param-ratio 0.8 --bits 16
  optimum-cli lord plan --config run.yaml --json > plan.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_plan_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the plan."""
    config = config_from(args)
    from lord_quant.silence import import_hosts

    import_hosts()
    from lord_quant.pipeline import make_plan
    from lord_quant.report import plan_dict, plan_table, to_json

    _, plan = make_plan(config)
    sys.stdout.write(to_json(plan_dict(plan)) if args.json else plan_table(plan) + "\n")
    return 0
