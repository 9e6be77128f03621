# SPDX-License-Identifier: Apache-2.0
"""A budget in, a plan out: form, rank, bits and group size of every layer, chosen from what each would lose.

The problem. Every layer ℓ has a menu of candidates c with exact stored bytes b_ℓc and predicted loss f_ℓc
(`losses/probe.py`). Choose one each so that Σ f is least with Σ b within the budget: a multiple-choice knapsack.

The solution. For a price λ per byte every layer chooses alone: the candidate with least f + λ b, which lies on the lower
convex hull of its menu. As λ falls, layers step along their hulls, and the steps, sorted by what they save per byte, are
the exact answer for every budget that a whole number of steps reaches (Everett, Operations Research 11(3), 1963). Steps
that no longer fit are passed over, and what is left of the budget goes to the best single exchanges, hull or not, until
none fits. Uniform plans are always compared: the answer is never predicted to be worse than any of them.

Layers with one input may be grouped, so they choose together: what they would choose one by one along their merged hulls,
or a bottleneck they share. Such a unit's menu has choices for all its layers.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lord_quant.budgets.menu import DENSE, Candidate, Choice, Menu, Sized, undominated
from lord_quant.errors import BudgetError
from lord_quant.losses.probe import LayerLoss
from lord_quant.targets import LinearSite


class Allocation(NamedTuple):
    """The chosen candidates, by layer, and what they add up to."""

    chosen: dict[str, Candidate]
    num_bytes: int
    loss: float


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
    return undominated([*choices, *grouped])


def _choice(parts: Mapping[str, Candidate]) -> Choice:
    whole = total(dict(parts))
    return Choice(whole.num_bytes, whole.loss, tuple(parts.items()))


class Frontier:
    """The best plans of a model at every price: convex hulls of all menus, and their steps in one sorted sequence.

    Args:
        menus: Choices by unit.
        others: Plans to be compared, such as `uniform_plans`.
    """

    def __init__(self, menus: Sequence[Sequence[Choice]], others: Iterable[Allocation] = ()) -> None:
        self.menus, self.others = menus, tuple(others)
        self.hulls = [lower_hull(menu) for menu in menus]
        steps = [
            (_slope(before, after), unit, position)
            for unit, hull in enumerate(self.hulls)
            for position, (before, after) in enumerate(itertools.pairwise(hull))
        ]
        self.steps = [(unit, position) for _, unit, position in sorted(steps)]

    def within(self, budget: float) -> Allocation:
        """Returns the plan of least loss that takes at most so many bytes.

        Raises:
            BudgetError: Not even the smallest choices fit.
        """
        chosen = [hull[0] for hull in self.hulls]
        smallest = sum(choice.num_bytes for choice in chosen)
        left, at = budget - smallest, [0] * len(chosen)
        if left < 0:
            raise BudgetError(f"the budget is {budget:.0f} bytes for the linear layers; the smallest plan takes {smallest}")
        for unit, position in self.steps:
            size = self.hulls[unit][position + 1].num_bytes - chosen[unit].num_bytes
            if at[unit] == position and size <= left:
                at[unit] += 1
                left -= size
                chosen[unit] = self.hulls[unit][position + 1]
        _spend(chosen, self.menus, left)
        fitting = [_allocation(chosen), *(other for other in self.others if other.num_bytes <= budget)]
        return min(fitting, key=lambda allocation: allocation.loss)

    def below(self, max_loss: float) -> Allocation:
        """Returns the smallest plan that loses at most so much.

        The first steps that get there are the answer for a limit that they meet exactly. Otherwise the last of them is one
        too many and all but the last are one too few: both are improved by exchanges, and the smaller is taken.

        Raises:
            BudgetError: Not even the choices of least loss do.
        """
        count = bisect.bisect_left(range(len(self.steps) + 1), True, key=lambda n: _loss(self._after(n)) <= max_loss)
        if count > len(self.steps):
            least = _loss(self._after(len(self.steps)))
            raise BudgetError(f"the loss is to be at most {max_loss:g}; the plan of least loss loses {least:g}")
        plans = [self._after(count)]
        if count:
            plans += _one_more(self._after(count - 1), self.menus, max_loss)
        found = [_allocation(_give_back(plan, self.menus, max_loss)) for plan in plans]
        found += [other for other in self.others if other.loss <= max_loss]
        best = min(found, key=lambda allocation: (allocation.num_bytes, allocation.loss))
        return self._tightened(best, max_loss)

    def _tightened(self, best: Allocation, max_loss: float) -> Allocation:
        """Takes the plan for a byte less, as long as it is good enough: its exchanges are others than `below` makes."""
        smallest = sum(hull[0].num_bytes for hull in self.hulls)
        while best.num_bytes > smallest:
            tighter = self.within(best.num_bytes - 1)
            if tighter.loss > max_loss:
                break
            best = tighter
        return best

    def _after(self, count: int) -> list[Choice]:
        """Returns where the first so many steps lead."""
        chosen = [hull[0] for hull in self.hulls]
        for unit, position in self.steps[:count]:
            chosen[unit] = self.hulls[unit][position + 1]
        return chosen


def lower_hull(menu: Sequence[Sized]) -> list[Sized]:
    """Returns what is best at some price per byte, smallest first; losses fall ever more slowly."""
    hull: list[Sized] = []
    for candidate in undominated(menu):
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
    gptq = {"bits": usual_bits, "group_size": usual_group}
    return {"lowrank": lowrank, "gptq": gptq | {f"{what}_pattern": _pattern(chosen, what, gptq[what]) for what in gptq}}


def _pattern(chosen: Mapping[str, Candidate], what: str, usual: int) -> dict[str, int]:
    """Returns the bits or group sizes that are not the usual: of layers, or of factors where the two of a layer differ."""
    pattern: dict[str, int] = {}
    for name, each in chosen.items():
        down, up = getattr(each, what), getattr(each, f"up_{what}")
        own: dict[str, int] = {"": down} if down == up else {".down": down, ".up": up}
        if each.leader not in ("", name):
            own.pop(".down", None)  # its leader's
        pattern |= {name + suffix: value for suffix, value in own.items() if value != usual}
    return pattern


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


def _one_more(short: list[Choice], menus: Sequence[Sequence[Choice]], max_loss: float) -> list[list[Choice]]:
    """Returns the plan that gets below a loss by the smallest single exchange, if one does."""
    exchanges = [
        (choice.num_bytes - old.num_bytes, unit, choice)
        for unit, old in enumerate(short)
        for choice in menus[unit]
        if choice.loss < old.loss
    ]
    for _, unit, choice in sorted(exchanges, key=lambda each: each[:2]):
        plan = _exchanged(short, unit, choice)
        if _loss(plan) <= max_loss:
            return [plan]
    return []


def _give_back(chosen: list[Choice], menus: Sequence[Sequence[Choice]], max_loss: float) -> list[Choice]:
    """Makes the exchange that saves most bytes with the loss to spare, again and again."""
    while True:
        spare = max_loss - _loss(chosen)
        exchanges = [
            (choice.num_bytes - old.num_bytes, unit, choice)
            for unit, old in enumerate(chosen)
            for choice in menus[unit]
            if choice.num_bytes < old.num_bytes and choice.loss - old.loss <= spare
        ]
        ordered = sorted(exchanges, key=lambda each: each[:2])
        plans = (_exchanged(chosen, unit, choice) for _, unit, choice in ordered)
        smaller = next((plan for plan in plans if _loss(plan) <= max_loss), None)  # sums round
        if smaller is None:
            return chosen
        chosen = smaller


def _exchanged(chosen: Sequence[Choice], unit: int, choice: Choice) -> list[Choice]:
    return [*chosen[:unit], choice, *chosen[unit + 1 :]]


def _loss(chosen: Iterable[Choice]) -> float:
    return sum(part.loss for choice in chosen for _, part in choice.parts)  # as `total` adds, to the last bit


def _allocation(chosen: Iterable[Choice]) -> Allocation:
    return total({name: part for choice in chosen for name, part in choice.parts})


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
