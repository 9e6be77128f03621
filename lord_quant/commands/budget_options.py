# SPDX-License-Identifier: Apache-2.0
"""The flags by which a budget chooses form, rank, bits and group size, and what comes of them."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from lord_quant.commands.options import settings_from, without


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lord_quant.budget_config import BudgetConfig
    from lord_quant.budgets.budget import Planner
    from lord_quant.budgets.menu import Menu
    from lord_quant.config import LordConfig


FRONTIER = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.25)
"""Bits per weight of the predicted frontier."""


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
    budget.add_argument(
        "--min-param-ratio", default=unset, type=float, metavar="R", help="fraction of its weights any layer keeps: 0.75"
    )
    budget.add_argument(
        "--statistics", default=unset, metavar="FILE", help="what `lord sensitivity` wrote; else it is measured first"
    )


def run_of(args: argparse.Namespace) -> LordConfig:
    """Returns the configuration of a run; one with a budget has no ranks yet.

    Raises:
        ConfigError: Anything unknown or illegal, or something beside a budget that has no meaning there.
        BudgetError: The budget is illegal, or what is beside it leaves no candidates.
    """
    from lord_quant.config import LordConfig

    values = settings_from(args)
    if not values.get("budget"):
        return LordConfig.from_dict(values)
    config = LordConfig.from_dict(without(values, lowrank=("form",), gptq=("bits", "group_size")))
    menu_from(args)
    return config


def menu_from(args: argparse.Namespace) -> Menu:
    """Returns the candidates that file and flags leave.

    Raises:
        ConfigError: The form, bits or group size is unknown.
    """
    from lord_quant.budgets.menu import DENSE, Menu
    from lord_quant.config import FLOAT_BITS, FORMS, GROUP_SIZES, GptqConfig
    from lord_quant.errors import ConfigError, nearest_name
    from lord_quant.sizes.layer_bytes import COLUMN_PIVOTED, GROUPED, PIVOTED, TWO_FACTOR

    values = settings_from(args)
    lowrank, gptq, budget = (values.get(section) or {} for section in ("lowrank", "gptq", "budget"))
    restricted: dict[str, Any] = {
        "mean_correction": lowrank.get("mean_correction", True),
        "min_param_ratio": budget.get("min_param_ratio") or 0.0,
    }
    bits, group_size, form = gptq.get("bits"), gptq.get("group_size"), lowrank.get("form")
    if bits is not None:
        restricted["bits"] = (GptqConfig(bits=bits).bits,)
    if bits == FLOAT_BITS:  # ranks alone are chosen, which no group size limits
        restricted["group_sizes"] = (min(GROUP_SIZES),)
    if group_size is not None:
        restricted["group_sizes"] = (GptqConfig(group_size=group_size).group_size,)
    if form is not None:
        legal = (DENSE, *FORMS)
        if form not in legal:
            raise ConfigError(f"form is {form!r}; wanted one of {', '.join(legal)}{nearest_name(str(form), legal)}")
        also = {GROUPED: (TWO_FACTOR,), COLUMN_PIVOTED: (PIVOTED,)}  # where the form itself does not suit a layer
        restricted["forms"] = tuple(dict.fromkeys((DENSE, form, *also.get(form, ()))))
    return Menu(**restricted)


def planner_from(args: argparse.Namespace, config: LordConfig, budgets: Sequence[BudgetConfig]) -> Planner:
    """Makes a planner for some budgets, from statistics in a file or measured now.

    Raises:
        BudgetError: A budget cannot be kept, which is known before anything is measured; or the statistics do not fit.
    """
    from lord_quant.budgets.budget import Planner, refuse_unreachable
    from lord_quant.losses.sensing import statistics_of

    menu = menu_from(args)
    if config.budget is None or not config.budget.statistics:
        refuse_unreachable(config, menu, budgets)
        sys.stderr.write("note: what layers lose is measured for this alone; `lord sensitivity` keeps it for any budget\n")
    return Planner(config, statistics_of(config), menu)


def frontier_of(planner: Planner) -> str:
    """Renders what other budgets would give."""
    from lord_quant.report import frontier_table

    points = zip(FRONTIER, planner.frontier(FRONTIER), strict=True)
    return frontier_table((limit, planner.bpw(each), each.loss) for limit, each in points if each is not None)
