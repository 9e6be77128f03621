# SPDX-License-Identifier: Apache-2.0
"""Which rank a layer gets, and which ranks are legal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lord_quant.config import GROUP_SIZES, LowrankConfig
from lord_quant.errors import ConfigError, RankError
from lord_quant.sizes.layer_bytes import COLUMN_PIVOTED, factor_shapes, num_weights, rank_step
from lord_quant.targets import LinearSite, find_matching


class Unit(NamedTuple):
    """What is decomposed as one: a layer, or layers with one input as the layer that all their outputs make.

    Attributes:
        site: The layer; of several it has the first one's name.
        form: How it is stored if it is decomposed.
    """

    site: LinearSite
    form: str

    @property
    def smaller(self) -> int:
        """The full rank."""
        return min(self.site.in_features, self.site.out_features)

    def largest(self, step: int) -> int:
        """Returns the largest multiple of `step` with which there is something left for both factors; 0 without one."""
        rank, shape = self.smaller // step * step, (self.site.in_features, self.site.out_features)
        whole = any(0 in sizes for sizes in factor_shapes(*shape, rank, self.form).values())
        return rank - step if rank and whole else rank

    def shrinks(self, rank: int) -> bool:
        """Tells whether factors of a rank hold fewer weights than the layer."""
        inputs, outputs = self.site.in_features, self.site.out_features
        return num_weights(factor_shapes(inputs, outputs, rank, self.form)) < inputs * outputs


def choose_rank(unit: Unit, lowrank: LowrankConfig, explicit: int | None, group_size: int) -> tuple[int | None, str]:
    """Returns the rank of a targeted layer, or None and the reason; there is none where it was not asked for.

    Args:
        unit: The layer, or the layers it is grouped with.
        lowrank: How ranks are chosen.
        explicit: Its own rank, if `rank_pattern` has one.
        group_size: Inputs per scale of `up`, and of what else has as many inputs as the rank leaves.
    """
    if 1 in (lowrank.rank_ratio, lowrank.param_ratio) or (lowrank.rank_pattern is not None and explicit is None):
        return None, ""
    inputs, outputs = unit.site.in_features, unit.site.out_features
    if explicit is not None:
        wanted: float = explicit
    elif lowrank.rank_ratio is not None:
        wanted = lowrank.rank_ratio * unit.smaller
    elif lowrank.param_ratio is not None:
        wanted = lowrank.param_ratio * inputs * outputs / (inputs + outputs)
    else:
        raise ConfigError("no rank is chosen: wanted rank_ratio, param_ratio or rank_pattern")
    step = rank_step(group_size)
    # The tolerance keeps 0.3 * 320 = 96.00000000000001 from snapping to the next multiple.
    rank = step * max(1, math.ceil(wanted / step - 1e-9))
    if rank > unit.smaller:
        rank = unit.smaller // step * step
        if not rank or not lowrank.force_rank:
            return None, f"dense: rank {wanted:.0f} snaps up past the full rank {unit.smaller}"
    if any(0 in shape for shape in factor_shapes(inputs, outputs, rank, unit.form).values()):
        return None, f"dense: the {unit.form} form at rank {rank} is the layer itself"
    if not unit.shrinks(rank) and not lowrank.force_rank:
        return None, f"dense: rank {rank} would not make it smaller"
    return rank, ""


def divides_rank(name: str, form: str, sizes: Mapping[str, int], group_size: int) -> int:
    """Returns the group size that must divide a layer's rank: `up`'s, or also `down`'s if the rank is taken off its inputs.

    Args:
        name: The layer.
        form: How it is stored if it is decomposed.
        sizes: Group sizes by full path of a factor, powers of 2 like all.
        group_size: That of the others.
    """
    up, down = (sizes.get(f"{name}.{factor}", group_size) for factor in ("up", "down"))
    return max(up, down) if form == COLUMN_PIVOTED else up


def explicit_ranks(
    sites: Sequence[LinearSite],
    lowrank: LowrankConfig,
    targeted: frozenset[str],
    units: Mapping[str, Unit],
    group_sizes: Mapping[str, int],
) -> dict[str, int]:
    """Returns the ranks of `rank_pattern` by full path; later entries win.

    Raises:
        RankError: One is illegal, or of a layer that is no target (all are named).
    """
    ranks, problems = {}, []
    for pattern, rank in (lowrank.rank_pattern or {}).items():
        for name in sorted(find_matching(pattern, sites)):
            step = rank_step(group_sizes[name])
            if rank % step or rank > units[name].smaller:
                largest = units[name].largest(step)
                hint = f"nearest: {min(max(step, round(rank / step) * step), largest)}" if largest else "there is none"
                limit = largest or units[name].smaller
                problems.append(f"  {name}: rank {rank}; wanted a multiple of {step} up to {limit}, {hint}")
            if name not in targeted:
                problems.append(f"  {name}: has a rank but is not among the targets; wanted it in one or not in the other")
            ranks[name] = rank
    if problems:
        raise RankError("\n".join(["illegal ranks in rank_pattern:", *problems]))
    return ranks


def nothing_decomposed(notes: Mapping[str, str], units: Mapping[str, Unit], group_sizes: Mapping[str, int]) -> str:
    """Says why no layer would be decomposed, and what would help.

    Args:
        notes: Why layers of one block stay dense, by full path.
        units: What is decomposed as one, by layer.
        group_sizes: Group sizes of `up`, by layer.
    """
    sizes = sorted(set(group_sizes.values()))
    steps, groups = (", ".join(map(str, values)) for values in (map(rank_step, sizes), sizes))
    lines = [f"no layer would be decomposed: ranks snap up to multiples of {steps} (group size {groups})"]
    for name, note in notes.items():
        unit = units[name]
        largest = _largest_shrinking(unit, rank_step(group_sizes[name]))
        legal = f"largest rank that shrinks it: {largest}" if largest else "no legal rank shrinks it"
        lines.append(f"  {name} {unit.site.out_features}x{unit.site.in_features} {note}; {legal}")
    smaller_groups = f", a --group-size below {sizes[-1]}" if sizes[-1] > min(GROUP_SIZES) else ""
    lines.append(
        f"choose a smaller ratio{smaller_groups}, --force-rank for studies, or --rank-ratio 1 for quantization only"
    )
    return "\n".join(lines)


def _largest_shrinking(unit: Unit, step: int) -> int:
    return next((rank for rank in range(unit.smaller // step * step, 0, -step) if unit.shrinks(rank)), 0)
