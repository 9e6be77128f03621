# SPDX-License-Identifier: Apache-2.0
"""Which layers can be packed, and in groups of what size.

Packed words hold whole numbers of codes on both sides of a weight, so its sizes must be multiples of 32. A layer that has
others, such as the gate of a shared expert with its one output, stays as it is, in float, beside layers that are packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lord_quant.config import FLOAT_BITS, GROUP_SIZES
from lord_quant.errors import GroupSizeError
from lord_quant.sizes.layer_bytes import PACK_MULTIPLE
from lord_quant.targets import LinearSite


UNPACKABLE = f"stays in float: its sizes are no multiples of {PACK_MULTIPLE}"
"""What a plan notes of a layer that cannot be packed."""


def is_packable(site: LinearSite) -> bool:
    """Tells whether a layer can be packed at all."""
    return site.in_features % PACK_MULTIPLE == 0 and site.out_features % PACK_MULTIPLE == 0


def packable_of(sites: Sequence[LinearSite]) -> list[LinearSite]:
    """Returns the layers that can be packed.

    Raises:
        GroupSizeError: There are none.
    """
    found = [site for site in sites if is_packable(site)]
    if not found:
        shapes = ", ".join(sorted({f"{site.out_features}x{site.in_features}" for site in sites}))
        wanted = f"multiples of {PACK_MULTIPLE} on both sides, as any budget does, or ranks and --bits {FLOAT_BITS}"
        raise GroupSizeError(f"no layer can be packed: they are {shapes}; wanted {wanted}")
    return found


def choose_group_size(sites: Iterable[LinearSite]) -> int:
    """Returns the largest of 128, 64, 32 that divides the inputs of every layer; 32 where none does."""
    features = {site.in_features for site in sites}
    return next((size for size in (128, 64) if all(n % size == 0 for n in features)), PACK_MULTIPLE)


def check_group_sizes(sites: Sequence[LinearSite], group_sizes: Mapping[str, int]) -> None:
    """Refuses group sizes that do not suit the layers that are to have them.

    Args:
        sites: The layers that are packed.
        group_sizes: Inputs per scale by full path, of the layer or of the `down` it becomes.

    Raises:
        GroupSizeError: Inputs are no multiple of the group size (all layers are named).
    """
    problems = []
    for site in sites:
        size = group_sizes[site.name]
        if site.in_features % size:
            legal = [other for other in GROUP_SIZES if site.in_features % other == 0]
            found = f"group size {size} does not divide {site.in_features} inputs"
            problems.append(f"  {site.name}: {found}; nearest: {min((abs(other - size), other) for other in legal)[1]}")
    if problems:
        raise GroupSizeError("\n".join(["layers that cannot be packed:", *problems]))
