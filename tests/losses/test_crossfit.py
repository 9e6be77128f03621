# SPDX-License-Identifier: Apache-2.0
"""Cross-fitted truncation against losses written out rank by rank on the other half."""

from __future__ import annotations

import pytest
import torch
from layer_problems import F64, layer_of

from lord_quant.losses.crossfit import Half, crossed_tail
from lord_quant.moments import Moments
from lord_quant.sensitivity import Steepness
from lord_quant.truncation import truncate, unit_metric, weigh


def halves_of(m: int, n: int, num_labels: int | None = None) -> tuple[torch.Tensor, tuple[Half, Half]]:
    """A weight, and moments and sensitivities of two samples of the same text."""
    weight, covariance = (tensor.double() for tensor in layer_of(m, n, 0))
    generator = torch.Generator().manual_seed(1)
    root = torch.linalg.cholesky(covariance)
    found = []
    for _ in range(2):
        x = torch.randn(3 * n, n, generator=generator, dtype=F64) @ root.T + 1
        g = torch.randn(2 * m, m, generator=generator, dtype=F64) * torch.logspace(-2, 0, m, dtype=F64)
        centred = x - x.mean(0)
        moments = Moments(x.mean(0), centred.T @ centred / len(x), len(x))
        found.append(Half(moments, g.T @ g / len(g), num_labels=num_labels))
    return weight, (found[0], found[1])


def error_of(weight: torch.Tensor, fitted: Half, rank: int, centred: bool) -> torch.Tensor:
    """What the truncation to a rank changes."""
    shift = fitted.moments.mean
    seen = fitted.moments.covariance if centred else fitted.moments.covariance + torch.outer(shift, shift)
    metric = None if fitted.sensitivity is None else unit_metric(fitted.sensitivity, fitted.num_labels)
    return truncate(weigh(weight, metric), seen, rank)[1].product() - weight


def written_out(weight: torch.Tensor, fitted: Half, other: Half, rank: int, centred: bool) -> float:
    """What the truncation to a rank costs on the other half."""
    error = error_of(weight, fitted, rank, centred)
    away = other.moments.mean - (fitted.moments.mean if centred else 0)
    seen = other.moments.covariance + torch.outer(away, away)
    minded = torch.eye(len(weight), dtype=F64) if other.sensitivity is None else other.sensitivity
    return 0.5 * float((minded @ error @ seen * error).sum())


def first_order(weight: torch.Tensor, fitted: Half, other: Half, rank: int, centred: bool) -> float:
    """What it changes along the other half's slope, with the bias that goes with it."""
    error = error_of(weight, fitted, rank, centred)
    assert other.slope is not None
    shift = -error @ fitted.moments.mean if centred else torch.zeros(len(weight), dtype=F64)
    return float((other.slope.weight * error).sum() + other.slope.bias @ shift)


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("m", "n"), [(48, 32), (32, 48), (40, 40)])
def test_it_is_the_mean_of_what_either_half_loses_by_the_others_choice(m: int, n: int, centred: bool, fisher: bool) -> None:
    weight, (one, two) = halves_of(m, n)
    if not fisher:
        one, two = one._replace(sensitivity=None), two._replace(sensitivity=None)
    tail = crossed_tail(weight, (one, two), centred=centred)
    assert tail.shape == (min(m, n) + 1,) and tail[-1] == 0
    for rank in (1, 7, 16, min(m, n) - 1):
        expected = sum(written_out(weight, *pair, rank, centred) for pair in ((one, two), (two, one))) / 2
        assert float(tail[rank]) == pytest.approx(expected, rel=1e-6)


def test_each_half_chooses_in_the_metric_that_its_labels_can_be_believed_of() -> None:
    weight, (one, two) = halves_of(48, 32, num_labels=96)
    tail = crossed_tail(weight, (one, two), centred=True)
    expected = sum(written_out(weight, *pair, 16, True) for pair in ((one, two), (two, one))) / 2
    assert float(tail[16]) == pytest.approx(expected, rel=1e-6)
    assert float(tail[16]) < 0.99 * float(crossed_tail(weight, halves_of(48, 32)[1], centred=True)[16])


def test_other_text_loses_more_than_the_text_that_chose() -> None:
    weight, (one, two) = halves_of(48, 32)
    crossed, own = crossed_tail(weight, (one, two), centred=True), crossed_tail(weight, (one, one), centred=True)
    assert (crossed[4:-1] > own[4:-1]).all()


def test_a_layer_the_loss_does_not_depend_on_loses_nothing() -> None:
    weight, (one, _) = halves_of(48, 32)
    silent = one._replace(sensitivity=torch.zeros(48, 48, dtype=F64))
    assert not crossed_tail(weight, (silent, silent), centred=True).any()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("m", "n"), [(48, 32), (32, 48)])
def test_the_slope_of_the_other_half_adds_what_it_says_and_never_less_for_a_deeper_cut(
    m: int, n: int, centred: bool
) -> None:
    weight, flat = halves_of(m, n)
    generator = torch.Generator().manual_seed(3)
    found = []
    for half in flat:
        uphill = 1e-2 * torch.randn(m, n, generator=generator, dtype=F64)
        found.append(half._replace(slope=Steepness(uphill, torch.randn(m, generator=generator, dtype=F64) * 1e-3)))
    one, two = found
    added = crossed_tail(weight, (one, two), centred=centred) - crossed_tail(weight, flat, centred=centred)
    exact = [
        sum(first_order(weight, *pair, rank, centred) for pair in ((one, two), (two, one))) / 2
        for rank in range(1, min(m, n))
    ]
    expected = [max(0.0, *exact[at:]) for at in range(len(exact))]
    assert min(exact) < 0 < max(exact)  # else the rule would not be tried
    torch.testing.assert_close(added[1:-1], torch.tensor(expected, dtype=F64), rtol=1e-6, atol=1e-9)
    assert added[-1] == 0 and added[0] >= added[1]
