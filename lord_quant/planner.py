# SPDX-License-Identifier: Apache-2.0
"""A budget in, a plan out: form, rank, bits and group size of every layer, chosen from what each would lose.

The problem. Every layer ℓ has a menu of candidates c with exact stored bytes b_ℓc and predicted loss f_ℓc (`probe.py`).
Choose one each so that Σ f is least with Σ b within the budget: a multiple-choice knapsack.

The solution. For a price λ per byte every layer chooses alone: the candidate with least f + λ b, which lies on the lower
convex hull of its menu. As λ falls, layers step along their hulls, and the steps, sorted by what they save per byte, are
the exact answer for every budget that a whole number of steps reaches (Everett, Operations Research 11(3), 1963). Steps
that no longer fit are passed over, and what is left of the budget goes to the best single exchanges, hull or not, until
none fits. Uniform plans are always compared: the answer is never predicted to be worse than any of them.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lord_quant.config import FORMS, GROUP_SIZES
from lord_quant.errors import BudgetError
from lord_quant.plan import factor_shapes, linear_bytes, order_bytes, rank_step
from lord_quant.probe import LayerLoss
from lord_quant.targets import LinearSite


DENSE = "dense"
TWO_FACTOR, PIVOTED = FORMS
PACKED_BITS = (2, 3, 4, 8)
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
        loss: Predicted, in nats per token.
        form: `dense`, `two_factor` or `pivoted`.
        rank: Of its factors, or None.
        bits: Of every packed weight.
        group_size: Inputs per scale.
    """

    num_bytes: int
    loss: float
    form: str
    rank: int | None
    bits: int
    group_size: int


@dataclass(frozen=True)
class Menu:
    """What candidates there are.

    Attributes:
        forms: Forms allowed.
        bits: Bit widths allowed.
        group_sizes: Group sizes allowed.
        mean_correction: Whether factors get a bias their layer did not have.
        min_param_ratio: Fraction of a layer's weights that its factors must hold.
    """

    forms: tuple[str, ...] = (DENSE, TWO_FACTOR, PIVOTED)
    bits: tuple[int, ...] = PACKED_BITS
    group_sizes: tuple[int, ...] = GROUP_SIZES
    mean_correction: bool = True
    min_param_ratio: float = 0.0

    def of(self, site: LinearSite, loss: LayerLoss) -> list[Candidate]:
        """Returns a layer's candidates, smallest first, without those that another one beats in bytes and in loss."""
        tail = loss.tail.tolist()
        found = []
        for group_size in (size for size in self.group_sizes if size in loss.groups):
            shapes = list(self._shapes(site, loss, group_size))
            for bits in self.bits:
                noise = loss.factor_noise(bits, group_size)
                for form, rank in shapes:
                    if rank is None:
                        lost = loss.of_dense(bits, group_size)
                    else:
                        noisier = PIVOTED_NOISE if form == PIVOTED else 1.0
                        lost = CAUTION * tail[rank] + noisier * noise * (tail[0] - tail[rank])
                    size = _stored_bytes(site, form, rank, bits, group_size, self.mean_correction)
                    found.append(Candidate(size, lost, form, rank, bits, group_size))
        return _undominated(found)

    def _shapes(self, site: LinearSite, loss: LayerLoss, group_size: int) -> Iterator[tuple[str, int | None]]:
        """Yields forms and ranks, `RANKS` at most; ranks only where factors hold fewer weights than the layer."""
        if DENSE in self.forms:
            yield DENSE, None
        smaller, step = min(site.in_features, site.out_features), rank_step(group_size)
        step *= math.ceil(smaller / step / RANKS)
        for form in (TWO_FACTOR, PIVOTED):
            if form not in self.forms or loss.share is None:
                continue
            for rank in range(step, smaller + 1, step):
                shapes = factor_shapes(site.in_features, site.out_features, rank, form)
                kept = sum(math.prod(shape) for shape in shapes.values()) / (site.in_features * site.out_features)
                if kept >= 1:
                    break
                if kept >= self.min_param_ratio:
                    yield form, rank


def _stored_bytes(site: LinearSite, form: str, rank: int | None, bits: int, group_size: int, mean_correction: bool) -> int:
    """Returns what counts towards bits per weight, as `LayerPlan.counted_bytes` does."""
    if rank is None:
        return linear_bytes(site.in_features, site.out_features, site.has_bias, bits, group_size, 2).weight
    shapes = factor_shapes(site.in_features, site.out_features, rank, form)
    size = sum(linear_bytes(*shape, False, bits, group_size, 2).weight for shape in shapes.values())
    size += order_bytes(site.out_features) if form == PIVOTED else 0
    return size + (2 * site.out_features if mean_correction and not site.has_bias else 0)


def _undominated(candidates: Iterable[Candidate]) -> list[Candidate]:
    front: list[Candidate] = []
    for candidate in sorted(candidates):
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    return front


class Allocation(NamedTuple):
    """The chosen candidates, by layer, and what they add up to."""

    chosen: dict[str, Candidate]
    num_bytes: int
    loss: float


class Frontier:
    """The best plans of a model at every price: convex hulls of all menus, and their steps in one sorted sequence.

    Args:
        menus: Candidates by layer.
        others: Plans to be compared, such as `uniform_plans`.
    """

    def __init__(self, menus: Mapping[str, Sequence[Candidate]], others: Iterable[Allocation] = ()) -> None:
        self.menus, self.others = menus, tuple(others)
        self.hulls = {name: lower_hull(menu) for name, menu in menus.items()}
        steps = [
            (_slope(before, after), order, position)
            for order, hull in enumerate(self.hulls.values())
            for position, (before, after) in enumerate(itertools.pairwise(hull))
        ]
        names = list(self.hulls)
        self.steps = [(names[order], position) for _, order, position in sorted(steps)]

    def within(self, budget: float) -> Allocation:
        """Returns the plan of least loss that takes at most so many bytes.

        Raises:
            BudgetError: Not even the smallest candidates fit.
        """
        at = dict.fromkeys(self.hulls, 0)
        smallest = sum(hull[0].num_bytes for hull in self.hulls.values())
        left = budget - smallest
        if left < 0:
            raise BudgetError(f"the budget is {budget:.0f} bytes for the linear layers; the smallest plan takes {smallest}")
        for name, position in self.steps:
            size = self.hulls[name][position + 1].num_bytes - self.hulls[name][position].num_bytes
            if at[name] == position and size <= left:
                at[name] += 1
                left -= size
        chosen = {name: self.hulls[name][place] for name, place in at.items()}
        _spend(chosen, self.menus, left)
        fitting = [total(chosen), *(other for other in self.others if other.num_bytes <= budget)]
        return min(fitting, key=lambda allocation: allocation.loss)

    def below(self, max_loss: float) -> Allocation:
        """Returns the smallest plan that loses at most so much.

        The first steps that get there are the answer for a limit that they meet exactly. Otherwise the last of them is one
        too many and all but the last are one too few: both are improved by exchanges, and the smaller is taken.

        Raises:
            BudgetError: Not even the candidates of least loss do.
        """
        count = bisect.bisect_left(range(len(self.steps) + 1), True, key=lambda n: self._after(n).loss <= max_loss)
        if count > len(self.steps):
            least = self._after(len(self.steps)).loss
            raise BudgetError(f"the loss is to be at most {max_loss:g}; the plan of least loss loses {least:g}")
        found = [_give_back(self._after(count).chosen, self.menus, max_loss)]
        if count:
            short = self._after(count - 1)
            found += [_give_back(each, self.menus, max_loss) for each in _one_more(short, self.menus, max_loss)]
        found += [other for other in self.others if other.loss <= max_loss]
        return min(found, key=lambda allocation: (allocation.num_bytes, allocation.loss))

    def _after(self, count: int) -> Allocation:
        """Returns where the first so many steps lead."""
        chosen = {name: hull[0] for name, hull in self.hulls.items()}
        for name, position in self.steps[:count]:
            chosen[name] = self.hulls[name][position + 1]
        return total(chosen)


def allocate(menus: Mapping[str, Sequence[Candidate]], budget: float, others: Iterable[Allocation] = ()) -> Allocation:
    """Returns what `Frontier.within` does, for one budget.

    Raises:
        BudgetError: Not even the smallest candidates fit.
    """
    return Frontier(menus, others).within(budget)


def lower_hull(menu: Sequence[Candidate]) -> list[Candidate]:
    """Returns the candidates that are best at some price per byte, smallest first; losses fall ever more slowly."""
    hull: list[Candidate] = []
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
            alike = Menu((DENSE,), (bits,), (group_size,), menu.mean_correction)
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
    return {
        "lowrank": lowrank,
        "gptq": {
            "bits": usual_bits,
            "group_size": usual_group,
            "bits_pattern": {name: each.bits for name, each in chosen.items() if each.bits != usual_bits},
            "group_size_pattern": {
                name: each.group_size for name, each in chosen.items() if each.group_size != usual_group
            },
        },
    }


def _spend(chosen: dict[str, Candidate], menus: Mapping[str, Sequence[Candidate]], left: float) -> None:
    """Makes the exchange that saves most loss with the bytes left, again and again."""
    while True:
        exchanges = [
            (candidate.loss - old.loss, name, candidate)
            for name, old in chosen.items()
            for candidate in menus[name]
            if candidate.loss < old.loss and candidate.num_bytes - old.num_bytes <= left
        ]
        if not exchanges:
            return
        _, name, candidate = min(exchanges)
        left -= candidate.num_bytes - chosen[name].num_bytes
        chosen[name] = candidate


def _one_more(
    short: Allocation, menus: Mapping[str, Sequence[Candidate]], max_loss: float
) -> Iterator[dict[str, Candidate]]:
    """Yields the plan that gets below a loss by the smallest single exchange, if one does."""
    exchanges = [
        (candidate.num_bytes - old.num_bytes, name, candidate)
        for name, old in short.chosen.items()
        for candidate in menus[name]
        if candidate.loss < old.loss
    ]
    for _, name, candidate in sorted(exchanges):
        plan = short.chosen | {name: candidate}
        if short.loss + candidate.loss - short.chosen[name].loss <= max_loss and total(plan).loss <= max_loss:
            yield plan
            return


def _give_back(chosen: dict[str, Candidate], menus: Mapping[str, Sequence[Candidate]], max_loss: float) -> Allocation:
    """Makes the exchange that saves most bytes with the loss to spare, again and again."""
    plan = total(chosen)
    while True:
        spare = max_loss - plan.loss
        exchanges = [
            (candidate.num_bytes - old.num_bytes, name, candidate)
            for name, old in plan.chosen.items()
            for candidate in menus[name]
            if candidate.num_bytes < old.num_bytes and candidate.loss - old.loss <= spare
        ]
        better = (total(plan.chosen | {name: candidate}) for _, name, candidate in sorted(exchanges))
        smaller = next((each for each in better if each.loss <= max_loss), None)  # sums round
        if smaller is None:
            return plan
        plan = smaller


def total(chosen: dict[str, Candidate]) -> Allocation:
    """Adds up what was chosen."""
    parts = chosen.values()
    return Allocation(chosen, sum(part.num_bytes for part in parts), sum(part.loss for part in parts))


def _slope(before: Candidate, after: Candidate) -> float:
    return (after.loss - before.loss) / (after.num_bytes - before.num_bytes)


def _most_common(values: Iterable[int]) -> int:
    counts: dict[int, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return max(sorted(counts), key=lambda value: counts[value])
