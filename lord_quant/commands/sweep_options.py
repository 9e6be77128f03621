# SPDX-License-Identifier: Apache-2.0
"""The flags of `plan --sweep`, and the run they ask for: a few budgets, compressed and measured."""

from __future__ import annotations

import argparse
import sys

from lord_quant.budget_config import BUDGETS, BudgetConfig
from lord_quant.commands.budget_options import frontier_of, planner_from, run_of


DEFAULT_MAX_WINDOWS = 64


def add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a sweep."""
    sweep = parser.add_argument_group("sweep (instead of one budget; compresses in memory, writes no model)")
    sweep.add_argument(
        "--sweep",
        nargs="+",
        type=float,
        metavar="B",
        help="budgets in bits per weight to run and measure: 2.5 3.0",
    )
    sweep.add_argument(
        "--heldout", metavar="DATA", help="text to measure on, as --dataset takes; python-stdlib: files not calibrated on"
    )
    sweep.add_argument("--window", type=int, metavar="TOKENS", help="held-out window (1024, or a shorter context)")
    sweep.add_argument(
        "--max-windows", type=int, default=DEFAULT_MAX_WINDOWS, metavar="N", help="held-out windows (default: %(default)s)"
    )


def run_sweep(args: argparse.Namespace) -> int:
    """Compresses the model for every budget, measures it, prints a table.

    Raises:
        LordError: Anything wrong, before any weight is read unless statistics are missing.
    """
    from lord_quant.errors import ConfigError, EvaluationError

    given = [f"--{name.replace('_', '-')}" for name in (*BUDGETS, "save") if getattr(args, name, None) is not None]
    if given:
        raise ConfigError(f"--sweep and {', '.join(given)} are given; wanted one or the other")
    if not args.heldout:
        raise EvaluationError(
            "--sweep measures on text that was not calibrated on, and none is given; wanted --heldout with a file, a "
            "folder, a hub name or python-stdlib"
        )
    folder = None
    if args.plots:
        from lord_quant.drawing.plots import check_plots

        folder = check_plots(args.plots, overwrite=args.overwrite)
    budgets = list(dict.fromkeys(args.sweep))
    args.target_bpw = budgets[0]
    config = run_of(args)
    from lord_quant.silence import import_hosts

    import_hosts()
    from lord_quant.corpus import load_corpus
    from lord_quant.drawing.plot_data import collect_sweep
    from lord_quant.drawing.plots import write_plots
    from lord_quant.evaluation.sweep import sweep, sweep_table
    from lord_quant.report import to_json

    heldout = load_corpus(args.heldout, split="heldout", text_key=config.calibration.text_key)
    planner = planner_from(args, config, [BudgetConfig(target_bpw=budget) for budget in budgets])
    if not args.json:
        sys.stdout.write(f"{frontier_of(planner)}\n\n")
        sys.stdout.flush()
    found = sweep(planner, config, budgets, heldout, window=args.window, max_windows=args.max_windows)
    sys.stdout.write(to_json(found.to_dict()) if args.json else f"{sweep_table(found)}\n")
    sys.stdout.flush()
    if folder is not None:
        measured = [(point.bpw, point.measured_loss) for point in found.points]
        write_plots(collect_sweep(planner, measured, found.to_dict()), folder, overwrite=args.overwrite)
        if not args.json:
            sys.stdout.write(f"\nplots written to {args.plots}\n")
    return 0
