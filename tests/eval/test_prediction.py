# SPDX-License-Identifier: Apache-2.0
"""What is predicted and measured: pairs counted from measured losses, layers of every type, slopes, figures kept."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def prediction(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import prediction

    yield prediction
    for name in ("prediction", "agreement", "bench", "choices", "first_order", "provenance", "rows", "tables", "variants"):
        sys.modules.pop(name, None)


def choice(prediction: Any, kind: str, bits: int, num_bytes: int, rank: int | None = 64) -> Any:
    return prediction.Choice(kind, rank, bits, 64, num_bytes)


def test_pairs_are_of_one_layer_and_count_standard_errors_window_by_window(prediction: Any) -> None:
    from first_order import Estimate

    rows = [{"layer": "a", "num_bytes": size} for size in (None, 1000, 1029, 1031)] + [{"layer": "b", "num_bytes": 1000}]
    base = torch.tensor([0.1, 0.5, 0.3, 0.9], dtype=torch.float64)  # windows differ much more than candidates do
    apart = torch.tensor([0.01, 0.03, 0.01, 0.03], dtype=torch.float64)
    found = [SimpleNamespace(loss=Estimate(base[:2], slope)) for slope in (base, base, base + apart, base, base, base)]
    first, second = prediction.equal_pairs(rows, found)
    assert (first["rows"], second["rows"]) == ([1, 2], [2, 3])
    # Mean 0.02, standard deviation 0.02 / √3, of four windows.
    assert first["errors_apart"] == pytest.approx(0.02 / (0.02 / 3**0.5 / 2))


def test_layers_are_of_all_types_in_turn_and_of_different_blocks(prediction: Any) -> None:
    layers = [SimpleNamespace(kind=kind, block=block) for block in range(6) for kind in ("q", "k", "fc")]
    chosen = prediction.choose_layers(layers, 7, seed=0)
    assert [layer.kind for layer in chosen] == ["q", "k", "fc", "q", "k", "fc", "q"]
    assert len({layer.block for layer in chosen if layer.kind == "q"}) == 3
    assert len(prediction.choose_layers(layers, 99, seed=0)) == len(layers)


def losses_of(prediction: Any) -> Any:
    """A layer whose rounding costs three times as much with its slope, and its truncation other amounts each way."""
    from lord_quant.losses.probe import FactorNoise, LayerLoss

    tail = torch.linspace(1, 0, 129, dtype=torch.float64)
    noise = FactorNoise(64, {2: 0.1, 3: 0.02, 4: 0.005}, 0.9)
    fisher = LayerLoss(tail, 5 * tail, {2: 0.5, 3: 0.1, 4: 0.02}, {32: 0.8, 64: 1.0}, 64, noise, noise, {"pivoted": 1.5})
    steeper = noise._replace(by_bits={bits: 3 * share for bits, share in noise.by_bits.items()})
    counted = fisher._replace(dense={bits: 3 * loss for bits, loss in fisher.dense.items()}, down=steeper, up=steeper)
    return prediction.Losses(fisher, (2 * tail).tolist(), counted)


def test_plans_count_the_slope_in_truncation_and_in_rounding(prediction: Any) -> None:
    losses = losses_of(prediction)
    dense = losses.of(choice(prediction, "dense", 3, 1000, None))
    assert dense == pytest.approx({"predicted": 0.1, "crossed": 0.1, "sloped": 0.3})
    cut = losses.of(prediction.Choice("truncation", 32, 16, 32, None))
    assert cut == pytest.approx({"predicted": 0.75, "crossed": 1.5, "sloped": 3.75})
    both = losses.of(choice(prediction, "pivoted", 3, 1000))
    rounded = both["predicted"] - 0.5
    assert rounded == pytest.approx(1.5 * 0.04 * 0.5)
    assert both == pytest.approx({"predicted": 0.5 + rounded, "crossed": 1 + rounded, "sloped": 2.5 + 3 * rounded})


def test_what_was_measured_before_is_kept_for_the_same_compressions_alone(prediction: Any) -> None:
    values = iter(range(100))
    measured = [{name: float(next(values)) for name in prediction.FIGURES} for _ in range(3)]
    single = {"layer": "h.0.fc", **choice(prediction, "dense", 3, 1000, None)._asdict()}
    group = {"what": "rounded", "group": "block 0", "by": "block", "layers": 4}
    rows = [single | {"predicted": 1.0}, single | {"bits": 2, "predicted": 2.0}, group | {"predicted": 3.0}]
    earlier = {
        "rows": [row | own for row, own in zip(rows[:2], measured, strict=False)],
        "together": [rows[2] | measured[2]],
    }
    again = [prediction.Case(row | {"predicted": 9.0}, []) for row in rows]
    assert prediction.measured_before(again, earlier) == measured
    for other in (again[:2], again[::-1], [again[0]._replace(row=single | {"rank": 64}), *again[1:]]):
        with pytest.raises(SystemExit, match="other compressions"):
            prediction.measured_before(other, earlier)
