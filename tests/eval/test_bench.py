# SPDX-License-Identifier: Apache-2.0
"""The bench against what it stands for: models changed by hand, and losses of truncations written out rank by rank."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_tokens, tiny_model

from lord_quant.targets import dense_weight


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import bench

    yield bench
    sys.modules.pop("bench", None)


@pytest.fixture
def model() -> Any:
    return tiny_model("llama", torch.float32)


def layers_of(bench: Any, model: Any, tokens: torch.Tensor) -> list[Any]:
    return bench.collect(model, [tokens], [tokens], 0)


def mean_loss(model: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


def test_rise_is_that_of_the_model_changed_by_hand(bench: Any, model: Any) -> None:
    tokens = random_tokens()
    layers = layers_of(bench, model, tokens)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = bench.Bench(model, tokens)
    for chosen in ([layers[9]], [layers[1]], [layers[12], layers[3]]):  # either block, then both: nothing is left behind
        made = {layer.site: layer.compress("two_factor", 32, 16, 32, 0) for layer in chosen}
        changed = copy.deepcopy(model)
        for site, module in made.items():
            changed.set_submodule(site.name, module)
        expected = mean_loss(changed, tokens) - mean_loss(model, tokens)
        assert float(measured.rise(made).loss.mean()) == pytest.approx(expected, rel=1e-3, abs=2e-6)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_divergence_is_zero_of_nothing_and_positive_otherwise(bench: Any, model: Any) -> None:
    tokens = random_tokens()
    layer = layers_of(bench, model, tokens)[4]
    measured = bench.Bench(model, tokens)
    assert measured.rise({layer.site: layer.module}).divergence.abs().max() < 1e-9
    risen = measured.rise({layer.site: layer.compress("two_factor", 16, 16, 32, 0)})
    assert (risen.divergence > 1e-4).all() and risen.divergence.shape == (len(tokens),)


def test_dense_rounding_is_finer_with_more_bits(bench: Any, model: Any) -> None:
    layer = layers_of(bench, model, random_tokens())[6]
    errors = [
        (layer.compress("two_factor", None, bits, 32, 0).weight - dense_weight(layer.module)).norm() for bits in (2, 4, 8)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0
