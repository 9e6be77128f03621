# SPDX-License-Identifier: Apache-2.0
"""Costs of first order against differences of measured losses; estimates against plain means and written-out errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_tokens, tiny_model

from lord_quant.targets import dense_bias, dense_weight, find_linears


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import first_order

    yield first_order
    for name in ("first_order", "bench"):
        sys.modules.pop(name, None)


def moved(lines: Any, model: Any, place: int, step: float, seed: int = 0) -> Any:
    """Returns a layer with all weights, and a bias it may not have had, moved at random."""
    site = find_linears(model)[place]
    layer, generator = model.get_submodule(site.name), torch.Generator().manual_seed(seed)
    weight, bias = dense_weight(layer), dense_bias(layer)
    made = torch.nn.Linear(site.in_features, site.out_features)
    with torch.no_grad():
        made.weight.copy_(weight + step * torch.randn(weight.shape, generator=generator))
        made.bias.copy_(step * torch.randn(len(weight), generator=generator) + (0 if bias is None else bias))
    return lines.Change(site, made)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # nn.Linear without a bias, Conv1D with one
def test_first_order_is_the_slope_of_the_measured_rise(lines: Any, kind: str) -> None:
    model, tokens, step = tiny_model(kind, torch.float32), random_tokens(), 2e-3
    bench = lines.Bench(model, tokens)
    for place in (1, 5):
        forth, back = (moved(lines, model, place, own) for own in (step, -step))
        rises = [bench.rise({change.site: change.module}).loss for change in (forth, back)]
        found = lines.first_order(model, tokens, [forth, back])
        assert found.shape == (len(tokens), 2)
        assert torch.allclose(found[:, 0], -found[:, 1], rtol=1e-3)
        central = (rises[0] - rises[1]) / 2  # no part of second order
        assert torch.allclose(found[:, 0], central, rtol=0.02, atol=0.02 * float(central.abs().max()))


def test_model_is_left_as_it_was(lines: Any) -> None:
    model, tokens = tiny_model("llama", torch.float32).requires_grad_(False), random_tokens()
    before = model(input_ids=tokens).logits
    lines.first_order(model, tokens, [moved(lines, model, 2, 0.1)])
    after = model(input_ids=tokens).logits
    assert torch.equal(before, after) and not after.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_costs_of_layers_changed_at_once_add_up_at_first_order(lines: Any) -> None:
    model, tokens = tiny_model("llama", torch.float32), random_tokens()
    one, other = moved(lines, model, 1, 0.02), moved(lines, model, 8, 0.02, seed=1)
    found = list(lines.measure(model, tokens, 1, [[one], [other], [one, other]]))
    assert torch.allclose(found[2].loss.slope, found[0].loss.slope + found[1].loss.slope)
    assert all(len(each.loss.slope) == len(tokens) and len(each.divergence) == 1 for each in found)


def test_estimate_of_all_windows_is_their_mean_with_its_error(lines: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    rise, slope = torch.randn(2, 12, dtype=torch.float64, generator=generator)
    estimate = lines.Estimate.of(rise, slope)
    assert estimate.mean == pytest.approx(float(rise.mean()))
    assert estimate.error == pytest.approx(float(rise.std()) / 12**0.5)


def test_estimates_of_few_windows_are_unbiased_and_err_as_said(lines: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    few, many, found, plain = 16, 128, [], []
    for _ in range(2000):
        slope = 3 + torch.randn(many, dtype=torch.float64, generator=generator)
        rest = 1 + 0.5 * (slope[:few] - 3) + 0.2 * torch.randn(few, dtype=torch.float64, generator=generator)
        rise = slope[:few] + rest
        estimate = lines.Estimate.of(rise, slope)
        found.append((estimate.mean, estimate.error))
        plain.append(float(rise.mean()))
    means, errors = torch.tensor(found).T
    true = (1 / many + (0.5**2 + 0.2**2) / few + 2 * 0.5 / many) ** 0.5
    assert float(means.mean()) == pytest.approx(4, abs=4 * true / 2000**0.5)
    assert float(means.std()) == pytest.approx(true, rel=0.06) and float(errors.mean()) == pytest.approx(true, rel=0.03)
    assert float(torch.tensor(plain).std()) > 2 * true


def test_differences_are_paired_by_window(lines: Any) -> None:
    base = torch.tensor([1.0, 5.0, 3.0, 9.0], dtype=torch.float64)
    apart = torch.tensor([0.1, 0.3, 0.1, 0.3], dtype=torch.float64)
    one, other = lines.Estimate(base[:2], base), lines.Estimate(base[:2], base + apart)
    found = other.less(one)
    assert found.mean == pytest.approx(0.2)
    assert found.error == pytest.approx(0.2 / 3**0.5 / 2)  # standard deviation 0.2 / √3, of four windows
