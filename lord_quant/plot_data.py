# SPDX-License-Identifier: Apache-2.0
"""The numbers behind the pictures of a plan: what it chose, and what it chose from. Drawing them is `plots.py`'s.

Losses are in the unit of the statistics: nats per token, or squared output error where there was no backward pass.
Where truncation stands for a predicted loss it is the cross-fitted one, as in plans.

Parity is where factors weigh as much as the dense layer. For m outputs and n inputs, aspect ratio a = m / n:

    two_factor   r (m + n) = m n          r / min(m, n) = max(a, 1) / (a + 1)
    pivoted      r (m + n) - r² = m n     r / min(m, n) = 1, since (m - r) (n - r) = 0; column_pivoted alike
    grouped      k layers of one input share `down`: two factors of the layers stacked, m = Σ mᵢ
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lord_quant.layer_bytes import PIVOTED, TWO_FACTOR, factor_shapes, linear_bytes, order_bytes
from lord_quant.plan import choose_group_size
from lord_quant.planner import Allocation
from lord_quant.statistics import Statistics
from lord_quant.targets import ATTENTION, MLP, LinearSite


if TYPE_CHECKING:
    from lord_quant.budget import Planner

POINTS = 128
"""Points of a curve over rank."""
BUDGETS = (*(1 + step / 8 for step in range(29)), *(4.75 + step / 4 for step in range(19)))
"""Bits per weight of the frontier's points; those out of reach are left out."""
PARITY_BITS = 4
OCTAVES = 3
"""Aspect ratios of the parity curves go from 2⁻³ to 2³, further where the model's layers do."""
PER_OCTAVE = 16
GROUPED = (2, 3)
"""Layers of one input in the grouped form's curves: gate and up; query, key and value."""


@dataclass(frozen=True)
class Kept:
    """The rank a layer was given.

    Attributes:
        form: Of its factors.
        rank: Directions kept.
        rank_ratio: The same, as a fraction of min(m, n).
        share: Of the loss at rank 0, what truncation loses.
    """

    form: str
    rank: int
    rank_ratio: float
    share: float


@dataclass(frozen=True)
class Spectrum:
    """What truncating a layer loses, over rank.

    Attributes:
        layer: Full module path.
        type: Its path within the block.
        block: Index of the block.
        whole: Loss at rank 0, not multiplied by anything.
        rank_ratios: From 0 to 1.
        shares: Loss at these ranks, relative to `whole`.
        kept: The rank it was given; None where it stays dense.
    """

    layer: str
    type: str
    block: int
    whole: float
    rank_ratios: list[float]
    shares: list[float]
    kept: Kept | None


@dataclass(frozen=True)
class Fate:
    """What becomes of a layer: `menu.Candidate`, with its place and its stored bits per dense weight."""

    layer: str
    type: str
    block: int
    form: str
    rank: int | None
    bits: int
    group_size: int
    up_bits: int
    up_group_size: int
    bpw: float
    loss: float


@dataclass(frozen=True)
class TypeCurve:
    """What two factors in place of all layers of a type would lose, over the share of their weights removed.

    Attributes:
        type: Path within the block.
        kind: `attention`, `mlp` or `other`.
        layers: How many there are.
        rank_ratios: The rank ratio all of them keep, from 0 to 1.
        removed: Share of their weights removed there, from 1 to below 0.
        losses: Predicted for truncation alone, summed over the layers.
        parity_removed: Removed at the largest ranks that have no more weights than the dense layers; 0 or little more.
        parity_loss: Lost there.
    """

    type: str
    kind: str
    layers: int
    rank_ratios: list[float]
    removed: list[float]
    losses: list[float]
    parity_removed: float
    parity_loss: float


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


@dataclass(frozen=True)
class Point:
    """Stored bits per weight and predicted loss of a plan."""

    bpw: float
    loss: float


@dataclass(frozen=True)
class UniformPoint:
    """A plan in which every layer stays dense, at the same bits and group size."""

    bits: int
    group_size: int
    bpw: float
    loss: float


@dataclass(frozen=True)
class Frontier:
    """Predicted loss over bits per weight: the best plans, the uniform ones, the one chosen."""

    planned: list[Point]
    uniform: list[UniformPoint]
    chosen: Point


@dataclass(frozen=True)
class PlotData:
    """All there is to draw.

    Attributes:
        about: Where the plan comes from, as in a plan file.
        unit: Of losses, in words.
        spectra: By layer.
        layers: By layer.
        types: By type of layer.
        parity: By shape.
        frontier: By budget.
    """

    about: dict[str, Any]
    unit: str
    spectra: list[Spectrum]
    layers: list[Fate]
    types: list[TypeCurve]
    parity: Parity
    frontier: Frontier


def collect(planner: Planner, allocation: Allocation, about: Mapping[str, Any]) -> PlotData:
    """Returns the numbers of all pictures.

    Args:
        planner: The planner of a model.
        allocation: The plan it chose.
        about: What its plan file says of where it comes from.
    """
    statistics = planner.statistics
    sites = list(statistics.sites.values())
    return PlotData(
        dict(about),
        "nats per token" if planner.in_nats else "squared output error",
        spectra(statistics, allocation),
        fates(statistics, allocation),
        type_curves(statistics),
        parity(sites, planner.menu.mean_correction),
        frontier(planner, allocation),
    )


def layer_type(site: LinearSite) -> str:
    """Returns a layer's path within its block, such as ``attn.c_attn``."""
    return site.name.split(f".{site.block}.", 1)[-1]


def spectra(statistics: Statistics, allocation: Allocation) -> list[Spectrum]:
    """Returns what truncation would lose, layer by layer, and the ranks a plan keeps."""
    found = []
    for name, site in statistics.sites.items():
        tail, chosen = statistics.losses[name].tail.tolist(), allocation.chosen[name]
        full, whole = len(tail) - 1, tail[0]
        shares = [loss / whole if whole > 0 else 0.0 for loss in tail]
        ranks = _ranks(full)
        kept = None
        if chosen.rank is not None:
            # Factors of several layers together may keep more directions than one of them has.
            kept = Kept(chosen.form, chosen.rank, chosen.rank / full, shares[min(chosen.rank, full)])
        ratios = [rank / full for rank in ranks]
        found.append(Spectrum(name, layer_type(site), site.block, whole, ratios, [shares[rank] for rank in ranks], kept))
    return found


def fates(statistics: Statistics, allocation: Allocation) -> list[Fate]:
    """Returns what a plan makes of every layer."""
    found = []
    for name, site in statistics.sites.items():
        each = allocation.chosen[name]
        bpw = 8 * each.num_bytes / (site.in_features * site.out_features)
        packings = (each.bits, each.group_size, each.up_bits, each.up_group_size)
        found.append(Fate(name, layer_type(site), site.block, each.form, each.rank, *packings, bpw, each.loss))
    return found


def type_curves(statistics: Statistics) -> list[TypeCurve]:
    """Returns how much each type of layer minds the loss of its weights; in order of the first block."""
    by_type: dict[str, list[LinearSite]] = {}
    for site in statistics.sites.values():
        by_type.setdefault(layer_type(site), []).append(site)
    curves = []
    for name, sites in by_type.items():
        tails = [statistics.losses[site.name].cut.tolist() for site in sites]
        shapes = [(site.out_features, site.in_features) for site in sites]

        def cut(ranks: Sequence[int], tails: Any = tails, shapes: Any = shapes) -> tuple[float, float]:
            """Returns the share of weights removed and the loss, the layers keeping these ranks."""
            kept = sum(rank * (m + n) for rank, (m, n) in zip(ranks, shapes, strict=True))
            lost = sum(tail[rank] for rank, tail in zip(ranks, tails, strict=True))
            return 1 - kept / sum(m * n for m, n in shapes), lost

        ratios = [step / POINTS for step in range(POINTS + 1)]
        points = [cut([round(ratio * (len(tail) - 1)) for tail in tails]) for ratio in ratios]
        removed, losses = ([point[part] for point in points] for part in (0, 1))
        at_parity = cut([m * n // (m + n) for m, n in shapes])
        curves.append(TypeCurve(name, _kind(sites[0]), len(sites), ratios, removed, losses, *at_parity))
    return curves


def parity(sites: Sequence[LinearSite], mean_correction: bool) -> Parity:
    """Returns where factors weigh as much as dense layers, for all aspect ratios and for the shapes of a model.

    Args:
        sites: Its layers.
        mean_correction: Whether factors get a bias their layer did not have.
    """
    group_size = choose_group_size(sites, PARITY_BITS)
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


def frontier(planner: Planner, allocation: Allocation) -> Frontier:
    """Returns the best plans for a fine grid of budgets, the uniform plans, and the one chosen."""
    reached = {planner.bpw(each): each.loss for each in planner.frontier(BUDGETS) if each is not None}
    uniform = []
    for each in planner.uniform:
        alike = next(iter(each.chosen.values()))
        uniform.append(UniformPoint(alike.bits, alike.group_size, planner.bpw(each), each.loss))
    planned = [Point(bpw, loss) for bpw, loss in sorted(reached.items())]
    return Frontier(planned, uniform, Point(planner.bpw(allocation), allocation.loss))


def _ranks(full: int) -> list[int]:
    """Returns ranks from 0 to full, `POINTS` steps at most."""
    steps = min(POINTS, full)
    return [round(step * full / steps) for step in range(steps + 1)]


def _kind(site: LinearSite) -> str:
    if ATTENTION.search(site.name):
        return "attention"
    return "mlp" if MLP.search(site.name) else "other"
