# SPDX-License-Identifier: Apache-2.0
"""Inputs and units that are hard on the joint stack, with the real solver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_problems import FORMS, moments_of, problem, product, run

from lord_quant.config import GptqConfig, JointConfig
from lord_quant.rounding.solver import Gptq
from lord_quant.stack import stack_layer


def hard(kind: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs in both streams, float32."""
    p = problem(1, n, tokens=4 * n)
    x, y = p.x.clone(), p.y.clone()
    for rows in (x, y):
        if kind == "duplicated channels":
            rows[:, 1::2] = rows[:, ::2]
        elif kind == "dead channels":
            rows[:, ::3] = 0
        elif kind == "a loud channel":
            rows[:, 5] *= 1e4
        elif kind == "no variance":
            rows[:] = rows[0].round()
        elif kind == "silence":
            rows[:] = 0
    if kind == "few tokens":
        x, y = x[: n // 4], y[: n // 4]
    if kind == "dead only in the compressed stream":
        y[:, ::3] = 0
    return x.float(), y.float()


HARD = [
    "few tokens",
    "duplicated channels",
    "dead channels",
    "a loud channel",
    "no variance",
    "silence",
    "dead only in the compressed stream",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n"), [(96, 64), (64, 96)])
@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs_are_survived(kind: str, m: int, n: int, form: str) -> None:
    x, y = hard(kind, n)
    moments = moments_of(x, y, torch.float32)
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    solve = Gptq(GptqConfig(bits=4), 32, len(x))
    full = min(m - 32 * (form == "pivoted"), n - 32 * (form == "column_pivoted"))
    for rank in (32, full):
        result = stack_layer(weight, None, moments, rank, form, solve, JointConfig())
        assert result.factors is not None and result.bias is not None
        factors = result.factors
        assert factors.down.shape == (rank, n - rank * (form == "column_pivoted"))
        assert factors.up.shape == (m - rank * (form == "pivoted"), rank)
        assert all(torch.isfinite(tensor).all() for tensor in (product(result), result.bias))
        assert 0 <= result.error <= 1
        assert result.error < result.spectrum.discarded_share(rank) + 0.05
        if kind in ("no variance", "silence"):
            assert result.error == 0
        for item in result.quantized.values():
            assert item.codes.min() >= 0 and item.codes.max() <= 15 and torch.equal(item.codes, item.codes.round())
            assert torch.equal(item.scales, item.scales.half().float()) and (item.scales > 0).all()
        expected = x.mean(0) @ weight.T
        found = y.mean(0) @ product(result).T + result.bias
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()) + 1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"bits": 4, "desc_act": True}, 0.01),
        ({"bits": 4, "sym": True, "mse": 0.0}, 0.012),
        ({"bits": 4, "act_group_aware": False}, 0.01),
        ({"bits": 8}, 5e-5),
        ({"bits": 3}, 0.04),
        ({"bits": 2}, 0.15),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_every_setting_of_the_solver_serves_both_forms(settings: dict[str, Any], bound: float, form: str) -> None:
    """Rows of a pivoted `down` are solved in parts; they must agree on groups and come back to their places."""
    p = problem(96, 64)
    moments = moments_of(p.x, p.y, torch.float32)
    solve = Gptq(GptqConfig(**settings), 32, len(p.x))
    result = stack_layer(p.weight.float(), p.bias.float(), moments, 32, form, solve, JointConfig())
    assert result.spectrum is not None
    assert 0 < result.error - result.spectrum.discarded_share(32) < bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("loudness", "size"), [(1e-6, 1.0), (1e12, 1.0), (1e4, 1e-3)])
def test_units_of_weights_and_activations_do_not_matter(loudness: float, size: float, form: str) -> None:
    p = problem(64, 64)
    solve, errors = Gptq(GptqConfig(bits=4), 32, len(p.x)), []
    for units, factor in ((1.0, 1.0), (loudness, size)):
        moments = moments_of(p.x * units, p.y * units, torch.float32)
        result = stack_layer((p.weight * factor).float(), None, moments, 32, form, solve, JointConfig())
        errors.append(result.error)
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mean_correction", [True, False])
def test_one_token_is_reproduced(mean_correction: bool, form: str) -> None:
    p = problem(96, 64, tokens=1)
    moments = moments_of(p.x, p.y, torch.float32)
    solve = Gptq(GptqConfig(bits=4), 32, 1)
    result = stack_layer(p.weight.float(), None, moments, 32, form, solve, JointConfig(), mean_correction=mean_correction)
    wanted = p.x @ p.weight.T
    found = p.y @ product(result).double().T + (0 if result.bias is None else result.bias.double())
    # Without a bias the one direction has to pass through damping and rounding.
    atol = (1e-4 if mean_correction else 0.05) * float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("form", FORMS)
def test_float64_statistics_with_the_real_solver(form: str) -> None:
    p = problem(96, 64)
    result = run(p, 32, form, Gptq(GptqConfig(bits=4), 32, len(p.x)), JointConfig())
    assert result.error < result.spectrum.discarded_share(32) + 0.05
