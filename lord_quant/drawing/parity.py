# SPDX-License-Identifier: Apache-2.0
"""The ranks at which factors weigh as much as the dense layer.

For m outputs and n inputs, aspect ratio a = m / n:

    two_factor   r (m + n) = m n          r / min(m, n) = max(a, 1) / (a + 1)
    pivoted      r (m + n) - r² = m n     r / min(m, n) = 1, since (m - r) (n - r) = 0; column_pivoted alike
    grouped      k layers of one input share `down`: two factors of the layers stacked, m = Σ mᵢ
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lord_quant.sizes.layer_bytes import PIVOTED, TWO_FACTOR, factor_shapes, linear_bytes, order_bytes
from lord_quant.sizes.packable import choose_group_size
from lord_quant.targets import LinearSite, layer_type


PARITY_BITS = 4
OCTAVES = 3
"""Aspect ratios of the parity curves go from 2⁻³ to 2³, further where the model's layers do."""
PER_OCTAVE = 16
GROUPED = (2, 3)
"""Layers of one input in the grouped form's curves: gate and up; query, key and value."""


@dataclass(frozen=True)
class ParityCurve:
    """Rank ratio, of the full rank of what is decomposed, at which factors have as many weights as dense layers.

    Attributes:
        form: `two_factor`, `pivoted` or `grouped`.
        layers: Equal layers decomposed together; 1 but for `grouped`.
        aspects: Outputs over inputs of each layer.
        rank_ratios: At each aspect.
    """

    form: str
    layers: int
    aspects: list[float]
    rank_ratios: list[float]


@dataclass(frozen=True)
class ShapeParity:
    """Parity of the model's layers of one shape, as rank ratios by form.

    Attributes:
        out_features: Outputs m.
        in_features: Inputs n.
        types: Paths within the block of the layers that have this shape.
        weights: Where the weights are as many.
        stored: The largest ratio at which stored bytes are not more: scales, zeros, indices, orders, added biases count.
    """

    out_features: int
    in_features: int
    types: list[str]
    weights: dict[str, float]
    stored: dict[str, float]


@dataclass(frozen=True)
class Parity:
    """Parity by aspect ratio; `bits` and `group_size` are those of the stored bytes."""

    curves: list[ParityCurve]
    shapes: list[ShapeParity]
    bits: int
    group_size: int


def parity_of(sites: Sequence[LinearSite], mean_correction: bool) -> Parity:
    """Returns where factors weigh as much as dense layers, for all aspect ratios and for the shapes of a model.

    Args:
        sites: Its layers.
        mean_correction: Whether factors get a bias their layer did not have.
    """
    group_size = choose_group_size(sites)
    by_shape: dict[tuple[int, int], list[LinearSite]] = {}
    for site in sites:
        by_shape.setdefault((site.out_features, site.in_features), []).append(site)
    shapes = []
    for (m, n), members in by_shape.items():
        weights = {TWO_FACTOR: two_factor_parity(m / n), PIVOTED: 1.0}
        stored = {form: stored_parity(members[0], form, PARITY_BITS, group_size, mean_correction) for form in weights}
        shapes.append(ShapeParity(m, n, list(dict.fromkeys(map(layer_type, members))), weights, stored))
    widest = max(abs(math.log2(m / n)) for m, n in by_shape)
    octaves = max(OCTAVES, math.ceil(widest))
    aspects = [2 ** (step / PER_OCTAVE) for step in range(-PER_OCTAVE * octaves, PER_OCTAVE * octaves + 1)]
    curves = [
        ParityCurve(TWO_FACTOR, 1, aspects, [two_factor_parity(aspect) for aspect in aspects]),
        *(
            ParityCurve("grouped", layers, aspects, [two_factor_parity(layers * aspect) for aspect in aspects])
            for layers in GROUPED
        ),
        ParityCurve(PIVOTED, 1, aspects, [1.0] * len(aspects)),
    ]
    return Parity(curves, shapes, PARITY_BITS, group_size)


def two_factor_parity(aspect: float) -> float:
    """Returns the rank ratio at which two factors have as many weights as a layer with `aspect` outputs per input."""
    return max(aspect, 1.0) / (aspect + 1)


def stored_parity(site: LinearSite, form: str, bits: int, group_size: int, mean_correction: bool) -> float:
    """Returns the largest rank ratio at which the packed factors of a layer take no more bytes than the packed layer.

    Ranks that packing does not allow count too: what is wanted is the point, not the next legal rank below it.
    """
    m, n = site.out_features, site.in_features
    dense = linear_bytes(n, m, False, bits, group_size, 2).weight
    added = 2 * m if mean_correction and not site.has_bias else 0
    added += order_bytes(n, m, form)

    def size(rank: int) -> int:
        shapes = factor_shapes(n, m, rank, form).values()
        return added + sum(linear_bytes(*shape, False, bits, group_size, 2).weight for shape in shapes)

    fitting = [rank for rank in range(1, min(m, n) + 1) if size(rank) <= dense]
    return max(fitting, default=0) / min(m, n)
