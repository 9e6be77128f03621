# SPDX-License-Identifier: Apache-2.0
"""Candidates against the bytes of real plans and the formulas of their losses; what restrictions leave of them."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from layer_losses import LOSSES, SITES, TOGETHER, WHOLE, layer_loss

from lord_quant.budgets.menu import DENSE, Candidate, Menu
from lord_quant.budgets.planner import patterns, total
from lord_quant.config import GptqConfig, LowrankConfig
from lord_quant.plan import build_plan
from lord_quant.sizes.layer_bytes import Packing, factor_shapes
from lord_quant.targets import LinearSite


def packings(each: Candidate) -> tuple[Packing, Packing]:
    return Packing(each.bits, each.group_size), Packing(each.up_bits, each.up_group_size)


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
            assert each.loss == pytest.approx(float(loss.cut[each.rank]) + noise * loss.pivoted.get(each.form, 1))
            assert each.bits == each.up_bits or each.form == "two_factor"
    assert any(each.bits < each.up_bits for each in candidates)  # the factor with less noise gets fewer bits


@pytest.mark.parametrize(
    ("menu", "key", "allowed"),
    [
        (Menu(forms=(DENSE,)), "form", {"dense"}),
        (Menu(forms=("pivoted",)), "form", {"pivoted"}),
        (Menu(forms=("pivoted", "column_pivoted")), "form", {"pivoted", "column_pivoted"}),
        (Menu(bits=(3,)), "bits", {3}),
        (Menu(group_sizes=(64, 128)), "group_size", {64, 128}),
    ],
)
def test_restrictions_hold(menu: Menu, key: str, allowed: set[Any]) -> None:
    for name, loss in LOSSES.items():
        assert {getattr(each, key) for each in menu.of(SITES[name], loss)} <= allowed


def test_of_the_pivoted_forms_layers_have_the_one_that_suits_them() -> None:
    """The one with less noise; a column-pivoted `down` takes the inputs that are left in whole groups."""
    loss = layer_loss(256, 0)
    site = LinearSite("h.0.fc", 0, 256, 1024, True)
    menu = Menu(forms=("pivoted", "column_pivoted"), bits=(4,), group_sizes=(64,))
    for noise, wanted in (({"pivoted": 1.5, "column_pivoted": 2.5}, "pivoted"), ({"pivoted": 2.0}, "pivoted")):
        found = menu.of(site, loss._replace(pivoted=noise))
        assert max(found, key=lambda each: each.num_bytes).form == wanted
    found = menu.of(site, loss._replace(pivoted={"pivoted": 4.0, "column_pivoted": 2.0}))
    columns = {each.rank for each in found if each.form == "column_pivoted"}
    assert columns == {64, 128, 192} and {each.rank for each in found if each.form == "pivoted"} <= {32, 96, 160, 224}


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
