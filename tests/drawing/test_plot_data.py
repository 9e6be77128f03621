# SPDX-License-Identifier: Apache-2.0
"""Numbers of the pictures against closed forms, against brute force, and against plans that weigh every byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lord_quant.blocks.source import build_skeleton, inspect_source
from lord_quant.budget_config import BudgetConfig
from lord_quant.budgets.budget import Planner
from lord_quant.budgets.menu import DENSE, Candidate, Menu
from lord_quant.budgets.planner import total
from lord_quant.config import JointConfig, LordConfig, LowrankConfig
from lord_quant.drawing import plot_data
from lord_quant.losses.probe import FactorNoise, LayerLoss
from lord_quant.losses.sensing import _solver, digest_of
from lord_quant.losses.statistics import Statistics
from lord_quant.sizes.layer_bytes import PIVOTED, TWO_FACTOR
from lord_quant.targets import LinearSite, find_linears, layer_type


def falling(full: int, whole: float) -> LayerLoss:
    """A layer whose loss falls with rank in a straight line: `whole` (1 - r / full)."""
    tail = whole * (1 - torch.arange(full + 1, dtype=torch.float64) / full)
    noise = FactorNoise(full // 2, {2: 0.1, 3: 0.02, 4: 0.005}, 1.0)
    return LayerLoss(tail, tail, {2: 1.0, 3: 0.2, 4: 0.05}, {32: 0.9, 64: 1.0}, 64, noise, noise, {})


def statistics_of(*layers: tuple[LinearSite, float]) -> Statistics:
    losses = {site.name: falling(min(site.in_features, site.out_features), whole) for site, whole in layers}
    return Statistics(losses, {site.name: site for site, _ in layers}, {}, {})


SMALL = statistics_of(
    (LinearSite("h.0.attn.q", 0, 64, 64, True), 1.0),
    (LinearSite("h.0.mlp.up", 0, 64, 192, False), 4.0),
    (LinearSite("h.1.attn.q", 1, 64, 64, True), 2.0),
    (LinearSite("h.1.mlp.up", 1, 64, 192, False), 0.0),
)
CHOSEN = total(
    {
        "h.0.attn.q": Candidate(2048, 0.2, DENSE, None, 3, 64, 3, 64),
        "h.0.mlp.up": Candidate(1536, 0.5, TWO_FACTOR, 32, 2, 64, 3, 32),
        "h.1.attn.q": Candidate(1024, 0.1, "grouped", 96, 4, 32, 4, 32),
        "h.1.mlp.up": Candidate(768, 0.0, PIVOTED, 16, 2, 64, 2, 64),
    }
)


def test_types_are_paths_within_blocks() -> None:
    assert layer_type(LinearSite("model.layers.11.mlp.up_proj", 11, 1, 1, True)) == "mlp.up_proj"
    assert layer_type(LinearSite("h.1.experts.1.fc", 1, 1, 1, True)) == "experts.1.fc"


def test_spectra_are_shares_of_the_whole_and_say_what_was_kept() -> None:
    found = {each.layer: each for each in plot_data.spectra(SMALL, CHOSEN)}
    first = found["h.0.mlp.up"]
    assert (first.type, first.block, first.whole) == ("mlp.up", 0, 4.0)
    assert first.rank_ratios == [rank / 64 for rank in range(65)]
    assert first.shares == pytest.approx([1 - ratio for ratio in first.rank_ratios])
    assert first.kept == plot_data.Kept(TWO_FACTOR, 32, 0.5, 0.5)
    assert found["h.0.attn.q"].kept is None
    assert found["h.1.attn.q"].kept == plot_data.Kept("grouped", 96, 1.5, 0.0)  # more directions than the layer has
    assert found["h.1.mlp.up"].shares == [0.0] * 65  # it loses nothing


def test_long_spectra_are_thinned_evenly_to_their_ends() -> None:
    site = LinearSite("h.0.fc", 0, 1000, 2000, True)
    dense = total({"h.0.fc": Candidate(1, 0.0, DENSE, None, 4, 64, 4, 64)})
    (found,) = plot_data.spectra(statistics_of((site, 1.0)), dense)
    steps = [after - before for before, after in zip(found.rank_ratios, found.rank_ratios[1:], strict=False)]
    assert len(found.rank_ratios) == 129 and found.rank_ratios[0] == 0 and found.rank_ratios[-1] == 1
    assert min(steps) > 0.0069 and max(steps) < 0.0081
    assert found.shares == pytest.approx([1 - ratio for ratio in found.rank_ratios])


def test_fates_are_candidates_with_their_bits_per_weight() -> None:
    found = {each.layer: each for each in plot_data.fates(SMALL, CHOSEN)}
    assert [(each.type, each.block) for each in found.values()] == [
        ("attn.q", 0),
        ("mlp.up", 0),
        ("attn.q", 1),
        ("mlp.up", 1),
    ]
    for name, each in found.items():
        chosen = CHOSEN.chosen[name]
        packing = each.bits, each.group_size, each.up_bits, each.up_group_size
        assert Candidate(chosen.num_bytes, each.loss, each.form, each.rank, *packing) == chosen
    assert [each.bpw for each in found.values()] == [4.0, 1.0, 2.0, 0.5]


def test_types_lose_what_their_layers_lose_together() -> None:
    attention, mlp = plot_data.type_curves(SMALL)
    assert (attention.type, attention.kind, attention.layers) == ("attn.q", "attention", 2)
    assert (mlp.type, mlp.kind, mlp.layers) == ("mlp.up", "mlp", 2)
    for curve, whole, most in ((attention, 3.0, 2.0), (mlp, 4.0, 4 / 3)):
        ranks = [round(64 * ratio) for ratio in curve.rank_ratios]
        assert (ranks[0], ranks[-1]) == (0, 64)
        assert curve.removed == pytest.approx([1 - most * rank / 64 for rank in ranks])
        assert curve.losses == pytest.approx([whole * (1 - rank / 64) for rank in ranks])
    assert (attention.parity_removed, attention.parity_loss) == (0.0, pytest.approx(3.0 / 2))
    assert (mlp.parity_removed, mlp.parity_loss) == (0.0, pytest.approx(4.0 / 4))


def test_layers_of_a_type_may_differ_in_shape() -> None:
    """The parity of each: 33 ranks of a 100x50 layer have 4950 weights, one more 5100."""
    wide, small = LinearSite("h.0.fc", 0, 50, 100, True), LinearSite("h.1.fc", 1, 30, 30, True)
    (curve,) = plot_data.type_curves(statistics_of((wide, 1.0), (small, 1.0)))
    assert curve.parity_removed == pytest.approx(1 - (33 * 150 + 15 * 60) / 5900)
    assert curve.parity_loss == pytest.approx(1 - 33 / 50 + 1 / 2)
    assert curve.removed[64] == pytest.approx(1 - (25 * 150 + 15 * 60) / 5900)


@pytest.fixture(scope="module")
def planner(model_folder: Callable[..., Path]) -> Planner:
    """Of a real folder, with losses made up: no pass over data."""
    ranks, fisher = LowrankConfig(rank_ratio=1), JointConfig(fisher=False)
    config = LordConfig(model=str(model_folder("gpt_bigcode")), lowrank=ranks, joint=fisher)
    source = inspect_source(config.model, "auto")
    sites = find_linears(build_skeleton(source))
    made_up = statistics_of(*((site, 2.0 + site.block) for site in sites))
    origin = {"model_sha256": digest_of(config.model), "solver": _solver(config), "fisher_samples": 0}
    return Planner(config, made_up._replace(origin=origin), Menu(bits=(2, 3, 4)))


def test_the_frontier_holds_what_the_planner_says(planner: Planner) -> None:
    allocation = planner.choose(BudgetConfig(target_bpw=3.0))
    data = plot_data.collect(planner, allocation, {"seed": 0})
    assert data.about == {"seed": 0} and data.unit == "squared output error"
    assert data.frontier.chosen == plot_data.Point(planner.bpw(allocation), allocation.loss)
    planned = {point.bpw: point.loss for point in data.frontier.planned}
    assert planned[planner.bpw(allocation)] == allocation.loss  # 3 bits are on the grid
    assert list(planned) == sorted(planned) and list(planned.values()) == sorted(planned.values(), reverse=True)
    assert len(planned) >= 10 and min(planned) < 2 and max(planned) < 5.5
    uniform = {(point.bits, point.group_size): point for point in data.frontier.uniform}
    assert len(uniform) == len(planner.uniform) >= 6 and {bits for bits, _ in uniform} == {2, 3, 4}
    for (bits, group_size), point in uniform.items():
        losses = planner.statistics.losses.values()
        assert point.loss == pytest.approx(sum(loss.of_dense(bits, group_size) for loss in losses))
    assert len(data.spectra) == len(data.layers) == sum(curve.layers for curve in data.types) == len(allocation.chosen)
