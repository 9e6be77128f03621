# SPDX-License-Identifier: Apache-2.0
"""Ways to compress a layer: sets of equal bytes, and losses that are those the planner counts."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import choices

    yield choices
    for name in ("choices", "agreement", "tables"):
        sys.modules.pop(name, None)


def choice(choices: Any, kind: str, bits: int, num_bytes: int, rank: int | None = 64) -> Any:
    return choices.Choice(kind, rank, bits, 64, num_bytes)


def test_sets_are_of_equal_bytes_and_of_different_ways(choices: Any) -> None:
    every = [
        choice(choices, "dense", 2, 1000, None),
        choice(choices, "two_factor", 3, 1010),
        choice(choices, "two_factor", 3, 1020, 96),
        choice(choices, "pivoted", 3, 1029),
        choice(choices, "pivoted", 4, 1040),
        choice(choices, "dense", 3, 1500, None),
        choice(choices, "two_factor", 4, 1530),
        choice(choices, "pivoted", 4, 2000),
    ]
    first, second = choices.equal_sets(every, seed=0)
    assert {(one.kind, one.bits) for one in first} == {("dense", 2), ("two_factor", 3), ("pivoted", 3)}
    assert {one.num_bytes for one in second} == {1500, 1530}


def test_predicted_parts_add_up_as_the_planner_counts_them(choices: Any) -> None:
    from lord_quant.budgets.menu import Menu
    from lord_quant.losses.probe import FactorNoise, LayerLoss
    from lord_quant.targets import LinearSite

    tail = torch.linspace(1, 0, 129, dtype=torch.float64)
    noise = FactorNoise(64, {2: 0.1, 3: 0.02, 4: 0.005}, 0.9)
    ratios = {"pivoted": 1.5, "column_pivoted": 1.2}
    loss = LayerLoss(tail, tail, {2: 0.5, 3: 0.1, 4: 0.02}, {32: 0.8, 64: 1.0}, 64, noise, noise, ratios)
    site = LinearSite("h.0.fc", 0, 128, 256, True)
    every = list(choices.menu(SimpleNamespace(site=site), loss))
    assert {(own.rank, own.group_size) for own in every if own.kind == "two_factor"} >= {(32, 32), (64, 32), (64, 64)}
    assert all(own.rank is None or own.rank % own.group_size == 0 for own in every)
    for own in every:
        (found,) = (
            each
            for each in Menu((own.kind,), (own.bits,), (own.group_size,)).of(site, loss)
            if (each.rank, each.up_group_size) == (own.rank, own.group_size)
        )
        cut, rounded = choices.parts(loss, own)
        assert cut + rounded == pytest.approx(found.loss) and own.num_bytes == found.num_bytes
    assert choices.parts(loss, choices.Choice("truncation", 32, 16, 32, None)) == (float(tail[32]), 0.0)
