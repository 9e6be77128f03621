# SPDX-License-Identifier: Apache-2.0
"""Allocation against brute force and against uniform plans; menus against the bytes of real plans."""

from __future__ import annotations

import itertools
import math
import random
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_quant.config import GptqConfig, LowrankConfig
from lord_quant.errors import BudgetError
from lord_quant.layer_bytes import Packing, factor_shapes
from lord_quant.menu import DENSE, Candidate, Choice, Menu, single
from lord_quant.plan import build_plan
from lord_quant.planner import (
    Allocation,
    Frontier,
    lower_hull,
    merged,
    patterns,
    total,
    uniform_plans,
)
from lord_quant.probe import FactorNoise, LayerLoss
from lord_quant.targets import LinearSite


def candidate(num_bytes: int, loss: float) -> Candidate:
    return Candidate(num_bytes, loss, DENSE, None, 4, 64, 4, 64)


def packings(each: Candidate) -> tuple[Packing, Packing]:
    return Packing(each.bits, each.group_size), Packing(each.up_bits, each.up_group_size)


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


def layer_loss(smaller: int, seed: int, scale: float = 1.0) -> LayerLoss:
    """A plausible layer: a falling spectrum, four times less noise per bit."""
    generator = torch.Generator().manual_seed(seed)
    values = (
        scale
        * torch.logspace(0, -3, smaller, dtype=torch.float64)
        * (0.5 + torch.rand(smaller, generator=generator, dtype=torch.float64))
    )
    values = values.sort(descending=True).values
    tail = torch.cat((values.flip(0).cumsum(0).flip(0), values.new_zeros(1)))
    noise = 0.05 * float(tail[0])
    groups = {32: 0.85, 64: 1.0, 128: 1.12, 256: 1.25}
    shares = {2: 0.1, 3: 0.025, 4: 0.006}
    down = FactorNoise(smaller // 2, {bits: share / 4 for bits, share in shares.items()}, 1.1)
    up = FactorNoise(smaller // 2, shares, 0.8)
    return LayerLoss(tail, 1.5 * tail, {2: noise, 3: noise / 4.2, 4: noise / 17}, groups, 64, down, up)


SITES = {
    site.name: site
    for site in (
        LinearSite("h.0.attn", 0, 256, 384, True),
        LinearSite("h.0.fc", 0, 256, 1024, False),
        LinearSite("h.0.proj", 0, 1024, 256, False),
        LinearSite("h.1.square", 1, 512, 512, True),
    )
}
LOSSES = {
    name: layer_loss(min(site.in_features, site.out_features), seed, 10.0**-seed)
    for seed, (name, site) in enumerate(SITES.items())
}


@pytest.mark.parametrize("mean_correction", [True, False])
def test_candidates_weigh_what_plans_weigh(mean_correction: bool) -> None:
    """Every candidate, executed as a plan: the same bytes as `build_plan` counts, down to added biases."""
    menu = Menu(mean_correction=mean_correction)
    for name, loss in LOSSES.items():
        candidates = menu.of(SITES[name], loss)
        assert {each.form for each in candidates} >= {"dense", "two_factor"}
        for each in random.Random(0).sample(candidates, min(40, len(candidates))):
            settings = patterns(total({name: each}))
            lowrank = LowrankConfig(**{"mean_correction": mean_correction} | settings["lowrank"])
            gptq = GptqConfig(**settings["gptq"])
            (layer,) = build_plan([SITES[name]], lowrank, gptq, itemsize=2, other_bytes=0).layers
            assert (layer.rank, layer.bits, layer.group_size) == (each.rank, each.bits, each.group_size)
            assert (layer.up_bits, layer.up_group_size) == (each.up_bits, each.up_group_size)
            assert layer.rank is None or layer.form == each.form
            assert layer.counted_bytes == each.num_bytes


def test_no_candidate_is_beaten_by_another_and_losses_are_the_formulas() -> None:
    site, loss = SITES["h.0.fc"], LOSSES["h.0.fc"]
    candidates = Menu().of(site, loss)
    for before, after in itertools.pairwise(candidates):
        assert after.num_bytes > before.num_bytes and after.loss < before.loss
    for each in candidates:
        if each.rank is None:
            assert each.loss == loss.of_dense(each.bits, each.group_size)
        else:
            noise = loss.of_factors(each.rank, *packings(each))
            assert each.loss == pytest.approx(
                float(loss.cut[each.rank]) + noise * (loss.pivoted if each.form == "pivoted" else 1)
            )
            assert each.bits == each.up_bits or each.form == "two_factor"
    assert any(each.bits < each.up_bits for each in candidates)  # the factor with less noise gets fewer bits


@pytest.mark.parametrize(
    ("menu", "key", "allowed"),
    [
        (Menu(forms=(DENSE,)), "form", {"dense"}),
        (Menu(forms=("pivoted",)), "form", {"pivoted"}),
        (Menu(bits=(3,)), "bits", {3}),
        (Menu(group_sizes=(64, 128)), "group_size", {64, 128}),
    ],
)
def test_restrictions_hold(menu: Menu, key: str, allowed: set[Any]) -> None:
    for name, loss in LOSSES.items():
        assert {getattr(each, key) for each in menu.of(SITES[name], loss)} <= allowed


def test_ranks_move_in_steps_of_32_at_any_group_size() -> None:
    """`up` takes the group size of `down`, or where that does not divide the rank the largest that does."""
    site, loss = SITES["h.1.square"], LOSSES["h.1.square"]
    for size, wanted in ((32, {32}), (64, {32, 64}), (128, {32, 64, 128}), (256, {32, 64, 128})):
        menu = Menu(forms=("two_factor",), bits=(4,), group_sizes=(size,), mean_correction=False)
        found = {each.rank: each for each in menu.of(site, loss)}
        assert list(found) == list(range(32, 256, 32))
        assert {each.group_size for each in found.values()} == {size}
        assert {each.up_group_size for each in found.values()} == wanted
        for rank, each in found.items():
            fitting = [other for other in (32, 64, 128, 256) if rank % other == 0 and other <= size]
            assert each.up_group_size == max(fitting)


def test_wide_layers_have_as_many_ranks_as_are_tried_and_all_group_sizes() -> None:
    site, loss = LinearSite("h.0.fc", 0, 6144, 24576, True), layer_loss(6144, 1)
    found = Menu(forms=("two_factor",), bits=(4,), group_sizes=(128,)).of(site, loss)
    assert [each.rank for each in found] == list(range(128, 4915, 128))  # four fifths of the rank hold as many weights
    assert {each.up_group_size for each in found} == {128}


def test_a_plan_can_be_packed_where_what_is_usual_divides_neither_a_layer_nor_its_rank() -> None:
    """2752 = 64 * 43 inputs, `down` in groups of 64 and `up` of 32, beside three layers in groups of 256."""
    gate = LinearSite("h.0.gate_proj", 0, 1024, 2752, False)
    others = [gate, gate._replace(name="h.0.up_proj"), LinearSite("h.0.q_proj", 0, 1024, 1024, False)]
    narrow, loss = LinearSite("h.0.down_proj", 0, 2752, 1024, False), layer_loss(1024, 0)
    usual = {site.name: Menu(forms=(DENSE,), bits=(4,), group_sizes=(256,)).of(site, loss)[0] for site in others}
    few = loss._replace(groups={size: loss.groups[size] for size in (32, 64)})
    own = [each for each in Menu(forms=("two_factor",)).of(narrow, few) if each.group_size != each.up_group_size]
    assert {(each.group_size, each.up_group_size) for each in own} == {(64, 32)}
    for each in own:
        chosen = usual | {narrow.name: each}
        settings = patterns(total(chosen))
        assert settings["gptq"]["group_size"] == 256
        lowrank, gptq = LowrankConfig(**settings["lowrank"]), GptqConfig(**settings["gptq"])
        plan = build_plan([*others, narrow], lowrank, gptq, itemsize=2, other_bytes=0)
        assert [layer.counted_bytes for layer in plan.layers] == [chosen[layer.name].num_bytes for layer in plan.layers]


TOGETHER = [LinearSite(f"h.0.{name}", 0, 256, size, False) for name, size in (("q", 256), ("k", 128), ("v", 128))]
WHOLE = LinearSite("h.0.q", 0, 256, 512, False)


@pytest.mark.parametrize("bits", [(16,), (2, 3, 4, 8)])
def test_groups_weigh_what_plans_weigh(bits: tuple[int, ...]) -> None:
    loss = layer_loss(256, 5)
    menu = Menu(forms=("grouped",), bits=bits, group_sizes=(32,) if bits == (16,) else (32, 64, 128), itemsize=4)
    choices = menu.of_group(TOGETHER, WHOLE, loss)
    assert len(choices) >= 5
    for choice in random.Random(0).sample(choices, min(30, len(choices))):
        chosen = dict(choice.parts)
        settings = patterns(total(chosen))
        plan = build_plan(
            TOGETHER, LowrankConfig(**settings["lowrank"]), GptqConfig(**settings["gptq"]), itemsize=4, other_bytes=0
        )
        assert [layer.counted_bytes for layer in plan.layers] == [chosen[layer.name].num_bytes for layer in plan.layers]
        assert {layer.form for layer in plan.layers} == {"grouped"} and len(plan.group_pattern) == 2
        assert choice.num_bytes == sum(layer.counted_bytes for layer in plan.layers)
        first = chosen["h.0.q"]
        cut, noise = (
            float(loss.cut[first.rank or 0]),
            loss.of_factors(first.rank or 0, *packings(first)),
        )
        assert choice.loss == first.loss == pytest.approx(cut + noise)


@pytest.mark.parametrize("usual", [2, 3, 4])
def test_bits_of_a_shared_factor_are_its_leaders_whatever_other_layers_have(usual: int) -> None:
    others = [LinearSite(f"h.0.other{number}", 0, 256, 256, False) for number in range(4)]
    rest = {site.name: Candidate(0, 0.0, DENSE, None, usual, 32, usual, 32) for site in others}
    choices = Menu(forms=("grouped",), bits=(2, 3, 4), group_sizes=(32,)).of_group(TOGETHER, WHOLE, layer_loss(256, 5))
    apart = [choice for choice in choices if choice.parts[0][1].bits != choice.parts[0][1].up_bits]
    assert {choice.parts[0][1].bits for choice in apart} == {2, 3, 4}
    for choice in apart:
        chosen = dict(choice.parts) | rest
        settings = patterns(total(chosen))
        lowrank, gptq = LowrankConfig(**settings["lowrank"]), GptqConfig(**settings["gptq"])
        assert gptq.bits == usual
        plan = build_plan([*TOGETHER, *others], lowrank, gptq, itemsize=2, other_bytes=0)
        for layer in plan.layers:
            each = chosen[layer.name]
            assert (layer.bits, layer.up_bits, layer.leader) == (each.bits, each.up_bits, each.leader)


def test_groups_that_differ_in_bias_have_no_choices_unless_all_get_one() -> None:
    sites = [TOGETHER[0], TOGETHER[1]._replace(has_bias=True)]
    loss = layer_loss(256, 5)
    whole = WHOLE._replace(out_features=384)
    assert Menu(mean_correction=False).of_group(sites, whole, loss) == []
    assert Menu(mean_correction=True).of_group(sites, whole, loss)
    assert Menu(mean_correction=False).of_group(TOGETHER, WHOLE, loss)
    assert Menu(forms=("two_factor",)).of_group(TOGETHER, WHOLE, loss) == []


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


@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
def test_no_candidate_keeps_less_of_a_layer_than_is_asked_for(ratio: float) -> None:
    for name, loss in LOSSES.items():
        site, every = SITES[name], Menu().of(SITES[name], loss)
        dense = site.in_features * site.out_features

        def kept(each: Candidate, site: LinearSite = site, dense: int = dense) -> float:
            return sum(math.prod(shape) for shape in factor_shapes(*site[2:4], each.rank, each.form).values()) / dense

        limited = Menu(min_param_ratio=ratio).of(site, loss)
        assert all(each.rank is None or kept(each) >= ratio for each in limited)
        # Nothing else goes: what is left out is too small, or beaten by what the floor took away.
        assert {each for each in every if each.rank is None or kept(each) >= ratio} <= set(limited)
        assert any(each.rank and kept(each) < ratio for each in every)


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
