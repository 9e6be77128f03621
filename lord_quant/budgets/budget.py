# SPDX-License-Identifier: Apache-2.0
"""From a budget to the settings of a run: what can be chosen, and the choice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lord_quant.blocks.source import build_skeleton, inspect_source
from lord_quant.budget_config import BudgetConfig
from lord_quant.budgets import planner
from lord_quant.budgets.menu import DENSE, Choice, Menu, single
from lord_quant.budgets.planner import Allocation
from lord_quant.config import FLOAT_BITS, LordConfig
from lord_quant.errors import BudgetError
from lord_quant.losses.sensing import digest_of, other_settings, unplanned
from lord_quant.losses.statistics import Statistics
from lord_quant.runs.pipeline import plan_model
from lord_quant.sizes.packable import packable_of
from lord_quant.targets import LinearSite, find_linears, select


PLANNED = "planned"
"""Section of a plan file that says where it comes from; the others are those of a configuration."""


class Planner:
    """Plans one model for any budget; menus are made once.

    Args:
        config: Model, targets, and whether factors get a bias.
        statistics: What the model's layers would lose; None makes something up, for what shapes alone decide.
        menu: What candidates there are for the layers among the targets; others stay dense.
        model: The model where it is loaded already; None reads shapes from its folder.
        commit: That of a hub model; None is the one its name stands for.

    Raises:
        BudgetError: The statistics are another model's, or were measured with other settings of the solver.
        LordError: Whatever is wrong with the model or the targets.
    """

    def __init__(
        self,
        config: LordConfig,
        statistics: Statistics | None,
        menu: Menu,
        model: torch.nn.Module | None = None,
        commit: str | None = None,
    ) -> None:
        if model is None:
            source = inspect_source(config.model, config.dtype)
            model, itemsize = build_skeleton(source), source.dtype.itemsize
        else:
            itemsize = next(model.parameters()).element_size()
        dense = unplanned(config)
        if FLOAT_BITS in menu.bits:  # biases of float layers are stored like all floats, of packed ones in 2 bytes
            dense = dataclasses.replace(dense, gptq=dataclasses.replace(dense.gptq, bits=FLOAT_BITS))
        plan = plan_model(model, dense, itemsize)
        sites = find_linears(model)
        if statistics is None:
            statistics = Statistics.of_shapes(packable_of(sites), {"fisher_samples": int(config.joint.fisher)})
        else:
            _require_own(statistics, config, sites, commit)
        menu = dataclasses.replace(menu, itemsize=itemsize)
        self.statistics, self.menu = statistics, menu
        targeted = select(sites, config.lowrank.targets, config.lowrank.ignore)
        self.menus = _menus(statistics, menu, targeted)
        self.uniform = planner.uniform_plans(statistics.sites, statistics.losses, menu)
        self.plans = planner.Frontier(self.menus, self.uniform)
        self.dense_weights = sum(layer.dense_weights for layer in plan.layers)
        self.float_bytes = sum(layer.weight_bytes for layer in plan.layers if layer.name not in statistics.sites)
        self.other_bytes = plan.other_bytes + self.float_bytes + sum(layer.bias_bytes for layer in plan.layers)

    @property
    def in_nats(self) -> bool:
        """Whether predicted losses are in nats per token; without a backward pass they are squared output errors."""
        return bool(self.statistics.origin.get("fisher_samples"))

    @property
    def unit(self) -> str:
        """What predicted losses are in."""
        return "nats per token" if self.in_nats else "squared output error"

    def tell(self, allocation: Allocation) -> str:
        """Says what is predicted."""
        return f"predicted loss {allocation.loss:.4f} {self.unit if self.in_nats else '(output error)'}"

    def bpw(self, allocation: Allocation) -> float:
        """Returns stored bits per dense weight, all in."""
        return 8 * (allocation.num_bytes + self.float_bytes) / self.dense_weights

    def choose(self, budget: BudgetConfig) -> Allocation:
        """Returns the best plan for a budget.

        Raises:
            BudgetError: It cannot be met; the message names what can be reached.
        """
        if (allowed := self.bytes_within(budget)) is not None:
            return self.plans.within(allowed)
        assert budget.max_loss is not None  # what limits no bytes
        smallest, largest = (self._extreme(pick) for pick in (min, max))
        if largest.loss > budget.max_loss:
            raise BudgetError(
                f"no plan loses as little as {budget.max_loss:g} nats per token; what can be reached is "
                f"{_rounded_up(largest.loss)} to {smallest.loss:.3g}"
            )
        return self.plans.below(budget.max_loss)

    def bytes_within(self, budget: BudgetConfig) -> float | None:
        """Returns what a budget leaves for what is chosen; None if it limits the loss.

        Raises:
            BudgetError: No plan is as small, or the loss is limited in nats and known in something else.
        """
        if budget.max_loss is not None:
            if not self.in_nats:
                raise BudgetError(
                    "max_loss is in nats, and losses without a backward pass are output errors; wanted one (fisher)"
                )
            return None
        smallest, largest = (self._extreme(pick) for pick in (min, max))
        if budget.target_bpw is not None:
            allowed = self._allowed(budget.target_bpw)
            reach = f"{_rounded_up(self.bpw(smallest))} to {self.bpw(largest):.3f} bits per weight"
        else:
            assert budget.size is not None  # exactly one is given
            allowed = budget.size - self.other_bytes
            reach = " to ".join(str(self.other_bytes + each.num_bytes) for each in (smallest, largest)) + " bytes in all"
        if allowed < smallest.num_bytes:
            asked = budget.target_bpw or budget.target_size
            raise BudgetError(f"no plan is as small as {asked}; what can be reached is {reach}")
        return allowed

    def frontier(self, budgets: Sequence[float]) -> list[Allocation | None]:
        """Returns the best plans at several bits per weight; None for those out of reach."""
        smallest = self._extreme(min).num_bytes
        allowed = [self._allowed(bpw) for bpw in budgets]
        return [self.plans.within(limit) if limit >= smallest else None for limit in allowed]

    def _allowed(self, bpw: float) -> float:
        """Returns the bytes that so many bits per weight leave for what is chosen."""
        return bpw * self.dense_weights / 8 - self.float_bytes

    def _extreme(self, pick: Any) -> Allocation:
        choices: list[Choice] = [pick(menu, key=lambda choice: choice.num_bytes) for menu in self.menus]
        return planner.total({name: part for choice in choices for name, part in choice.parts})

    def settings(self, allocation: Allocation) -> dict[str, Any]:
        """Returns a plan as the sections of a configuration, and where it comes from."""
        about = {
            **self.statistics.origin,
            "predicted_loss": round(allocation.loss, 6),
            "bits_per_weight": round(self.bpw(allocation), 4),
            "tensor_bytes": allocation.num_bytes + self.other_bytes,
        }
        sections = planner.patterns(allocation)
        sections["lowrank"]["mean_correction"] = self.menu.mean_correction
        # truncate in the metric the plan was made in
        samples = self.statistics.origin.get("fisher_samples")
        sections["joint"] = {"fisher_samples": samples} if samples else {"fisher": False}
        return {PLANNED: about, **sections}


def refuse_unreachable(
    config: LordConfig,
    menu: Menu,
    budgets: Iterable[BudgetConfig],
    model: torch.nn.Module | None = None,
    commit: str | None = None,
) -> None:
    """Refuses, before it is measured what layers lose, budgets that no plan keeps whatever that is.

    Args:
        config: The run, as for `Planner`; likewise the others.
        menu: What candidates there are.
        budgets: What is asked for.
        model: The model where it is loaded already.
        commit: That of a hub model.

    Raises:
        BudgetError: A layer has no candidate, no plan is as small, or the loss is limited in nats that nobody will measure.
    """
    planner = Planner(config, None, menu, model, commit)
    for budget in budgets:
        planner.bytes_within(budget)


def _require_own(statistics: Statistics, config: LordConfig, sites: Sequence[LinearSite], commit: str | None) -> None:
    """Refuses statistics of another model or of other settings."""
    origin = statistics.origin
    require_same(digest_of(config.model, commit), origin.get("model_sha256"), "statistics were", config.model)
    if list(statistics.sites.values()) != packable_of(sites):
        raise BudgetError(f"the statistics do not have the layers of {config.model!r}; wanted those it was measured on")
    odd = other_settings(origin, config)
    if odd:
        raise BudgetError(f"the statistics were measured with other settings: {odd}; wanted the same")


def _menus(statistics: Statistics, menu: Menu, targeted: frozenset[str]) -> list[list[Choice]]:
    """Returns the choices of every unit: layers alone, and those with one input together."""
    dense, sites = dataclasses.replace(menu, forms=(DENSE,)), statistics.sites
    menus = {name: (menu if name in targeted else dense).of(sites[name], loss) for name, loss in statistics.losses.items()}
    empty = [name for name, candidates in menus.items() if not candidates]
    if empty:
        raise BudgetError(f"no candidate is left for {', '.join(empty[:5])}; wanted more forms, bits or group sizes")
    units = []
    for names, loss in statistics.groups.items():
        if targeted.issuperset(names):
            grouped = menu.of_group([sites[name] for name in names], statistics.site_of(names), loss)
            units.append(planner.merged({name: menus.pop(name) for name in names}, grouped))
    return [*units, *(single(name, candidates) for name, candidates in menus.items())]


def require_same(found: str, wanted: Any, what: str, model: str, way: str = "") -> None:
    """Refuses what was made for another model, by digests.

    Raises:
        BudgetError: It was; `way` says what can be done about it.
    """
    if found != wanted:
        raise BudgetError(f"the {what} made for another model than {model!r}; wanted this one's{way}")


def _rounded_up(value: float) -> str:
    """Renders a bound so that it can be asked for: four digits, not below it."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return f"{math.ceil(value / unit) * unit:.4g}"
