# SPDX-License-Identifier: Apache-2.0
"""GPTQ against the host's solver, against brute force, and on weights and Hessians that are hard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import F64, layer_of
from torch import nn

from lord_quant.backends.gptq import host
from lord_quant.config import GptqConfig
from lord_quant.errors import NumericsError
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.solver import SHRINKS, Gptq


GROUP = 32


def by_the_host(weight: torch.Tensor, hessian: torch.Tensor, gptq: GptqConfig, group_size: int) -> torch.Tensor:
    """GPTQModel's own solution, with as many steps in its search for scales as ours."""
    module = host()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    ours = {name: getattr(gptq, name) for name in ("bits", "sym", "desc_act", "damp_percent", "mse")}
    aware = gptq.act_group_aware and not gptq.desc_act
    solver = module.GPTQ(
        layer, module.QuantizeConfig(group_size=group_size, act_group_aware=aware, offload_to_disk=False, **ours)
    )
    solver.quantizer.configure(bits=gptq.bits, sym=gptq.sym, perchannel=True, grid=20, maxshrink=len(SHRINKS) / 20)
    solver.H = 2 * hessian
    solver.nsamples = solver._hessian_total_samples = 576
    solver.fasterquant(percdamp=gptq.damp_percent, group_size=group_size, actorder=gptq.desc_act)
    return layer.weight.detach()


def lost(found: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (found - weight).double()
    return float(((error @ hessian.double()) * error).sum())


def to_nearest(weight: torch.Tensor, solved: Quantized) -> torch.Tensor:
    """Round to nearest on the solver's own grid."""
    groups = solved.g_idx.long()
    scales, zeros = solved.scales[:, groups], solved.zeros[:, groups]
    return scales * ((weight / scales + zeros).round().clamp(0, 2**solved.bits - 1) - zeros)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_solver_beats_rounding_and_stays_on_its_grid(bits: int, desc_act: bool, sym: bool) -> None:
    gptq = GptqConfig(bits=bits, sym=sym, desc_act=desc_act)
    weight, hessian = layer_of(64, 96)
    before = weight.clone(), hessian.clone()
    solved = Gptq(gptq, GROUP, 576)(weight, hessian)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    assert solved.codes.shape == (64, 96) and solved.scales.shape == solved.zeros.shape == (64, 3)
    assert solved.g_idx.shape == (96,) and torch.equal(solved.g_idx.long().bincount(), torch.full((3,), 32))
    assert torch.equal(solved.g_idx.sort().values, solved.g_idx) == (not desc_act)
    assert solved.bits == bits and solved.loss is not None and solved.loss >= 0 and solved.seconds > 0
    assert solved.damp_percent == gptq.damp_percent
    for tensor in (solved.codes, solved.zeros):
        assert torch.equal(tensor, tensor.round()) and tensor.min() >= 0 and tensor.max() <= 2**bits - 1
    assert not sym or (solved.zeros == 2 ** (bits - 1)).all()
    assert torch.equal(solved.scales, solved.scales.half().float()) and (solved.scales > 0).all()
    reached = lost(solved.weight(), weight, hessian)
    assert reached < 0.9 * lost(to_nearest(weight, solved), weight, hessian)
    assert reached < lost(torch.zeros_like(weight), weight, hessian)


def test_asymmetric_grids_and_searched_scales_are_better() -> None:
    """With a Hessian that asks for nothing but small errors, which is all that the search for scales minimises."""
    weight, identity = layer_of(64, 64)[0], torch.eye(64)

    def error(**settings: Any) -> float:
        return lost(Gptq(GptqConfig(bits=3, **settings), GROUP, 576)(weight, identity).weight(), weight, identity)

    assert error(sym=False) < 0.95 * error(sym=True)
    assert error(mse=2.0) < 0.95 * error(mse=0.0)


def test_a_factor_in_the_hessian_and_the_count_of_tokens_change_nothing_but_the_loss() -> None:
    weight, hessian = layer_of(32, 64)
    one = Gptq(GptqConfig(), GROUP, 100)(weight, hessian)
    other = Gptq(GptqConfig(), GROUP, 7)(weight, 4 * hessian)
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("kind", ["zero", "dead channels", "singular"])
def test_the_solver_survives_singular_hessians(kind: str) -> None:
    weight, hessian = layer_of(32, 64)
    if kind == "zero":
        hessian.zero_()
    elif kind == "dead channels":
        hessian[::3] = 0
        hessian[:, ::3] = 0
    else:
        hessian = hessian[:, :4] @ torch.linalg.inv(hessian[:4, :4]) @ hessian[:4]
    solved = Gptq(GptqConfig(), GROUP, 100)(weight, hessian)
    assert torch.isfinite(solved.weight()).all()
    assert lost(solved.weight(), weight, hessian) <= 0.05 * lost(torch.zeros_like(weight), weight, hessian)


def test_groups_of_zeros_and_of_next_to_nothing_stay_finite() -> None:
    weight, hessian = layer_of(32, 64)
    hessian = torch.block_diag(hessian[:32, :32], hessian[32:, 32:])  # no errors come over from the other group
    weight[:, :32], weight[3, 32:] = 0, 1e-12
    solved = Gptq(GptqConfig(), GROUP, 100)(weight, hessian)
    assert (solved.scales > 0).all() and torch.isfinite(solved.weight()).all()
    assert not solved.weight()[:, :32].any() and solved.weight()[3].abs().max() < 1e-3


def test_weights_beyond_float16_scales_are_an_error() -> None:
    weight, hessian = layer_of(32, 64)
    with pytest.raises(NumericsError, match="scales stored as float16"):
        Gptq(GptqConfig(), GROUP, 100)(weight * 1e7, hessian)


SETTINGS = [{}, {"sym": True}, {"desc_act": True}, {"act_group_aware": False}, {"mse": 0.0}, {"mse": 2.4}]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_loses_what_the_hosts_solver_loses(bits: int, settings: dict[str, Any]) -> None:
    """With groups of 128; of smaller ones the host chooses some scales for weights that are out of date."""
    gptq = GptqConfig(bits=bits, **settings)
    ours = theirs = 0.0
    for seed in range(3):
        weight, hessian = layer_of(128, 256, seed)
        ours += lost(Gptq(gptq, 128, 576)(weight, hessian).weight(), weight, hessian)
        theirs += lost(by_the_host(weight, hessian, gptq, 128), weight, hessian)
    assert ours == pytest.approx(theirs, rel=0.01)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 1000), st.booleans(), st.sampled_from([2, 3, 4, 8]))
def test_every_step_is_the_best_answer_to_those_before(m: int, n: int, seed: int, desc_act: bool, bits: int) -> None:
    """The definition, the slow way: with some columns fixed, the optimum of all others by a solve of its own."""
    weight, hessian = (tensor.double() for tensor in layer_of(m, n, seed))
    solved = Gptq(GptqConfig(bits=bits, desc_act=desc_act, act_group_aware=False), GROUP, 1)(weight, hessian)
    metric = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(n, dtype=F64)
    order = metric.diagonal().argsort(descending=True, stable=True) if desc_act else torch.arange(n)
    groups = solved.g_idx.long()
    wanted, cost = weight.clone(), torch.zeros((), dtype=F64)
    for position, column in enumerate(order):
        scale, zero = solved.scales[:, groups[column]], solved.zeros[:, groups[column]]
        code = (wanted[:, column] / scale + zero).round().clamp(0, 2**bits - 1)
        assert torch.equal(code, solved.codes[:, column])
        done, rest = order[: position + 1], order[position + 1 :]
        moved = solved.weight()[:, done] - weight[:, done]
        wanted = weight.clone()
        wanted[:, done] += moved
        wanted[:, rest] -= torch.linalg.solve(metric[rest][:, rest], metric[rest][:, done] @ moved.T).T
    error = solved.weight() - weight
    cost = ((error @ metric) * error).sum() * hessian.diagonal().mean()
    assert solved.loss == pytest.approx(float(cost), rel=1e-8)


def test_short_last_groups_are_legal() -> None:
    weight, hessian = layer_of(16, 80)
    for setting in SETTINGS:
        solved = Gptq(GptqConfig(**setting), GROUP, 1)(weight, hessian)
        assert solved.g_idx.long().bincount().tolist() == [32, 32, 16]
        assert lost(solved.weight(), weight, hessian) < 0.02 * lost(torch.zeros_like(weight), weight, hessian)


def test_damping_rises_until_there_is_a_factor() -> None:
    weight, hessian = layer_of(8, 32)
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -0.05 * values.mean()  # no covariance at all: rounding of a nearly singular one, overdone
    solved = Gptq(GptqConfig(), GROUP, 1)(weight, vectors @ values.diag() @ vectors.T)
    assert solved.damp_percent == pytest.approx(0.08)
    with pytest.raises(NumericsError, match=r"stayed indefinite with damp_percent 0\.64"):
        Gptq(GptqConfig(), GROUP, 1)(weight, -hessian + 1.01 * hessian.trace() / 32 * torch.eye(32))


@pytest.mark.parametrize("which", ["weight", "Hessian"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(which: str, value: float) -> None:
    weight, hessian = layer_of(8, 32)
    (weight if which == "weight" else hessian)[3, 3] = value
    with pytest.raises(NumericsError, match=f"{which} to"):
        Gptq(GptqConfig(), GROUP, 1)(weight, hessian)


def test_half_precision_weights_are_solved_in_float32() -> None:
    weight, hessian = layer_of(16, 64)
    half = weight.bfloat16()
    solved = Gptq(GptqConfig(), GROUP, 1)(half, hessian)
    assert solved.codes.dtype == solved.scales.dtype == torch.float32
    again = Gptq(GptqConfig(), GROUP, 1)(half.float(), hessian)
    assert torch.equal(solved.codes, again.codes) and torch.equal(solved.scales, again.scales)
