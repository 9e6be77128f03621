# SPDX-License-Identifier: Apache-2.0
"""What one layer would lose: to truncation at any rank, and to rounding at any bit width.

The unit is the model's loss. An error D of a weight W (m, n) costs about ½ tr G D H Dᵀ nats per token, with H the second
moment of the inputs and G that of the loss's gradients at the outputs (`sensitivity.py`). With G scaled to a mean diagonal
of 1, as `truncation.unit_metric` does, that is `unit` · tr G D H Dᵀ, unit = ½ mean diag G.

Truncation is exact: the best rank-r approximation loses the eigenvalues after the r-th; one decomposition serves every
rank. What that is on other text is `crossfit.py`'s.

Rounding has no formula that could be trusted, so a few real solves stand for all. The dense layer, or of a tall one some of
its rows, solved at 2, 3 and 4 bits and at 3 bits in other groups, tells the noise of every bit width and group size, taken
as a product of the two. Factors are made at half rank, and each is rounded alone at 2, 3 and 4 bits, the other left
in float but given its optimum, as in the real stack; at 3/4 of the rank, at 3 bits, once more. What is lost beyond
truncation, relative to the energy kept, is taken to add up over both factors, to follow a power of the rank (usually about
1/r: solvers make more of many channels than of few), and to go with groups as the dense layer's noise does. The pivoted
forms that suit the layer's shape are rounded once, at half rank and 3 bits, which tells how much noisier they are than two
factors. All are rounded in the metric that a run would believe in, and measured in the one that was seen.

What rounding moves the text's own loss by at first order is told apart, for `steepness.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lord_quant.config import FLOAT_BITS, GptqConfig, JointConfig
from lord_quant.decompose import Factors, output_spectrum
from lord_quant.halves import energy
from lord_quant.linalg import relative_error, require_finite
from lord_quant.losses.crossfit import Half, crossed_tail
from lord_quant.moments import merged
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.solver import Gptq, Solver, Solvers, exact
from lord_quant.rounding.stack_forms import Objective, Polished, stack_factors, two_factor_stages
from lord_quant.rounding.two_sided import round_each, round_rows
from lord_quant.sensitivity import Steepness
from lord_quant.sizes.layer_bytes import PACK_MULTIPLE, Packing, pivoted_forms
from lord_quant.truncation import factors_of, in_form, unit_metric, weigh


ROWS = 2048
"""Most rows of a weight that are solved for its noise; what others would take back is not seen then."""
PROBED_BITS = (2, 3, 4)
PROBED_GROUPS = (32, 64, 128)
PROBED_RANKS = (1 / 2, 3 / 4)
"""Ranks at which factors are rounded, as parts of the whole; the second for the slope alone."""
GROUP_BITS = 3
"""Bits at which group sizes are compared."""
PIVOTED_NOISE = 2.0
"""What pivoted forms are taken to lose by rounding, relative to two factors, where choosing pivots for a probe would take
too long. Where it was measured it was 0.6 to 6 times."""
PIVOTED_SIZE = 2**21
"""Most weights of a layer for which pivots are chosen."""
SLOPES = (-1.0, 2.0)
"""Powers of the rank with which noise is believed to fall."""
FINER = 256.0
"""How much less noise 8 bits make than 4: a step 16 times finer, squared."""


class FactorNoise(NamedTuple):
    """Loss of rounding one factor, relative to the energy kept.

    Attributes:
        rank: Rank at which it was measured.
        by_bits: Share lost there, by bits.
        slope: Power of the rank with which it falls.
    """

    rank: int
    by_bits: dict[int, float]
    slope: float

    def at(self, rank: int) -> float:
        """Returns the share lost at another rank, relative to that at `self.rank`."""
        return (self.rank / rank) ** self.slope


class Orders(NamedTuple):
    """What rounding loses, over all bit widths that were probed, in nats per token.

    Attributes:
        one: At first order, ⟨slope of the loss, error⟩, by the slope of one half of the text.
        other: By that of the other half.
        second: At second order, in the metric.
        chance: 2 · chance / N is the variance of the first order, by a slope of N tokens: `second` of the very errors whose
            first order was taken, if that is not more than their part of the layer.
    """

    one: float
    other: float
    second: float
    chance: float


NOTHING = Orders(0.0, 0.0, 0.0, 0.0)


class LayerLoss(NamedTuple):
    """What compressing a layer costs; in nats per token but for what is relative.

    Attributes:
        tail: Loss of truncation at rank 0, 1, …, k = min(m, n), float64, with shape (k + 1,), falling to 0.
        cut: The same on text on which the truncation was not chosen.
        dense: Loss of rounding the dense layer, by bits, in groups of `group_size`.
        groups: Noise in groups of other sizes, relative to those of `group_size`.
        group_size: Group size of the probes.
        down: Loss of rounding the first factor alone; None where no rank is legal.
        up: That of the second, likewise.
        pivoted: Loss of rounding in the pivoted forms that suit its shape, relative to two factors of the same rank and
            bits, by form.
        dense_orders: Of rounding the dense layer, what is of first order and what of second.
        factor_orders: Likewise of either factor.
    """

    tail: torch.Tensor
    cut: torch.Tensor
    dense: dict[int, float]
    groups: dict[int, float]
    group_size: int
    down: FactorNoise | None
    up: FactorNoise | None
    pivoted: dict[str, float]
    dense_orders: Orders = NOTHING
    factor_orders: Orders = NOTHING

    def of_dense(self, bits: int, group_size: int) -> float:
        """Returns the loss of a layer that stays dense."""
        return noise_at(self.dense, bits) * self.groups[group_size]

    def of_factors(self, rank: int, down: Packing, up: Packing) -> float:
        """Returns the loss of rounding two factors, without that of their truncation."""
        if self.down is None or self.up is None or rank == 0:
            return 0.0
        share = sum(
            noise_at(noise.by_bits, packing.bits) * noise.at(rank) * self.groups[packing.group_size]
            for noise, packing in ((self.down, down), (self.up, up))
        )
        return share * float(self.tail[0] - self.tail[rank])


def noise_at(by_bits: Mapping[int, float], bits: int) -> float:
    """Reads noise at any bit width."""
    if bits == FLOAT_BITS:
        return 0.0
    return by_bits[4] / FINER if bits == 8 else by_bits[bits]


def probe(
    weight: torch.Tensor,
    halves: tuple[Half, Half],
    *,
    has_bias: bool,
    mean_correction: bool = True,
    gptq: GptqConfig,
    options: JointConfig,
    seed: int = 0,
) -> LayerLoss:
    """Finds out what one layer would lose.

    Args:
        weight: W with shape (m, n).
        halves: Moments of its inputs in the dense model, sensitivities and slopes, of either half of the text. G with shape
            (m, m) is in nats² per unit of output²; zero for a layer the loss does not depend on, which loses nothing. None
            counts all outputs alike, with G = I: losses are squared output errors then.
        has_bias: Whether it has a bias.
        mean_correction: Whether its factors get one anyway.
        gptq: How it would be quantized; bits and group size are chosen here.
        options: How it would be stacked.
        seed: Of the choice of rows and of rotations.

    Raises:
        NumericsError: Something holds NaN or inf.
    """
    moments, sensitivity = merged(halves[0].moments, halves[1].moments), _mean_of(halves)
    covariance, mean = moments.covariance, moments.mean
    weight = weight.to(covariance)
    require_finite(weight, "weight")
    metric = None if sensitivity is None else unit_metric(sensitivity.to(weight))
    believed = None if sensitivity is None else unit_metric(sensitivity.to(weight), _labels_of(halves))
    unit = 0.5 * (1.0 if sensitivity is None else float(sensitivity.diagonal().double().mean()))
    del sensitivity  # as large as either metric
    seen = covariance if has_bias else covariance + torch.outer(mean, mean)  # a bias takes up errors of the mean
    fitting = [size for size in PROBED_GROUPS if weight.shape[1] % size == 0]
    usual = 64 if 64 in fitting else fitting[0]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(weight), generator=generator)[:ROWS].sort().values.to(weight.device)
    part, within, coupled = weight[rows], _between(rows, metric), _between(rows, believed if options.two_sided else None)

    def solver(bits: int, group_size: int) -> Solver:
        return Polished(Gptq(replace(gptq, bits=bits), group_size, moments.num_tokens), options.refine)

    slopes = halves[0].slope, halves[1].slope
    steep = [None if slope is None else Steepness(slope.weight[rows], slope.bias[rows]) for slope in slopes]

    def noise(quantized: Quantized) -> Orders:
        error = quantized.weight() - part
        one, other = (_first_order(slope, error, mean if has_bias else None) for slope in steep)
        second, scale = unit * energy(error, seen, within), len(weight) / len(part)
        return Orders(scale * one, scale * other, scale * second, scale**2 * second)

    rounded = round_each([solver(bits, usual) for bits in PROBED_BITS], part, seen, coupled)
    probed = {bits: noise(quantized) for bits, quantized in zip(PROBED_BITS, rounded, strict=True)}
    dense = {bits: orders.second for bits, orders in probed.items()}
    floor = torch.finfo(torch.float32).tiny  # of a layer that loses nothing
    finest = max(dense[GROUP_BITS], floor)

    def of_group(size: int) -> float:
        return noise(round_rows(solver(GROUP_BITS, size), part, seen, coupled)).second / finest

    groups = {size: 1.0 if size == usual else of_group(size) for size in fitting}
    if weight.shape[1] % 256 == 0:
        groups[256] = groups[128] * groups[128] / groups[64]
    joint = covariance if has_bias or mean_correction else seen
    weighed = weigh(weight, metric)
    spectrum, down, up, factored = output_spectrum(weighed.weight, joint), None, None, NOTHING
    pivoted = dict.fromkeys(pivoted_forms(weight.shape[1], weight.shape[0]), PIVOTED_NOISE)
    step = usual if min(weight.shape) >= usual else PACK_MULTIPLE
    if min(weight.shape) >= step:
        ranks = [min(max(1, round(part * min(weight.shape) / step)) * step, min(weight.shape)) for part in PROBED_RANKS]
        cuts = [factors_of(weighed, spectrum, rank) for rank in ranks]
        del weighed  # as large as weight and metric
        mended = mean if has_bias or mean_correction else None
        problem = _Problem(weight, joint, metric, believed, slopes, mended, spectrum.total(), unit, options, seed)
        once, again = (
            _rounded(problem, factors, {bits: solver(bits, step) for bits in widths}, groups[step])
            for factors, widths in zip(cuts, (PROBED_BITS, (GROUP_BITS,)), strict=True)
        )
        down, up = (
            FactorNoise(ranks[0], shares, _slope(ranks, shares[GROUP_BITS], others[GROUP_BITS]))
            for shares, others in zip(once[:2], again[:2], strict=True)
        )
        factored = once.orders
        pivoted = _pivoted_noise(problem, cuts[0], solver(GROUP_BITS, step), list(pivoted))
    values = spectrum.eigenvalues.double().cpu()
    tail = torch.cat((values.flip(0).cumsum(0).flip(0), values.new_zeros(1)))
    cut = crossed_tail(weight, halves, centred=has_bias or mean_correction)
    return LayerLoss(unit * tail, cut, dense, groups, usual, down, up, pivoted, _sum(probed.values()), factored)


def _sum(orders: Iterable[Orders]) -> Orders:
    return Orders(*map(sum, zip(NOTHING, *orders, strict=True)))


def _first_order(slope: Steepness | None, error: torch.Tensor, mean: torch.Tensor | None) -> float:
    """Returns what an error of a weight moves the text's loss by at first order; 0 where no slope was measured.

    Args:
        slope: Of the loss of that text.
        error: D with shape (m, n).
        mean: That of the inputs where a bias takes up errors of the mean, and moves by −D μ; None where there is none.
    """
    if slope is None:
        return 0.0
    moved = float((slope.weight.to(error) * error).sum())
    return moved if mean is None else moved - float(slope.bias.to(error) @ (error @ mean))


def _mean_of(halves: tuple[Half, Half]) -> torch.Tensor | None:
    """Returns the sensitivity of both halves, which are taken to be of equally many tokens."""
    first, second = (half.sensitivity for half in halves)
    return None if first is None or second is None else (first + second) / 2


def _labels_of(halves: tuple[Half, Half]) -> int | None:
    """Returns on how many tokens that mean was measured."""
    first, second = (half.num_labels for half in halves)
    return None if first is None or second is None else first + second


def _between(rows: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor | None:
    """Returns what couples a few of the outputs."""
    return None if metric is None else metric[rows[:, None], rows]


class _Problem(NamedTuple):
    """A layer whose factors are rounded.

    Attributes:
        weight: W with shape (m, n).
        covariance: H with shape (n, n).
        metric: G with shape (m, m), in which errors are measured; None where all outputs count alike.
        believed: G as a run is given it, with less of what couples outputs by chance; or None.
        slopes: Of either half's loss in W, where they were measured.
        mean: That of the inputs where a bias takes up errors of it; None where there is none.
        whole: What losing all of it would cost in that metric.
        unit: What that is in nats.
        options: How it is stacked.
        seed: Of rotations.
    """

    weight: torch.Tensor
    covariance: torch.Tensor
    metric: torch.Tensor | None
    believed: torch.Tensor | None
    slopes: tuple[Steepness | None, Steepness | None]
    mean: torch.Tensor | None
    whole: float
    unit: float
    options: JointConfig
    seed: int

    @property
    def objective(self) -> Objective:
        """What a run would have its factors be near."""
        return Objective(self.weight, self.covariance, self.believed)

    def pull(self, product: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Returns G E H of the error E of a product in its place, and what that costs in itself, tr G E H Eᵀ."""
        error = product - self.weight
        seen = error @ self.covariance
        pull = seen if self.metric is None else self.metric @ seen
        return pull, float((pull * error).sum(dtype=torch.float64))

    def error(self, product: torch.Tensor) -> float:
        """Returns what a product in its place loses, relative to the whole."""
        return relative_error(product, self.weight, self.covariance, self.metric, self.whole)

    def quantized(self, factors: Factors, solvers: Solvers) -> torch.Tensor:
        """Returns the product of factors quantized in the form they are in."""
        made = stack_factors(self.objective, factors, solvers, self.options, self.seed)
        return factors._replace(down=made[".down"].weight(), up=made[".up"].weight()).product()


class _Sides(NamedTuple):
    """What each factor's rounding would lose in groups of the usual size beyond truncation, relative to the energy kept.

    Attributes:
        down: Of the first alone, by bits.
        up: Of the second alone, likewise.
        orders: Of both, over all bits.
    """

    down: dict[int, float]
    up: dict[int, float]
    orders: Orders


def _rounded(problem: _Problem, factors: Factors, solvers: Mapping[int, Solver], relative: float) -> _Sides:
    """Rounds `down` and `up` alone at several bit widths.

    Args:
        problem: The layer.
        factors: Its factors.
        solvers: By bits, all with one group size.
        relative: Noise in groups of that size, relative to those of the usual one.
    """
    before, orders = factors.product(), list[Orders]()
    pull, cut = problem.pull(before)

    def lost(made: Mapping[str, Quantized]) -> float:
        """What D costs on top of what the truncation has missed, E, is tr G D H Dᵀ + 2 ⟨G E H, D⟩."""
        moved = factors._replace(down=made[".down"].weight(), up=made[".up"].weight()).product() - before
        one, other = (_first_order(slope, moved, problem.mean) for slope in problem.slopes)
        own = energy(moved, problem.covariance, problem.metric)
        beyond = max(own + 2 * float((pull * moved).sum(dtype=torch.float64)), 0.0)
        orders.append(Orders(one, other, problem.unit * beyond, problem.unit * own))
        return beyond / (problem.whole - cut) / relative if cut < problem.whole else 0.0

    stages = two_factor_stages(problem.objective, factors, problem.options, problem.seed)
    name, other, kept = stages.first, stages.second, exact(*stages.part[:2])
    rounded = zip(solvers, stages.part.rounded(*solvers.values()), strict=True)
    first = {bits: lost({name: made, other: exact(*stages.then(made)[:2])}) for bits, made in rounded}
    rounded = zip(solvers, stages.then(kept).rounded(*solvers.values()), strict=True)
    second = {bits: lost({name: kept, other: made}) for bits, made in rounded}
    shares = {name: first, other: second}
    return _Sides(shares[".down"], shares[".up"], _sum(orders))


def _pivoted_noise(problem: _Problem, factors: Factors, solve: Solver, forms: Sequence[str]) -> dict[str, float]:
    """Returns what rounding in pivoted forms loses, relative to two factors; all are made."""
    cut, both = problem.error(factors.product()), Solvers(solve, solve)
    two = 0.0
    if problem.weight.numel() <= PIVOTED_SIZE and len(factors.down) < min(problem.weight.shape):
        two = problem.error(problem.quantized(factors, both)) - cut
    if two <= 0:
        return dict.fromkeys(forms, PIVOTED_NOISE)
    made = {form: in_form(factors, form, problem.believed) for form in forms}
    lost = {form: problem.error(problem.quantized(fewer, both)) - cut for form, fewer in made.items()}
    return {form: max(each / two, 0.1) for form, each in lost.items()}


def _slope(ranks: Sequence[int], share: float, again: float) -> float:
    """Returns the power of the rank with which noise falls between two ranks, within reason."""
    rank, other = ranks
    if other == rank or share <= 0 or again <= 0:
        return 1.0
    return min(max(math.log(share / again) / math.log(other / rank), SLOPES[0]), SLOPES[1])
