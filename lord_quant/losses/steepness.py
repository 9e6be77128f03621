# SPDX-License-Identifier: Apache-2.0
"""How much more of the text's loss rounding costs than the model's own predictions lose by it.

Errors D of a weight move predictions at second order, which the metric counts. They move the loss of a text by
⟨∂ loss / ∂ W, D⟩ at first order besides. For a layer's rounding that sum goes with the square of the step, as the second
order does, since what is rounded off is mostly what was small in W, and small for not having been learnt to the end; so the
ratio κ of both is the same at all bits, and rounding costs 1 + κ times what the metric says.

A layer's own κ is uncertain: the slope is that of few tokens. With N of them the first order of errors has 2 / N times
their second order as variance by chance, if the metric is that of the gradients, and as much more as the slopes of the two
halves of the text differ more than that. So all layers' κ are taken as drawn from one distribution, whose mean and width
are estimated from all of them, and each is moved towards the mean by as much as it is uncertain (random effects:
DerSimonian & Laird, Controlled Clinical Trials 7, 1986). Rounding is never counted as a gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lord_quant.losses.probe import FactorNoise, LayerLoss, Orders


TELLING = 1e-9
"""Part of the costliest layer's second order from which on a layer's ratio says something."""


class RoundingSlope(NamedTuple):
    """What the slope of the text's loss adds to what rounding loses, in all layers of a model.

    Attributes:
        dense: The distribution of κ over layers that stay dense.
        factors: That over factors.
    """

    dense: Ratios
    factors: Ratios

    @classmethod
    def of(cls, losses: Sequence[LayerLoss], num_labels: int) -> RoundingSlope:
        """Estimates it.

        Args:
            losses: Of all layers, as probes tell them.
            num_labels: Tokens the slopes of both halves are of.
        """
        dense, factors = [loss.dense_orders for loss in losses], [loss.factor_orders for loss in losses]
        return cls(Ratios.of(dense, num_labels), Ratios.of(factors, num_labels))

    def counted(self, loss: LayerLoss) -> LayerLoss:
        """Returns what a layer, or what is made of several, loses with it."""
        dense, factors = 1 + self.dense.believed(loss.dense_orders), 1 + self.factors.believed(loss.factor_orders)
        down, up = (_noisier(factors, noise) for noise in (loss.down, loss.up))
        return loss._replace(dense=_times(dense, loss.dense), down=down, up=up)


class Ratios(NamedTuple):
    """The distribution of κ over layers.

    Attributes:
        mean: Its mean.
        variance: Its variance.
        precision: Inverse variance of a first order, times what `Orders` calls chance.
    """

    mean: float
    variance: float
    precision: float

    @classmethod
    def of(cls, orders: Sequence[Orders], num_labels: int) -> Ratios:
        """Estimates it.

        Args:
            orders: What layers lose at first and at second order; those that lose next to nothing say nothing.
            num_labels: Tokens the slopes of both halves are of. Halves that agree in everything are one text, counted once.
        """
        least = TELLING * max((each.second for each in orders), default=0.0)
        telling = [each for each in orders if each.second > least and each.chance > 0]
        if not telling:
            return cls(0.0, 0.0, 0.0)
        apart = sum((each.one - each.other) ** 2 / each.chance for each in telling) / len(telling)
        labels = num_labels if apart > 0 else num_labels / 2
        precision = 1 / max(2 / labels, apart / 4)  # of the mean of two halves: a quarter of what they differ by
        ratios, weights = [_ratio(each) for each in telling], [precision * _weight(each) for each in telling]
        whole = sum(weights)
        middle = _mean(ratios, weights)
        scatter = sum(weight * (ratio - middle) ** 2 for ratio, weight in zip(ratios, weights, strict=True))
        spread = whole - sum(weight**2 for weight in weights) / whole
        variance = max(0.0, scatter - (len(telling) - 1)) / spread if spread > 0 else 0.0
        return cls(_mean(ratios, [weight / (1 + variance * weight) for weight in weights]), variance, precision)

    def believed(self, own: Orders) -> float:
        """Returns what to take for a layer's κ, not below 0."""
        weight = self.variance * self.precision * _weight(own) if own.second > 0 and own.chance > 0 else 0.0
        return (
            max(0.0, self.mean + weight / (1 + weight) * (_ratio(own) - self.mean)) if weight > 0 else max(0.0, self.mean)
        )


def _ratio(orders: Orders) -> float:
    return (orders.one + orders.other) / 2 / orders.second


def _weight(orders: Orders) -> float:
    """Returns the inverse variance of a ratio over that of a first order, times its chance."""
    return orders.second**2 / orders.chance


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _times(factor: float, by_bits: Mapping[int, float]) -> dict[int, float]:
    return {bits: factor * noise for bits, noise in by_bits.items()}


def _noisier(factor: float, noise: FactorNoise | None) -> FactorNoise | None:
    return None if noise is None else noise._replace(by_bits=_times(factor, noise.by_bits))
