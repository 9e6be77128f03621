# SPDX-License-Identifier: Apache-2.0
"""Shapes and exact stored bytes of a linear layer in every form.

Stored bytes of a packed layer with n inputs and m outputs, at b bits and group size g (the GPTQ checkpoint format):

    qweight  n·m·b/8      scales  2·m·⌈n/g⌉ (float16)      qzeros  m·⌈n/g⌉·b/8      g_idx  4·n (int32)      bias  2·m

In the pivoted form the second factor has m − r outputs, and the order of outputs takes 2·m (int16; int32 above 32768). In
the column-pivoted form the first has n − r inputs, and the order of inputs takes 2·n. In the grouped form layers with one
input share `down`, which is stored once, with the first of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lord_quant.config import FLOAT_BITS, FORMS
from lord_quant.modules import order_dtype


PACK_MULTIPLE = 32
TWO_FACTOR, PIVOTED, COLUMN_PIVOTED, GROUPED = FORMS


class Packing(NamedTuple):
    """How a linear layer is packed: bits of its weights (16 for float) and inputs per scale."""

    bits: int
    group_size: int


class LinearBytes(NamedTuple):
    """Stored bytes of one linear layer: its weight with all that belongs to it, and its bias."""

    weight: int
    bias: int


def linear_bytes(in_features: int, out_features: int, bias: bool, bits: int, group_size: int, itemsize: int) -> LinearBytes:
    """Returns the bytes a linear layer takes in the checkpoint; `itemsize` is that of float tensors."""
    if bits == FLOAT_BITS:
        return LinearBytes(in_features * out_features * itemsize, bias * out_features * itemsize)
    groups = math.ceil(in_features / group_size)
    packed = in_features * out_features * bits // 8
    scales, zeros = 2 * out_features * groups, out_features * groups * bits // 8
    return LinearBytes(packed + scales + zeros + 4 * in_features, bias * 2 * out_features)


def factor_shapes(in_features: int, out_features: int, rank: int, form: str) -> dict[str, tuple[int, int]]:
    """Returns (in_features, out_features) of both factors of a layer, by suffix; of a group's, all outputs together."""
    taken = in_features - rank if form == COLUMN_PIVOTED else in_features
    predicted = out_features - rank if form == PIVOTED else out_features
    return {".down": (taken, rank), ".up": (rank, predicted)}


def num_weights(shapes: dict[str, tuple[int, int]]) -> int:
    """Counts the weights of factors."""
    return sum(inputs * outputs for inputs, outputs in shapes.values())


def order_bytes(in_features: int, out_features: int, form: str) -> int:
    """Returns the bytes of a layer's order of outputs or inputs; none where the form has no pivots."""
    ordered = {PIVOTED: out_features, COLUMN_PIVOTED: in_features}.get(form, 0)
    return order_dtype(ordered).itemsize * ordered


def pivoted_forms(in_features: int, out_features: int) -> tuple[str, ...]:
    """Returns which pivoted forms suit a layer: pivots among the inputs do where there are more outputs than inputs."""
    return (PIVOTED, COLUMN_PIVOTED) if out_features > in_features else (PIVOTED,)


def rank_step(group_size: int) -> int:
    """Ranks are multiples of this: lcm(32, group_size)."""
    return math.lcm(PACK_MULTIPLE, group_size)
