# SPDX-License-Identifier: Apache-2.0
"""Ratios of first to second order against the distribution they were drawn from, and against both limits of doubt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_losses import layer_loss

from lord_quant.losses.probe import NOTHING, Orders
from lord_quant.losses.steepness import Ratios, RoundingSlope
from lord_quant.sizes.layer_bytes import Packing


LABELS = 50_000
MEAN, WIDTH = 0.8, 1.0


def drawn(layers: int, seed: int, noisier: float = 1.0) -> tuple[torch.Tensor, list[Orders]]:
    """True κ of layers, and what halves of the text would say of them: variance 4 · chance / N each, or more."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(5, layers, generator=generator, dtype=torch.float64)
    second = 3e-4 * (0.7 * draw[0]).exp()
    chance = second * (1 + draw[4].abs())  # of some layers, only a part was looked at
    ratios = MEAN + WIDTH * draw[1]
    halves = ratios * second + (noisier * 4 * chance / LABELS).sqrt() * draw[2:4]
    return ratios, [Orders(*each) for each in torch.stack((*halves, second, chance), dim=1).tolist()]


def plainly(first: float, second: float) -> Orders:
    """What both halves say of a layer of which all was looked at."""
    return Orders(first, first, second, second)


def test_the_distribution_is_found() -> None:
    _, orders = drawn(2000, seed=0)
    found = Ratios.of(orders, LABELS)
    assert found.mean == pytest.approx(MEAN, abs=0.1) and found.variance**0.5 == pytest.approx(WIDTH, rel=0.1)
    assert found.precision == pytest.approx(LABELS / 2, rel=0.1)


@pytest.mark.parametrize("noisier", [1.0, 4.0])
def test_what_is_believed_is_nearer_the_truth_than_what_was_seen_and_than_the_mean(noisier: float) -> None:
    own, alike, believed = 0.0, 0.0, 0.0
    for seed in range(40):
        ratios, orders = drawn(24, seed, noisier)
        found = Ratios.of(orders, LABELS)
        wanted = ratios.clamp_min(0)
        seen = torch.tensor([(each.one + each.other) / 2 / each.second for each in orders], dtype=torch.float64)
        own += float((seen.clamp_min(0) - wanted).square().mean())
        alike += float((max(found.mean, 0) - wanted).square().mean())
        believed += float((torch.tensor([found.believed(each) for each in orders]) - wanted).square().mean())
    assert believed < 0.95 * min(own, alike)


def test_slopes_that_scatter_more_than_they_should_are_believed_less() -> None:
    _, orders = drawn(500, seed=1, noisier=5.0)
    assert Ratios.of(orders, LABELS).precision == pytest.approx(LABELS / 2 / 5, rel=0.2)


def test_layers_of_which_little_was_seen_are_believed_less() -> None:
    known = Ratios(mean=0.0, variance=1.0, precision=1e4)
    whole, part = plainly(2e-3, 1e-3), Orders(2e-3, 2e-3, 1e-3, 4e-3)
    assert known.believed(whole) == pytest.approx(2 * 10 / 11) and known.believed(part) == pytest.approx(2 * 2.5 / 3.5)


def test_one_text_taken_for_two_halves_counts_once() -> None:
    orders = [plainly(0.5 * second, second) for second in (1e-3, 2e-3, 5e-3)]
    assert Ratios.of(orders, LABELS).precision == pytest.approx(LABELS / 4)


def test_layers_that_differ_by_no_more_than_chance_are_alike() -> None:
    orders = [plainly(0.5 * second, second) for second in (1e-3, 2e-3, 5e-3)]
    found = Ratios.of(orders, LABELS)
    assert found.variance == 0 and [found.believed(each) for each in orders] == pytest.approx([0.5] * 3)


@given(st.floats(-5, 5), st.floats(0, 4), st.floats(1, 1e6), st.floats(-1e-2, 1e-2), st.floats(0, 1e-2))
def test_what_is_believed_lies_between_the_mean_and_what_was_seen_and_is_no_gain(
    mean: float, variance: float, precision: float, first: float, second: float
) -> None:
    believed = Ratios(mean, variance, precision).believed(plainly(first, second))
    own = first / second if second > 0 else mean
    assert max(0.0, min(mean, own)) - 1e-9 <= believed <= max(0.0, mean, own) * (1 + 1e-9) + 1e-9


def test_nothing_is_known_of_layers_that_lose_nothing() -> None:
    assert Ratios.of([NOTHING, NOTHING], LABELS) == (0.0, 0.0, 0.0) and Ratios(0.0, 0.0, 0.0).believed(NOTHING) == 0
    only = Ratios.of([plainly(2e-3, 1e-3), NOTHING], LABELS)
    assert (only.mean, only.variance) == (2.0, 0.0) and only.believed(NOTHING) == 2
    faint = [plainly(2e-3, 1e-3), Orders(1e-20, -1e-20, 1e-300, 1e-300), Orders(1e-12, 0.0, 2e-12, 2e-12)]
    assert Ratios.of(faint, LABELS).believed(faint[0]) == pytest.approx(2, rel=1e-3)


def test_rounding_costs_so_much_more_and_truncation_what_it_did() -> None:
    loss = layer_loss(128, seed=0)._replace(dense_orders=plainly(2e-3, 1e-3), factor_orders=plainly(5e-4, 1e-3))
    counted = RoundingSlope.of([loss], LABELS).counted(loss)
    assert counted.of_dense(3, 64) == pytest.approx(3 * loss.of_dense(3, 64))
    packings = Packing(3, 64), Packing(4, 64)
    assert counted.of_factors(64, *packings) == pytest.approx(1.5 * loss.of_factors(64, *packings))
    assert counted.cut is loss.cut and counted.tail is loss.tail and counted.pivoted == loss.pivoted
    bare = loss._replace(down=None, up=None)
    assert RoundingSlope.of([bare], LABELS).counted(bare).down is None
