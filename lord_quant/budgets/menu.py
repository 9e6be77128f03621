# SPDX-License-Identifier: Apache-2.0
"""What may become of a layer, or of layers with one input: candidates with exact stored bytes and predicted loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from lord_quant.config import FLOAT_BITS, FORMS, GROUP_SIZES, PACKED_BITS
from lord_quant.losses.probe import LayerLoss, noise_at
from lord_quant.sizes.layer_bytes import (
    COLUMN_PIVOTED,
    GROUPED,
    PACK_MULTIPLE,
    TWO_FACTOR,
    factor_shapes,
    linear_bytes,
    num_weights,
    order_bytes,
)
from lord_quant.targets import LinearSite


DENSE = "dense"

RANKS = 64
"""Most ranks tried per form and group size."""


class Candidate(NamedTuple):
    """What may become of a layer.

    Attributes:
        num_bytes: Stored bytes: weights, scales, zeros, indices, added biases.
        loss: Predicted, in nats per token; of grouped layers, all of it with their leader.
        form: `dense`, or one of `config.FORMS`.
        rank: Of its factors, or None.
        bits: Of the dense layer's weights, or of `down`.
        group_size: Inputs per scale, likewise.
        up_bits: Of `up`; of a dense layer, the same as `bits`.
        up_group_size: Inputs per scale of `up`, likewise.
        leader: Of a grouped layer, the full path of the one that holds the `down` it uses; empty otherwise.
    """

    num_bytes: int
    loss: float
    form: str
    rank: int | None
    bits: int
    group_size: int
    up_bits: int
    up_group_size: int
    leader: str = ""


class Choice(NamedTuple):
    """What may become of a unit: one candidate for each of its layers, by full path, and what they add up to."""

    num_bytes: int
    loss: float
    parts: tuple[tuple[str, Candidate], ...]


@dataclass(frozen=True)
class Menu:
    """What candidates there are.

    Attributes:
        forms: Forms allowed; pivoted ones are tried where they suit a layer's shape.
        bits: Bit widths allowed; 16 for float, with no other.
        group_sizes: Group sizes allowed. `up` takes that of `down`, or where it does not divide the rank the largest that
            does.
        mean_correction: Whether factors get a bias their layer did not have.
        itemsize: Bytes of a float value.
        min_param_ratio: Fraction of a layer's weights that its factors must hold.
    """

    forms: tuple[str, ...] = (DENSE, *FORMS)
    bits: tuple[int, ...] = PACKED_BITS
    group_sizes: tuple[int, ...] = GROUP_SIZES
    mean_correction: bool = True
    itemsize: int = 2
    min_param_ratio: float = 0.0

    def of(self, site: LinearSite, loss: LayerLoss) -> list[Candidate]:
        """Returns a layer's candidates, smallest first, without those that another one beats in bytes and in loss."""
        found = []
        for group_size in self._group_sizes(loss):
            if DENSE in self.forms:
                found += [self._dense(site, loss, bits, group_size) for bits in self.bits]
            for form in (TWO_FACTOR, *loss.pivoted):
                if form in self.forms:
                    found += self._factored(site, loss, form, group_size)
        return undominated(found)

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
                    size = linear_bytes(*shapes[".up"], False, each.up_bits, each.up_group_size, self.itemsize).weight
                    if site is sites[0]:
                        size += linear_bytes(*shapes[".down"], False, each.bits, group_size, self.itemsize).weight
                    size += self._added_bias(site)
                    lost = each.loss if site is sites[0] else 0.0
                    own = each._replace(num_bytes=size, loss=lost, leader=sites[0].name)
                    parts.append((site.name, own))
                found.append(Choice(sum(part.num_bytes for _, part in parts), each.loss, tuple(parts)))
        return undominated(found)

    def _group_sizes(self, loss: LayerLoss) -> Iterator[int]:
        return (size for size in self.group_sizes if size in loss.groups)

    def _added_bias(self, site: LinearSite) -> int:
        item = self.itemsize if FLOAT_BITS in self.bits else 2
        return item * site.out_features if self.mean_correction and not site.has_bias else 0

    def _dense(self, site: LinearSite, loss: LayerLoss, bits: int, group_size: int) -> Candidate:
        size = linear_bytes(site.in_features, site.out_features, site.has_bias, bits, group_size, self.itemsize).weight
        return Candidate(size, loss.of_dense(bits, group_size), DENSE, None, bits, group_size, bits, group_size)

    def _factored(self, site: LinearSite, loss: LayerLoss, form: str, group_size: int) -> Iterator[Candidate]:
        """Yields candidates of a form, `RANKS` ranks at most, only where factors hold fewer weights than the layer."""
        if loss.down is None or loss.up is None:
            return
        inputs, outputs = site.in_features, site.out_features
        smaller = min(inputs, outputs)
        step = PACK_MULTIPLE << max(0, math.ceil(math.log2(smaller / PACK_MULTIPLE / RANKS)))
        fixed = self._added_bias(site) + order_bytes(inputs, outputs, form)
        noisier = loss.pivoted.get(form, 1.0)
        whole = float(loss.tail[0])
        for rank in range(step, smaller + 1, step):
            shapes = factor_shapes(inputs, outputs, rank, form)
            kept = num_weights(shapes) / (inputs * outputs)
            if kept >= 1:
                break
            if kept < self.min_param_ratio or (form == COLUMN_PIVOTED and rank % group_size):
                continue
            scale = noisier * (whole - float(loss.tail[rank]))
            up_size = max(size for size in loss.groups if size <= group_size and rank % size == 0)
            sides = [
                {
                    bits: (
                        linear_bytes(*shapes[suffix], False, bits, size, self.itemsize).weight,
                        scale * loss.groups[size] * noise.at(rank) * noise_at(noise.by_bits, bits),
                    )
                    for bits in self.bits
                }
                for suffix, noise, size in ((".down", loss.down, group_size), (".up", loss.up, up_size))
            ]
            for bits, up_bits in self._widths(form):
                (down_bytes, down_loss), (up_bytes, up_loss) = sides[0][bits], sides[1][up_bits]
                size, lost = fixed + down_bytes + up_bytes, float(loss.cut[rank]) + down_loss + up_loss
                yield Candidate(size, lost, form, rank, bits, group_size, up_bits, up_size)

    def _widths(self, form: str) -> list[tuple[int, int]]:
        """Returns the bits of both factors: neighbours among those allowed; of the pivoted forms, the same."""
        apart = 1 if form in (TWO_FACTOR, GROUPED) else 0
        places = dict(enumerate(sorted(self.bits)))
        return [(places[i], places[j]) for i in places for j in places if abs(i - j) <= apart]


Sized = TypeVar("Sized", Candidate, Choice)


def undominated(candidates: Iterable[Sized]) -> list[Sized]:
    """Returns what no other beats in bytes and in loss, smallest first."""
    front: list[Sized] = []
    for candidate in sorted(candidates, key=lambda each: (each.num_bytes, each.loss)):
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    return front


def single(name: str, menu: Iterable[Candidate]) -> list[Choice]:
    """Returns the choices of a layer that chooses alone."""
    return [Choice(each.num_bytes, each.loss, ((name, each),)) for each in menu]
