# SPDX-License-Identifier: Apache-2.0
"""A budget in, a plan out: form, rank, bits and group size of every layer, chosen from what each would lose.

The problem. Every layer ℓ has a menu of candidates c with exact stored bytes b_ℓc and predicted loss f_ℓc (`probe.py`).
Choose one each so that Σ f is least with Σ b within the budget: a multiple-choice knapsack.

The solution. For a price λ per byte every layer chooses alone: the candidate with least f + λ b, which lies on the lower
convex hull of its menu. As λ falls, layers step along their hulls, and the steps, sorted by what they save per byte, are
the exact answer for every budget that a whole number of steps reaches (Everett, Operations Research 11(3), 1963). Steps
that no longer fit are passed over, and what is left of the budget goes to the best single exchanges, hull or not, until
none fits. Uniform plans are always compared: the answer is never predicted to be worse than any of them.

Layers with one input may be grouped, so they choose together: what they would choose one by one along their merged hulls,
or a bottleneck they share. Such a unit's menu has choices for all its layers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from lord_quant.config import FLOAT_BITS, FORMS, GROUP_SIZES, PACKED_BITS
from lord_quant.errors import BudgetError
from lord_quant.layer_bytes import (
    GROUPED,
    PIVOTED,
    TWO_FACTOR,
    factor_shapes,
    linear_bytes,
    num_weights,
    order_bytes,
    rank_step,
)
from lord_quant.probe import LayerLoss, noise_at
from lord_quant.targets import LinearSite


DENSE = "dense"

RANKS = 64
"""Most ranks tried per form and group size."""
CAUTION = 4.0
"""How many times its predicted loss a truncation is taken to cost. Directions are dropped because the calibration found no
use for them, which it finds of more directions than there are: over three models at rank ratio 0.75, all layers truncated,
held-out text lost 2.8, 5.1 and 5.5 times what was predicted (rounding: 0.7, 1.1 and 1.2 times)."""
PIVOTED_NOISE = 2.0
"""Rounding loss of the pivoted form, relative to two factors at the same rank and bits."""


class Candidate(NamedTuple):
    """What may become of a layer.

    Attributes:
        num_bytes: Stored bytes: weights, scales, zeros, indices, added biases.
        loss: Predicted, in nats per token; of grouped layers, all of it with their leader.
        form: `dense`, `two_factor`, `pivoted` or `grouped`.
        rank: Of its factors, or None.
        bits: Of the dense layer's weights, or of `down`.
        group_size: Inputs per scale.
        up_bits: Of `up`; of a dense layer, the same as `bits`.
    """

    num_bytes: int
    loss: float
    form: str
    rank: int | None
    bits: int
    group_size: int
    up_bits: int


class Choice(NamedTuple):
    """What may become of a unit: one candidate for each of its layers, by full path, and what they add up to."""

    num_bytes: int
    loss: float
    parts: tuple[tuple[str, Candidate], ...]


@dataclass(frozen=True)
class Menu:
    """What candidates there are.

    Attributes:
        forms: Forms allowed.
        bits: Bit widths allowed; 16 for float, with no other.
        group_sizes: Group sizes allowed.
        mean_correction: Whether factors get a bias their layer did not have.
        itemsize: Bytes of a float value.
    """

    forms: tuple[str, ...] = (DENSE, *FORMS)
    bits: tuple[int, ...] = PACKED_BITS
    group_sizes: tuple[int, ...] = GROUP_SIZES
    mean_correction: bool = True
    itemsize: int = 2

    def of(self, site: LinearSite, loss: LayerLoss) -> list[Candidate]:
        """Returns a layer's candidates, smallest first, without those that another one beats in bytes and in loss."""
        found = []
        for group_size in self._group_sizes(loss):
            if DENSE in self.forms:
                found += [self._dense(site, loss, bits, group_size) for bits in self.bits]
            for form in (TWO_FACTOR, PIVOTED):
                if form in self.forms:
                    found += self._factored(site, loss, form, group_size)
        return _undominated(found)

    def of_group(self, sites: Sequence[LinearSite], whole: LinearSite, loss: LayerLoss) -> list[Choice]:
        """Returns the choices that give layers with one input a shared bottleneck.

        Args:
            sites: The layers; the first becomes the leader.
            whole: The layer that all their outputs make.
            loss: What that would lose.
        """
        unlike = len({site.has_bias for site in sites}) > 1 and not self.mean_correction
        if GROUPED not in self.forms or unlike:
            return []
        found = []
        for group_size in self._group_sizes(loss):
            for each in self._factored(whole, loss, GROUPED, group_size):
                parts = []
                for site in sites:
                    shapes = factor_shapes(site.in_features, site.out_features, each.rank or 0, GROUPED)
                    size = linear_bytes(*shapes[".up"], False, each.up_bits, group_size, self.itemsize).weight
                    if site is sites[0]:
                        size += linear_bytes(*shapes[".down"], False, each.bits, group_size, self.itemsize).weight
                    size += self._added_bias(site)
                    own = each._replace(num_bytes=size, loss=each.loss if site is sites[0] else 0.0)
                    parts.append((site.name, own))
                found.append(Choice(sum(part.num_bytes for _, part in parts), each.loss, tuple(parts)))
        return _undominated(found)

    def _group_sizes(self, loss: LayerLoss) -> Iterator[int]:
        return (size for size in self.group_sizes if size in loss.groups)

    def _added_bias(self, site: LinearSite) -> int:
        item = self.itemsize if FLOAT_BITS in self.bits else 2
        return item * site.out_features if self.mean_correction and not site.has_bias else 0

    def _dense(self, site: LinearSite, loss: LayerLoss, bits: int, group_size: int) -> Candidate:
        size = linear_bytes(site.in_features, site.out_features, site.has_bias, bits, group_size, self.itemsize).weight
        return Candidate(size, loss.of_dense(bits, group_size), DENSE, None, bits, group_size, bits)

    def _factored(self, site: LinearSite, loss: LayerLoss, form: str, group_size: int) -> Iterator[Candidate]:
        """Yields candidates of a form, `RANKS` ranks at most, only where factors hold fewer weights than the layer."""
        if loss.down is None or loss.up is None:
            return
        inputs, outputs = site.in_features, site.out_features
        smaller, step = min(inputs, outputs), rank_step(group_size)
        step *= math.ceil(smaller / step / RANKS)
        fixed = self._added_bias(site) + (order_bytes(outputs) if form == PIVOTED else 0)
        noisier = loss.groups[group_size] * (PIVOTED_NOISE if form == PIVOTED else 1.0)
        whole = float(loss.tail[0])
        for rank in range(step, smaller + 1, step):
            shapes = factor_shapes(inputs, outputs, rank, form)
            if num_weights(shapes) >= inputs * outputs:
                break
            cut = float(loss.tail[rank])
            scale = noisier * (whole - cut)
            sides = [
                {
                    bits: (
                        linear_bytes(*shapes[suffix], False, bits, group_size, self.itemsize).weight,
                        scale * noise.at(rank) * noise_at(noise.by_bits, bits),
                    )
                    for bits in self.bits
                }
                for suffix, noise in ((".down", loss.down), (".up", loss.up))
            ]
            for bits, up_bits in self._widths(form):
                (down_bytes, down_loss), (up_bytes, up_loss) = sides[0][bits], sides[1][up_bits]
                size, lost = fixed + down_bytes + up_bytes, CAUTION * cut + down_loss + up_loss
                yield Candidate(size, lost, form, rank, bits, group_size, up_bits)

    def _widths(self, form: str) -> list[tuple[int, int]]:
        """Returns the bits of both factors: neighbours among those allowed; of the pivoted form, the same."""
        apart = 0 if form == PIVOTED else 1
        places = dict(enumerate(sorted(self.bits)))
        return [(places[i], places[j]) for i in places for j in places if abs(i - j) <= apart]


_Sized = TypeVar("_Sized", Candidate, Choice)


def _undominated(candidates: Iterable[_Sized]) -> list[_Sized]:
    front: list[_Sized] = []
    for candidate in sorted(candidates, key=lambda each: (each.num_bytes, each.loss)):
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    return front


class Allocation(NamedTuple):
    """The chosen candidates, by layer, and what they add up to."""

    chosen: dict[str, Candidate]
    num_bytes: int
    loss: float


def single(name: str, menu: Iterable[Candidate]) -> list[Choice]:
    """Returns the choices of a layer that chooses alone."""
    return [Choice(each.num_bytes, each.loss, ((name, each),)) for each in menu]


def merged(menus: Mapping[str, Sequence[Candidate]], grouped: Iterable[Choice]) -> list[Choice]:
    """Returns the choices of layers that choose together: steps along all their hulls by what they save, or a group."""
    hulls = {name: lower_hull(menu) for name, menu in menus.items()}
    at = {name: hull[0] for name, hull in hulls.items()}
    every = [(name, *pair) for name, hull in hulls.items() for pair in itertools.pairwise(hull)]
    steps = sorted(((_slope(before, after), name, after) for name, before, after in every), key=lambda step: step[0])
    choices = [_choice(at)]
    for _, name, after in steps:
        at[name] = after
        choices.append(_choice(at))
    return _undominated([*choices, *grouped])


def _choice(parts: Mapping[str, Candidate]) -> Choice:
    whole = total(dict(parts))
    return Choice(whole.num_bytes, whole.loss, tuple(parts.items()))


def allocate(menus: Sequence[Sequence[Choice]], budget: float, others: Iterable[Allocation] = ()) -> Allocation:
    """Chooses for every unit.

    Args:
        menus: Choices by unit.
        budget: Bytes they may take in all.
        others: Plans to be compared, such as `uniform_plans`.

    Raises:
        BudgetError: Not even the smallest choices fit.
    """
    hulls = [lower_hull(menu) for menu in menus]
    at = [0] * len(hulls)
    left = budget - sum(hull[0].num_bytes for hull in hulls)
    if left < 0:
        smallest = sum(hull[0].num_bytes for hull in hulls)
        raise BudgetError(f"the budget is {budget:.0f} bytes for the linear layers; the smallest plan takes {smallest}")
    steps = [
        (_slope(before, after), unit, position)
        for unit, hull in enumerate(hulls)
        for position, (before, after) in enumerate(itertools.pairwise(hull))
    ]
    for _, unit, position in sorted(steps):
        size = hulls[unit][position + 1].num_bytes - hulls[unit][position].num_bytes
        if at[unit] == position and size <= left:
            at[unit] += 1
            left -= size
    chosen = [hull[place] for hull, place in zip(hulls, at, strict=True)]
    _spend(chosen, menus, left)
    mine = total({name: part for choice in chosen for name, part in choice.parts})
    fitting = [mine, *(other for other in others if other.num_bytes <= budget)]
    return min(fitting, key=lambda allocation: allocation.loss)


def lower_hull(menu: Sequence[_Sized]) -> list[_Sized]:
    """Returns what is best at some price per byte, smallest first; losses fall ever more slowly."""
    hull: list[_Sized] = []
    for candidate in _undominated(menu):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return hull


def uniform_plans(sites: Mapping[str, LinearSite], losses: Mapping[str, LayerLoss], menu: Menu) -> list[Allocation]:
    """Returns the plans in which every layer stays dense at the same bits and group size."""
    plans = []
    for bits, group_size in itertools.product(menu.bits, menu.group_sizes):
        if DENSE in menu.forms and all(group_size in loss.groups for loss in losses.values()):
            alike = dataclasses.replace(menu, forms=(DENSE,), bits=(bits,), group_sizes=(group_size,))
            plans.append(total({name: alike.of(sites[name], loss)[0] for name, loss in losses.items()}))
    return plans


def patterns(allocation: Allocation) -> dict[str, Any]:
    """Returns an allocation as the settings of a run: `lowrank` and `gptq` sections, by full module path."""
    chosen = allocation.chosen
    usual_bits = _most_common(candidate.bits for candidate in chosen.values())
    usual_group = _most_common(candidate.group_size for candidate in chosen.values())
    ranks = {name: candidate.rank for name, candidate in chosen.items() if candidate.rank is not None}
    lowrank: dict[str, Any] = {"rank_ratio": 1}
    if ranks:
        lowrank = {"rank_pattern": ranks, "form_pattern": {name: chosen[name].form for name in ranks}}
    bits: dict[str, int] = {}
    for name, each in chosen.items():
        own = {"": each.bits} if each.bits == each.up_bits else {".down": each.bits, ".up": each.up_bits}
        bits |= {name + suffix: width for suffix, width in own.items() if width != usual_bits}
    return {
        "lowrank": lowrank,
        "gptq": {
            "bits": usual_bits,
            "group_size": usual_group,
            "bits_pattern": bits,
            "group_size_pattern": {
                name: each.group_size for name, each in chosen.items() if each.group_size != usual_group
            },
        },
    }


def _spend(chosen: list[Choice], menus: Sequence[Sequence[Choice]], left: float) -> None:
    """Makes the exchange that saves most loss with the bytes left, again and again."""
    while True:
        exchanges = [
            (choice.loss - old.loss, unit, choice)
            for unit, old in enumerate(chosen)
            for choice in menus[unit]
            if choice.loss < old.loss and choice.num_bytes - old.num_bytes <= left
        ]
        if not exchanges:
            return
        _, unit, choice = min(exchanges, key=lambda each: each[:2])
        left -= choice.num_bytes - chosen[unit].num_bytes
        chosen[unit] = choice


def total(chosen: dict[str, Candidate]) -> Allocation:
    """Adds up what was chosen."""
    parts = chosen.values()
    return Allocation(chosen, sum(part.num_bytes for part in parts), sum(part.loss for part in parts))


def _slope(before: Candidate | Choice, after: Candidate | Choice) -> float:
    return (after.loss - before.loss) / (after.num_bytes - before.num_bytes)


def _most_common(values: Iterable[int]) -> int:
    counts: dict[int, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return max(sorted(counts), key=lambda value: counts[value])
