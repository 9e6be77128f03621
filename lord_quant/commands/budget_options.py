# SPDX-License-Identifier: Apache-2.0
"""The flags by which a budget chooses form, rank, bits and group size, and what comes of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lord_quant.commands.options import RANK_CHOICES, config_from, settings_from, without_choices


if TYPE_CHECKING:
    from lord_quant.budget import Budget, Planner
    from lord_quant.config import LordConfig
    from lord_quant.planner import Menu

BUDGETS = ("target_bpw", "target_size", "max_loss")
BESIDE = (*RANK_CHOICES, "plan", "force_rank")
"""What makes no sense beside a budget."""


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that give a budget."""
    unset: Any = argparse.SUPPRESS
    budget = parser.add_argument_group(
        "budget (instead of ranks; --bits, --group-size, --targets, --ignore, --form, also --form dense, restrict it)"
    )
    budget.add_argument(
        "--target-bpw", default=unset, type=float, metavar="B", help="bits per weight of the linear layers, all in: 3.0"
    )
    budget.add_argument(
        "--target-size", default=unset, metavar="SIZE", help="tensors of the whole checkpoint, embeddings included: 4GB"
    )
    budget.add_argument("--max-loss", default=unset, type=float, metavar="L", help="predicted loss, nats per token: 0.02")
    budget.add_argument("--statistics", metavar="FILE", help="what `lord sensitivity` wrote; else it is measured first")


def budget_from(args: argparse.Namespace) -> Budget | None:
    """Returns the budget of a command line, if one is given.

    Raises:
        BudgetError: More than one is given, or it is illegal.
        ConfigError: Something stands beside it, or without it, that has no meaning there.
    """
    from lord_quant.errors import ConfigError

    given = vars(args)
    wanted = {name: given[name] for name in BUDGETS if name in given}
    if not wanted:
        if args.statistics:
            raise ConfigError("--statistics is given without a budget; wanted --target-bpw, --target-size or --max-loss")
        return None
    beside = [f"--{name.replace('_', '-')}" for name in BESIDE if given.get(name) is not None]
    if beside:
        raise ConfigError(f"a budget and {', '.join(beside)} are given; wanted one or the other")
    from lord_quant.silence import import_hosts

    import_hosts()
    from lord_quant.budget import Budget, parse_size

    if "target_size" in wanted:
        wanted["target_size"] = parse_size(wanted["target_size"])
    return Budget(**wanted)


def run_of(args: argparse.Namespace, budget: Budget | None) -> LordConfig:
    """Returns the configuration of a run; that of one with a budget has no ranks yet.

    Raises:
        ConfigError: Anything unknown or illegal, or a budget for the naive stack.
    """
    from lord_quant.config import LordConfig, merge
    from lord_quant.errors import ConfigError

    if budget is None:
        return config_from(args)
    values = settings_from(args)
    if values.get("stack") == "naive":
        raise ConfigError("a budget is given for the naive stack, which packs all layers alike; wanted --stack joint")
    menu_from(args)
    return LordConfig.from_dict(merge(without_choices(values), {"lowrank": {"rank_ratio": 1}}))


def menu_from(args: argparse.Namespace) -> Menu:
    """Returns the candidates that file and flags leave.

    Raises:
        BudgetError: They leave none that are packed.
        ConfigError: The form, bits or group size is unknown, or given by layer.
    """
    from lord_quant.config import FLOAT_BITS, FORMS, GptqConfig
    from lord_quant.errors import BudgetError, ConfigError, nearest_name
    from lord_quant.planner import DENSE, Menu

    values = settings_from(args)
    lowrank, gptq = (values.get(section) or {} for section in ("lowrank", "gptq"))
    patterns = [name for name in ("bits_pattern", "group_size_pattern") if gptq.get(name)]
    patterns += ["form_pattern"] if lowrank.get("form_pattern") else []
    if patterns:
        raise ConfigError(f"a budget and {', '.join(patterns)} are given; wanted one or the other")
    restricted: dict[str, Any] = {"mean_correction": lowrank.get("mean_correction", True)}
    bits, group_size, form = gptq.get("bits"), gptq.get("group_size"), lowrank.get("form")
    if bits == FLOAT_BITS:
        raise BudgetError(f"bits is {FLOAT_BITS} and a budget is given; wanted packed bits, or ranks instead of a budget")
    if bits is not None:
        restricted["bits"] = (GptqConfig(bits=bits).bits,)
    if group_size is not None:
        restricted["group_sizes"] = (GptqConfig(group_size=group_size).group_size,)
    if form is not None:
        legal = (DENSE, *FORMS)
        if form not in legal:
            raise ConfigError(f"form is {form!r}; wanted one of {', '.join(legal)}{nearest_name(str(form), legal)}")
        restricted["forms"] = (DENSE,) if form == DENSE else (DENSE, form)
    return Menu(**restricted)


def planner_from(args: argparse.Namespace, config: LordConfig) -> Planner:
    """Makes a planner from statistics in a file, or measured now."""
    from lord_quant.budget import Planner, sense
    from lord_quant.statistics import load_statistics

    statistics = load_statistics(args.statistics) if args.statistics else sense(config)
    return Planner(config, statistics, menu_from(args))
