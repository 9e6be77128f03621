# SPDX-License-Identifier: Apache-2.0
"""The numbers behind the pictures of a plan: what it chose, and what it chose from. Drawing them is `plots.py`'s.

Losses are in the unit of the statistics: nats per token, or squared output error where there was no backward pass.
Where truncation stands for a predicted loss it is the cross-fitted one, as in plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lord_quant.budgets.planner import Allocation
from lord_quant.drawing.parity import Parity, parity_of
from lord_quant.losses.statistics import Statistics
from lord_quant.targets import ATTENTION, MLP, LinearSite, layer_type


if TYPE_CHECKING:
    from lord_quant.budgets.budget import Planner

POINTS = 128
"""Points of a curve over rank."""
BUDGETS = (*(1 + step / 8 for step in range(29)), *(4.75 + step / 4 for step in range(19)))
"""Bits per weight of the frontier's points; those out of reach are left out."""


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
class Point:
    """Stored bits per weight of a plan and its loss, predicted if nothing else is said."""

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


@dataclass(frozen=True)
class SweepData:
    """What there is to draw of measured budgets.

    Attributes:
        about: What they were measured on.
        unit: Of predicted losses, in words.
        planned: What the best plans are predicted to lose.
        uniform: What uniform ones are.
        measured: What the budgets lost on held-out text, in nats per token.
    """

    about: dict[str, Any]
    unit: str
    planned: list[Point]
    uniform: list[UniformPoint]
    measured: list[Point]


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
        planner.unit,
        spectra(statistics, allocation),
        fates(statistics, allocation),
        type_curves(statistics),
        parity_of(sites, planner.menu.mean_correction),
        Frontier(*predictions(planner), Point(planner.bpw(allocation), allocation.loss)),
    )


def collect_sweep(planner: Planner, measured: Sequence[tuple[float, float]], about: Mapping[str, Any]) -> SweepData:
    """Returns the numbers of a sweep's picture.

    Args:
        planner: The planner of a model.
        measured: Stored bits per weight and loss of every budget, in nats per token.
        about: On what.
    """
    return SweepData(dict(about), planner.unit, *predictions(planner), [Point(*each) for each in measured])


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


def predictions(planner: Planner) -> tuple[list[Point], list[UniformPoint]]:
    """Returns the best plans for a fine grid of budgets, and the uniform plans."""
    reached = {planner.bpw(each): each.loss for each in planner.frontier(BUDGETS) if each is not None}
    uniform = []
    for each in planner.uniform:
        alike = next(iter(each.chosen.values()))
        uniform.append(UniformPoint(alike.bits, alike.group_size, planner.bpw(each), each.loss))
    return [Point(bpw, loss) for bpw, loss in sorted(reached.items())], uniform


def _ranks(full: int) -> list[int]:
    """Returns ranks from 0 to full, `POINTS` steps at most."""
    steps = min(POINTS, full)
    return [round(step * full / steps) for step in range(steps + 1)]


def _kind(site: LinearSite) -> str:
    if ATTENTION.search(site.name):
        return "attention"
    return "mlp" if MLP.search(site.name) else "other"
