# SPDX-License-Identifier: Apache-2.0
"""Allocation against brute force and against uniform plans."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_losses import LOSSES, SITES, layer_loss

from lord_quant.budgets.menu import DENSE, Candidate, Choice, Menu, single
from lord_quant.budgets.planner import Allocation, Frontier, lower_hull, merged, total, uniform_plans
from lord_quant.errors import BudgetError
from lord_quant.targets import LinearSite


def candidate(num_bytes: int, loss: float) -> Candidate:
    return Candidate(num_bytes, loss, DENSE, None, 4, 64, 4, 64)


def units(menus: Any) -> list[list[Choice]]:
    return [single(name, menu) for name, menu in menus.items()]


menu_of_points = st.lists(st.builds(candidate, st.integers(1, 60), st.integers(0, 1000).map(float)), min_size=1, max_size=7)
menus_of_points = st.lists(menu_of_points, min_size=1, max_size=4).map(lambda each: dict(enumerate(each)))


def best_by_trying_all(menus: Any, budget: float) -> float:
    plans = itertools.product(*menus.values())
    return min(sum(c.loss for c in plan) for plan in plans if sum(c.num_bytes for c in plan) <= budget)


@settings(max_examples=200, deadline=None)
@given(menu_of_points)
def test_the_hull_is_convex_and_nothing_lies_below_it(menu: list[Candidate]) -> None:
    hull = lower_hull(menu)
    assert set(hull) <= set(menu) and hull[0].num_bytes == min(menu).num_bytes
    slopes = [(b.loss - a.loss) / (b.num_bytes - a.num_bytes) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes) and all(slope < 0 for slope in slopes) and len(set(slopes)) == len(slopes)
    for point in menu:
        for before, after in itertools.pairwise(hull):
            if before.num_bytes <= point.num_bytes <= after.num_bytes:
                share = (point.num_bytes - before.num_bytes) / (after.num_bytes - before.num_bytes)
                assert point.loss >= before.loss + share * (after.loss - before.loss) - 1e-9
        assert point.loss >= hull[-1].loss


@settings(max_examples=200, deadline=None)
@given(menus_of_points, st.integers(0, 260))
def test_an_allocation_fits_and_is_within_a_step_of_the_best(menus: Any, budget: int) -> None:
    smallest = sum(min(menu).num_bytes for menu in menus.values())
    if budget < smallest:
        with pytest.raises(BudgetError, match=str(smallest)):
            Frontier(units(menus)).within(budget)
        return
    found = Frontier(units(menus)).within(budget)
    assert found == total(found.chosen) and found.num_bytes <= budget
    assert all(each in menus[name] for name, each in found.chosen.items())
    steps = [a.loss - b.loss for menu in menus.values() for a, b in itertools.pairwise(lower_hull(menu))]
    best = best_by_trying_all(menus, budget)
    assert best <= found.loss <= best + max(steps, default=0)
    # What was left buys nothing more in any one layer.
    for name, old in found.chosen.items():
        affordable = [c for c in menus[name] if c.num_bytes - old.num_bytes <= budget - found.num_bytes]
        assert old.loss <= min(c.loss for c in affordable)


@settings(max_examples=100, deadline=None)
@given(menus_of_points)
def test_budgets_of_whole_steps_are_met_exactly(menus: Any) -> None:
    """Along the hull a Lagrangian allocation is the optimum, not an approximation."""
    hulls = {name: lower_hull(menu) for name, menu in menus.items()}
    steps = sorted(
        ((b.loss - a.loss) / (b.num_bytes - a.num_bytes), name, b.num_bytes - a.num_bytes)
        for name, hull in hulls.items()
        for a, b in itertools.pairwise(hull)
    )
    budget = sum(hull[0].num_bytes for hull in hulls.values())
    for _, _, size in steps:
        budget += size
        assert Frontier(units(menus)).within(budget).loss == pytest.approx(best_by_trying_all(menus, budget), abs=1e-9)


def smallest_by_trying_all(menus: Any, max_loss: float) -> int:
    plans = itertools.product(*menus.values())
    return min(sum(c.num_bytes for c in plan) for plan in plans if sum(c.loss for c in plan) <= max_loss)


@settings(max_examples=200, deadline=None)
@given(menus_of_points, st.integers(0, 4000))
def test_the_smallest_plan_below_a_loss_is_within_a_step_of_the_smallest(menus: Any, max_loss: int) -> None:
    least = sum(min(c.loss for c in menu) for menu in menus.values())
    if max_loss < least:
        with pytest.raises(BudgetError, match=f"at most {max_loss}; the plan of least loss loses {least:g}"):
            Frontier(units(menus)).below(max_loss)
        return
    found = Frontier(units(menus)).below(max_loss)
    assert found == total(found.chosen) and found.loss <= max_loss
    assert all(each in menus[name] for name, each in found.chosen.items())
    steps = [b.num_bytes - a.num_bytes for menu in menus.values() for a, b in itertools.pairwise(lower_hull(menu))]
    best = smallest_by_trying_all(menus, max_loss)
    assert best <= found.num_bytes <= best + max(steps, default=0)
    # No one layer can give back anything more.
    for name, old in found.chosen.items():
        bearable = [c for c in menus[name] if c.loss - old.loss <= max_loss - found.loss]
        assert old.num_bytes <= min(c.num_bytes for c in bearable)


@settings(max_examples=100, deadline=None)
@given(menus_of_points)
def test_losses_of_whole_steps_are_met_exactly(menus: Any) -> None:
    frontier = Frontier(units(menus))
    chosen = [hull[0] for hull in frontier.hulls]
    for unit, position in [(None, 0), *frontier.steps]:
        if unit is not None:
            chosen[unit] = frontier.hulls[unit][position + 1]
        limit = sum(choice.loss for choice in chosen)
        found = frontier.below(limit)
        assert found.num_bytes == smallest_by_trying_all(menus, limit) and found.loss <= limit


def test_a_given_plan_that_is_smaller_is_taken_if_it_loses_no_more() -> None:
    menus = {"a": [candidate(10, 5.0), candidate(20, 4.0)]}
    smaller = Allocation({"a": candidate(15, 4.0)}, 15, 4.0)
    assert Frontier(units(menus), [smaller]).below(4.0) is smaller
    assert Frontier(units(menus), [smaller]).below(5.0).num_bytes == 10


def test_a_given_plan_that_is_better_is_taken_if_it_fits() -> None:
    menus = {"a": [candidate(10, 5.0), candidate(20, 4.0)]}
    better = Allocation({"a": candidate(15, 1.0)}, 15, 1.0)
    assert Frontier(units(menus), [better]).within(16) is better
    assert Frontier(units(menus), [better]).within(14).loss == 5.0


@settings(max_examples=100, deadline=None)
@given(menus_of_points)
def test_layers_that_choose_together_lose_nothing_at_whole_steps(menus: Any) -> None:
    """The hull of a merged menu is that of all combinations: a Minkowski sum of convex hulls."""
    every = [
        Choice(sum(c.num_bytes for c in plan), sum(c.loss for c in plan), tuple(zip(menus, plan, strict=True)))
        for plan in itertools.product(*menus.values())
    ]
    found, wanted = lower_hull(merged(menus, [])), lower_hull(every)
    assert [each.num_bytes for each in found] == [each.num_bytes for each in wanted]
    assert [each.loss for each in found] == pytest.approx([each.loss for each in wanted])


def test_a_group_that_is_better_is_chosen() -> None:
    menus = {"a": [candidate(10, 5.0), candidate(20, 1.0)], "b": [candidate(10, 5.0), candidate(20, 1.0)]}
    group = Choice(22, 3.0, (("a", candidate(15, 3.0)), ("b", candidate(7, 0.0))))
    unit = merged(menus, [group])
    assert Frontier([unit]).within(25).chosen == dict(group.parts)
    assert Frontier([unit]).within(40).loss == 2.0 and Frontier([unit]).within(21).loss == 10.0


def test_plans_are_never_predicted_worse_than_uniform_ones_or_smaller_budgets() -> None:
    menu = Menu()
    menus = {name: menu.of(SITES[name], loss) for name, loss in LOSSES.items()}
    uniform = uniform_plans(SITES, LOSSES, menu)
    assert len(uniform) == 16
    for plan in uniform:
        assert Frontier(units(menus), uniform).within(plan.num_bytes).loss <= plan.loss
    dense = sum(site.in_features * site.out_features for site in SITES.values())
    losses = [Frontier(units(menus), uniform).within(bpw * dense / 8).loss for bpw in (2, 2.25, 2.5, 3, 3.5, 4, 5, 8)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 50
    first, again = (Frontier(units(menus)).within(3 * dense / 8) for _ in range(2))
    assert first == again


def test_a_16b_shaped_model_is_planned_in_seconds() -> None:
    """StarCoder-15.5B's shapes, synthetic spectra, two budgets and their losses; processor time, not wall time."""
    shapes = {"attn.c_attn": (6144, 6400), "attn.c_proj": (6144, 6144), "c_fc": (6144, 24576), "c_proj": (24576, 6144)}
    sites = {
        f"h.{block}.{name}": LinearSite(f"h.{block}.{name}", block, *shape, True)
        for block in range(40)
        for name, shape in shapes.items()
    }
    losses = {name: layer_loss(6144, seed, 0.01) for seed, name in enumerate(sites)}
    dense = sum(site.in_features * site.out_features for site in sites.values())
    start, menu = time.process_time(), Menu()
    menus = {name: menu.of(sites[name], loss) for name, loss in losses.items()}
    frontier = Frontier(units(menus), uniform_plans(sites, losses, menu))
    found = [frontier.within(bpw * dense / 8) for bpw in (2.5, 3.0)]
    assert time.process_time() - start < 10
    start = time.process_time()
    below = [frontier.below(each.loss) for each in found]
    assert time.process_time() - start < 5
    for tight, each in zip(below, found, strict=True):
        assert tight.loss <= each.loss and 0.999 * each.num_bytes < tight.num_bytes <= each.num_bytes
    assert [round(8 * each.num_bytes / dense, 2) for each in found] == [2.5, 3.0]
