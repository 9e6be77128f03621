# SPDX-License-Identifier: Apache-2.0
"""Ways to compress one layer: truncations, roundings, sets of different ways that take the same bytes, and their losses."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from agreement import KINDS


if TYPE_CHECKING:
    from bench import Layer

    from lord_quant.losses.probe import LayerLoss

RATIOS = (0.25, 0.5, 0.75, 0.9)
"""Rank ratios of truncation in float."""
RANK_STEP = 32
DENSE_ROUNDING = ((2, 64), (3, 64), (4, 64), (3, 32), (2, 128))
"""Bits and group size of layers rounded dense."""
SET_BITS = (2, 3, 4)
SET_WIDTH = 0.03
"""Largest difference in bytes within a set, relative to its smallest member."""
SETS, SET_MEMBERS = 2, 4


class Choice(NamedTuple):
    """One way to compress a layer.

    Attributes:
        kind: `truncation`, `dense`, or the form of its rounded factors.
        rank: Rank of its factors, or None.
        bits: Of its weights; 16 for factors in float.
        group_size: Inputs per scale.
        num_bytes: Stored bytes, or None in float.
    """

    kind: str
    rank: int | None
    bits: int
    group_size: int
    num_bytes: int | None


def choices(layer: Layer, loss: LayerLoss, seed: int) -> list[Choice]:
    """Returns the ways a layer is compressed: truncations, roundings, and sets of equal bytes; each once."""
    smaller = min(layer.site.in_features, layer.site.out_features)
    ranks = dict.fromkeys(min(smaller, max(1, round(ratio * smaller / RANK_STEP)) * RANK_STEP) for ratio in RATIOS)
    found = [Choice("truncation", rank, 16, RANK_STEP, None) for rank in ranks if rank < smaller]
    every = list(menu(layer, loss))
    found += [choice for choice in every if choice.kind == "dense" and (choice.bits, choice.group_size) in DENSE_ROUNDING]
    for members in equal_sets(every, seed):
        found += members
    return list(dict.fromkeys(found))


def menu(layer: Layer, loss: LayerLoss) -> Iterator[Choice]:
    """Yields what the planner may choose for a layer, form by form and width by width."""
    from lord_quant.budgets.menu import DENSE, Menu
    from lord_quant.sizes.layer_bytes import TWO_FACTOR

    for form in (DENSE, TWO_FACTOR, *loss.pivoted):
        for bits in SET_BITS:
            for size in loss.groups:
                for found in Menu((form,), (bits,), (size,)).of(layer.site, loss):
                    if found.up_group_size == size:  # both factors alike
                        yield Choice(form, found.rank, bits, size, found.num_bytes)


def equal_sets(every: Sequence[Choice], seed: int) -> list[list[Choice]]:
    """Returns sets of choices of nearly equal bytes and different form or bits: the most varied, and far apart."""
    generator = random.Random(seed)
    shuffled = generator.sample(list(every), len(every))  # which rank and group size stand for a form is left to chance
    sets = []
    for smallest in sorted(size(choice) for choice in every):
        near = [choice for choice in shuffled if smallest <= size(choice) <= (1 + SET_WIDTH) * smallest]
        distinct = {(choice.kind, choice.bits): choice for choice in near}
        by_kind = [[choice for choice in distinct.values() if choice.kind == kind] for kind in KINDS]
        in_turn = [choice for turn in zip_longest(*by_kind) for choice in turn if choice is not None]
        sets.append(in_turn[:SET_MEMBERS])
    # Sets with every form come first, then large ones.
    sets.sort(key=lambda members: (len({choice.kind for choice in members}), len(members)), reverse=True)
    chosen: list[list[Choice]] = []
    for members in sets:
        apart = all(abs(math.log(size(members[0]) / size(other[0]))) > 2 * SET_WIDTH for other in chosen)
        if len(members) > 1 and apart and len(chosen) < SETS:
            chosen.append(members)
    return chosen


def size(choice: Choice) -> int:
    """Returns the stored bytes of a choice that has them."""
    assert choice.num_bytes is not None
    return choice.num_bytes


def form_of(choice: Choice) -> str:
    """Returns the form of the factors, if there are any."""
    return "two_factor" if choice.kind in ("truncation", "dense") else choice.kind


def parts(loss: LayerLoss, choice: Choice) -> tuple[float, float]:
    """Returns the predicted losses of truncation and of rounding, as `menu.Menu` adds them up."""
    from lord_quant.sizes.layer_bytes import Packing

    if choice.rank is None:
        return 0.0, loss.of_dense(choice.bits, choice.group_size)
    tail = loss.tail.tolist()
    if choice.kind == "truncation":
        return tail[choice.rank], 0.0
    packing = Packing(choice.bits, choice.group_size)
    noise = loss.of_factors(choice.rank, packing, packing)
    return tail[choice.rank], noise * loss.pivoted.get(choice.kind, 1.0)
