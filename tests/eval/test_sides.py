# SPDX-License-Identifier: Apache-2.0
"""What two-sided rounding saves: what is counted, and how it is summed up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lord_quant.moments import Moments
from lord_quant.sensitivity import Steepness
from lord_quant.targets import LinearSite, dense_weight


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import sides

    yield sides
    for name in ("sides", "bench", "provenance", "tables", "variants"):
        sys.modules.pop(name, None)


def layer(outputs: int = 128, inputs: int = 128) -> Any:
    from bench import Layer

    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(400, size, generator=generator) @ torch.randn(size, size, generator=generator)
            for size in (inputs, outputs))  # fmt: skip
    module = nn.Linear(inputs, outputs)
    moments = Moments(x.mean(0), torch.cov(x.T, correction=0), 400)
    slope = Steepness(torch.zeros(outputs, inputs), torch.zeros(outputs))
    return Layer(LinearSite("h.3.mlp.up", 3, inputs, outputs, True), module, moments, g.T @ g / 400, slope, 400)


def test_the_loss_is_that_of_the_other_half_in_nats(sides: Any) -> None:
    own = layer()
    made = nn.Linear(128, 128)
    error = (made.weight - dense_weight(own.module)).detach().double()
    expected = 0.5 * torch.trace(own.sensitivity.double() @ error @ own.moments.covariance.double() @ error.T)
    assert sides.loss_on(own, made) == pytest.approx(float(expected), rel=1e-4)
    assert sides.loss_on(own, own.module) == 0


def test_both_sides_save_on_the_text_that_chose(sides: Any) -> None:
    own = layer()
    rows = sides.compare(own, own, own, seed=0)
    assert [(row["form"], row["bits"]) for row in rows] == [(form, bits) for form in sides.FORMS for bits in sides.BITS]
    dense = [row["lost"] for row in rows if row["form"] == "dense"]
    assert all(lost["two-sided"] < 0.9 * lost["one-sided"] and lost["few"] == lost["two-sided"] for lost in dense)


def test_medians_are_over_layers_and_bits(sides: Any) -> None:
    rows = [
        {"layer": kind, "bits": bits, "kind": kind, "form": "dense", "lost": lost}
        for kind, bits, lost in (
            ("a", 2, {"one-sided": 2.0, "two-sided": 1.0, "few": 2.0}),
            ("a", 3, {"one-sided": 2.0, "two-sided": 1.4, "few": 2.0}),
            ("b", 2, {"one-sided": 2.0, "two-sided": 1.8, "few": 2.0}),
        )
    ]
    lines = {line["kind"]: line for line in sides.summarise(rows)}
    assert list(lines) == ["a", "b", "all"] and lines["all"]["n"] == 3
    assert lines["all"]["two-sided"] == {"median": 0.7, "min": 0.5, "max": 0.9}
    assert "0.60 (0.50 … 0.70)" in sides.table(sides.summarise(rows))


def test_forms_are_compared_at_the_same_layer_and_bits(sides: Any) -> None:
    lost = {("pivoted", 2): 8.0, ("pivoted", 3): 2.0, ("column_pivoted", 2): 2.0, ("column_pivoted", 3): 1.0}
    rows = [
        {"layer": "h.0.up", "kind": "up", "form": form, "bits": bits, "lost": {"one-sided": 10.0, "two-sided": value}}
        for (form, bits), value in lost.items()
    ]
    lines = {line["form"]: line for line in sides.summarise(rows) if line["kind"] == "up"}
    assert lines["pivoted"]["over pivoted"] is None
    assert lines["column_pivoted"]["over pivoted"] == {"median": 0.375, "min": 0.25, "max": 0.5}
