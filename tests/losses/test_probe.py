# SPDX-License-Identifier: Apache-2.0
"""What a layer would lose: truncation against a float64 oracle, rounding against real solves of the whole layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from layer_problems import F64, layer_of

from lord_quant.config import GptqConfig, JointConfig
from lord_quant.errors import NumericsError
from lord_quant.losses import probe as probing
from lord_quant.losses.crossfit import Half
from lord_quant.losses.probe import LayerLoss, probe
from lord_quant.moments import Moments, PairedMoments
from lord_quant.rounding.solver import Gptq, Solver, Solvers, exact
from lord_quant.rounding.stack_forms import Objective, Polished, stack_two_factor
from lord_quant.rounding.two_sided import round_rows
from lord_quant.sensitivity import Steepness
from lord_quant.sizes.layer_bytes import Packing
from lord_quant.stack import stack_layer
from lord_quant.truncation import truncate, unit_metric, weigh


GPTQ, OPTIONS = GptqConfig(), JointConfig()


def problem(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, Moments, torch.Tensor]:
    """A weight, moments of its inputs with a mean, and sensitivities of its outputs, all in float64."""
    weight, covariance = (tensor.double() for tensor in layer_of(m, n, seed))
    generator = torch.Generator().manual_seed(seed + 1)
    mean = torch.randn(n, generator=generator, dtype=F64)
    gradients = torch.randn(4 * m, m, generator=generator, dtype=F64) * torch.logspace(-2, 0, m, dtype=F64)
    return weight, Moments(mean, covariance, 6 * n), 1e-3 * gradients.T @ gradients / len(gradients)


def run(weight: torch.Tensor, moments: Moments, sensitivity: torch.Tensor | None, **changes: Any) -> LayerLoss:
    settings: dict[str, Any] = {"has_bias": True, "gptq": GPTQ, "options": OPTIONS, "num_labels": None} | changes
    half = Half(moments, sensitivity, num_labels=settings.pop("num_labels"))
    return probe(weight, (half, half), **settings)


def cost(error: torch.Tensor, hessian: torch.Tensor, sensitivity: torch.Tensor) -> float:
    """½ tr G D H Dᵀ."""
    return 0.5 * float((sensitivity @ error @ hessian * error).sum())


def metric_of(sensitivity: torch.Tensor) -> torch.Tensor:
    """The metric that is used: damped, but of the size of G."""
    damped = unit_metric(sensitivity)
    assert damped is not None
    return damped * sensitivity.diagonal().mean()


def root_of(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


@pytest.mark.parametrize(("m", "n"), [(96, 64), (64, 96)])
def test_the_tail_is_what_the_best_approximation_of_each_rank_loses(m: int, n: int) -> None:
    weight, moments, sensitivity = problem(m, n)
    tail = run(weight, moments, sensitivity).tail
    metric, hessian = metric_of(sensitivity), moments.covariance
    left, right = root_of(metric), root_of(hessian)
    u, values, vt = torch.linalg.svd(left @ weight @ right)
    assert tail.shape == (min(m, n) + 1,) and tail[-1] == 0
    for rank in (0, 1, 17, 40, min(m, n)):
        best = torch.linalg.solve(left, (u[:, :rank] * values[:rank]) @ torch.linalg.solve(right, vt[:rank].T).T)
        expected = cost(best - weight, hessian, metric)
        assert float(tail[rank]) == pytest.approx(expected, rel=1e-8, abs=1e-12 * float(tail[0]))


@pytest.mark.parametrize("num_labels", [None, 100])
@pytest.mark.parametrize("has_bias", [True, False])
def test_dense_noise_is_that_of_real_solves(has_bias: bool, num_labels: int | None) -> None:
    """Solves believe in the metric of few labels as a run does; what they lose is measured in the one that was seen."""
    weight, moments, sensitivity = problem(64, 128)
    found = run(weight, moments, sensitivity, has_bias=has_bias, num_labels=num_labels)
    believed = unit_metric(sensitivity, None if num_labels is None else 2 * num_labels)
    hessian = moments.covariance if has_bias else moments.covariance + torch.outer(moments.mean, moments.mean)
    metric = metric_of(sensitivity)
    for bits, group_size in ((2, 64), (3, 64), (4, 64), (3, 32), (3, 128)):
        solve = Polished(solver(bits, group_size), OPTIONS.refine)
        rounded = round_rows(solve, weight, hessian, believed).weight()
        assert found.of_dense(bits, group_size) == pytest.approx(cost(rounded - weight, hessian, metric), rel=1e-9)
    assert found.of_dense(2, 64) > 2 * found.of_dense(3, 64) > 4 * found.of_dense(4, 64) > 100 * found.of_dense(8, 64)
    assert found.of_dense(4, 32) < found.of_dense(4, 64)
    assert set(found.groups) == {32, 64, 128} and found.group_size == 64


@pytest.mark.parametrize(("has_bias", "mean_correction"), [(True, True), (False, True), (False, False)])
def test_orders_are_those_of_real_errors(has_bias: bool, mean_correction: bool) -> None:
    """By either half's slope, about the mean where a bias takes it up, and in the metric; of factors beyond truncation."""
    weight, moments, sensitivity = problem(128, 128)
    generator = torch.Generator().manual_seed(2)
    slopes = [
        Steepness(torch.randn(128, 128, generator=generator, dtype=F64), torch.randn(128, generator=generator, dtype=F64))
        for _ in range(2)
    ]
    first, second = (Half(moments, sensitivity, slope) for slope in slopes)
    settings: dict[str, Any] = {"has_bias": has_bias, "mean_correction": mean_correction, "gptq": GPTQ, "options": OPTIONS}
    found = probe(weight, (first, second), **settings)
    believed, raw = unit_metric(sensitivity), moments.covariance + torch.outer(moments.mean, moments.mean)

    def of(error: torch.Tensor, mended: bool, beyond: float | None = None) -> torch.Tensor:
        """What it costs: slope in W, and in a bias that moves by −D μ; second order; chance."""
        moved = -error @ moments.mean if mended else torch.zeros(128, dtype=F64)
        rises = [float((slope.weight * error).sum() + slope.bias @ moved) for slope in slopes]
        own = cost(error, moments.covariance if mended else raw, metric_of(sensitivity))
        return torch.tensor([*rises, own if beyond is None else beyond, own], dtype=F64)

    solves = [Polished(solver(bits, 64), OPTIONS.refine) for bits in (2, 3, 4)]
    hessian = moments.covariance if has_bias else raw
    errors = [round_rows(solve, weight, hessian, believed).weight() - weight for solve in solves]
    dense = torch.stack([of(error, has_bias) for error in errors]).sum(dim=0)
    assert found.dense_orders == pytest.approx(tuple(dense.tolist()), rel=1e-9)

    mended = has_bias or mean_correction
    hessian = moments.covariance if mended else raw
    factors = truncate(weigh(weight, believed), hessian, 64)[1]
    cut, orders = cost(factors.product() - weight, hessian, metric_of(sensitivity)), torch.zeros(4, dtype=F64)
    for solve in solves:
        for pair in (Solvers(solve, exact), Solvers(exact, solve)):
            made = stack_two_factor(Objective(weight, hessian, believed), factors, pair, OPTIONS, 0)
            product = made[".up"].weight() @ made[".down"].weight()
            lost = cost(product - weight, hessian, metric_of(sensitivity)) - cut
            orders += of(product - factors.product(), mended, lost)
    assert found.factor_orders == pytest.approx(tuple(orders.tolist()), rel=1e-6)


def test_some_rows_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments, sensitivity = problem(512, 64)
    whole = run(weight, moments, sensitivity)
    monkeypatch.setattr(probing, "ROWS", 256)
    some = run(weight, moments, sensitivity)
    for bits in (2, 3, 4):
        assert some.dense[bits] == pytest.approx(whole.dense[bits], rel=0.2) and some.dense[bits] != whole.dense[bits]
    # Twice what half of the layer was seen to lose has four times its variance.
    assert some.dense_orders.chance == pytest.approx(2 * some.dense_orders.second)
    assert whole.dense_orders.chance == whole.dense_orders.second


def real_loss(
    weight: torch.Tensor, moments: Moments, metric: torch.Tensor, rank: int, solvers: Solvers, form: str = "two_factor"
) -> float:
    """What a real stack loses, in nats per token."""
    paired = PairedMoments(moments.mean, moments.mean, moments.covariance, moments.covariance, moments.num_tokens)
    stacked = stack_layer(weight, None, paired, rank, form, solvers, OPTIONS, metric=unit_metric(metric), seed=3)
    assert stacked.factors is not None
    return cost(stacked.factors.product() - weight, moments.covariance, metric_of(metric))


def solver(bits: int, group_size: int = 64) -> Solver:
    return Gptq(dataclasses.replace(GPTQ, bits=bits), group_size, 1)


@pytest.mark.parametrize(("m", "n"), [(256, 128), (128, 256)])
def test_factor_noise_is_that_of_real_stacks(m: int, n: int) -> None:
    """At half rank: of both factors together, from probes that rounded one at a time."""
    weight, moments, sensitivity = problem(m, n)
    found = run(weight, moments, sensitivity, seed=3)
    tail = float(found.tail[64])
    for bits, up_bits in ((4, 4), (3, 3), (2, 3), (4, 3), (2, 4)):
        real = real_loss(weight, moments, sensitivity, 64, Solvers(solver(bits), solver(up_bits)))
        assert found.of_factors(64, Packing(bits, 64), Packing(up_bits, 64)) == pytest.approx(real - tail, rel=0.2)
    wide, usual, float_ = Packing(3, 128), Packing(3, 64), Packing(16, 64)
    down, up = found.of_factors(64, usual, float_), found.of_factors(64, float_, usual)
    assert found.of_factors(64, wide, usual) == pytest.approx(found.groups[128] * down + up)
    assert found.of_factors(64, usual, wide) == pytest.approx(down + found.groups[128] * up)


def test_factor_noise_follows_the_rank() -> None:
    weight, moments, sensitivity = problem(256, 256)
    found = run(weight, moments, sensitivity, seed=3)
    assert found.down is not None and found.up is not None
    assert found.down.rank == 128 and -1 <= found.down.slope < 1 < found.up.slope <= 2
    for rank in (64, 192):
        real = real_loss(weight, moments, sensitivity, rank, Solvers(solver(3), solver(3)))
        guess = found.of_factors(rank, Packing(3, 64), Packing(3, 64))
        assert guess == pytest.approx(real - float(found.tail[rank]), rel=0.35)
    assert found.of_factors(128, Packing(16, 64), Packing(16, 64)) == 0 == found.of_dense(16, 64)


@pytest.mark.parametrize(("m", "n", "suiting"), [(256, 128, ["pivoted", "column_pivoted"]), (128, 256, ["pivoted"])])
def test_noise_of_pivoted_forms_is_that_of_real_ones_or_assumed(
    m: int, n: int, suiting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moments, sensitivity = problem(m, n)
    found = run(weight, moments, sensitivity, seed=3)
    tail, both = float(found.tail[64]), Solvers(solver(3), solver(3))
    two, *ones = (real_loss(weight, moments, sensitivity, 64, both, form) - tail for form in ("two_factor", *suiting))
    assert list(found.pivoted) == suiting
    assert list(found.pivoted.values()) == pytest.approx([one / two for one in ones], rel=1e-6)
    assert 2 not in found.pivoted.values()
    monkeypatch.setattr(probing, "PIVOTED_SIZE", 256 * 128 - 1)
    assert run(weight, moments, sensitivity, seed=3).pivoted == dict.fromkeys(suiting, 2)


def test_units_are_nats_and_do_not_depend_on_those_of_activations() -> None:
    weight, moments, sensitivity = problem(64, 64)
    one = run(weight, moments, sensitivity)
    other = run(weight / 8, moments._replace(mean=8 * moments.mean, covariance=64 * moments.covariance), sensitivity)
    torch.testing.assert_close(one.tail, other.tail, rtol=1e-9, atol=0)
    doubled = run(weight, moments, 2 * sensitivity)
    torch.testing.assert_close(doubled.tail, 2 * one.tail, rtol=1e-9, atol=0)
    assert doubled.dense[3] == pytest.approx(2 * one.dense[3], rel=1e-9)


def test_without_sensitivities_all_outputs_count_alike() -> None:
    weight, moments, _ = problem(64, 64)
    energy = 0.5 * float((weight @ moments.covariance * weight).sum())
    assert float(run(weight, moments, None).tail[0]) == pytest.approx(energy)


def test_a_layer_the_loss_does_not_depend_on_loses_nothing() -> None:
    weight, moments, sensitivity = problem(64, 64)
    found = run(weight, moments, 0 * sensitivity)
    assert (
        not found.tail.any()
        and set(found.dense.values()) == {0.0}
        and found.of_factors(32, Packing(2, 32), Packing(2, 32)) == 0
    )


def test_factors_without_a_bias_must_reproduce_the_mean() -> None:
    weight, moments, sensitivity = problem(64, 64)
    centred, raw = (run(weight, moments, sensitivity, has_bias=False, mean_correction=flag) for flag in (True, False))
    assert float(raw.tail[0]) > 1.05 * float(centred.tail[0]) and raw.dense == centred.dense


def test_noise_of_factors_is_told_in_groups_of_the_usual_size() -> None:
    """Also where the rank leaves room for groups of 32 alone, in which it was measured."""
    weight, moments, sensitivity = problem(48, 128)
    found = run(weight, moments, sensitivity, seed=3)
    assert found.group_size == 64 and found.groups[32] < 1 and found.down is not None and found.down.rank == 32
    metric, packed, float_ = unit_metric(sensitivity), Packing(3, 32), Packing(16, 32)
    factors = truncate(weigh(weight, metric), moments.covariance, 32)[1]
    rounding = Polished(solver(3, 32), OPTIONS.refine)
    for solvers, packings in ((Solvers(rounding, exact), (packed, float_)), (Solvers(exact, rounding), (float_, packed))):
        made = stack_two_factor(Objective(weight, moments.covariance, metric), factors, solvers, OPTIONS, 3)
        error = made[".up"].weight() @ made[".down"].weight() - weight
        real = cost(error, moments.covariance, metric_of(sensitivity)) - float(found.tail[32])
        assert found.of_factors(32, *packings) == pytest.approx(real, rel=1e-6)


def test_layers_too_small_for_a_rank_have_no_factors() -> None:
    weight, moments, sensitivity = problem(16, 64)
    found = run(weight, moments, sensitivity)
    assert found.down is None and found.up is None and found.tail.shape == (17,)


def test_singular_moments_are_survived_and_nan_is_named() -> None:
    weight, moments, sensitivity = problem(64, 64)
    silent = moments._replace(covariance=0 * moments.covariance)
    found = run(weight, silent, sensitivity)
    assert not found.tail.any() and set(found.dense.values()) == {0.0}
    assert found.of_factors(32, Packing(3, 32), Packing(3, 32)) == 0
    with pytest.raises(NumericsError, match="sensitivity"):
        run(weight, moments, sensitivity * torch.nan)
    weight[0, 0] = torch.inf
    with pytest.raises(NumericsError, match="weight"):
        run(weight, moments, sensitivity)
