# SPDX-License-Identifier: Apache-2.0
"""What becomes of every linear layer: rank, bits, exact stored bytes. Pure arithmetic on shapes, no model.

Every layer has its own bits and group size, which its factors share. Ranks are snapped *up* to a multiple of
lcm(32, group_size), at every bit width alike: packing wants features in multiples of 32, 4-bit CPU kernels want whole
groups, and float and quantized runs of one command line must have the same ranks to be comparable. A layer whose two
factors would not be smaller than itself stays dense unless forced.

Stored bytes of a packed layer with n inputs and m outputs, at b bits and group size g (the GPTQ checkpoint format):

    qweight  n·m·b/8      scales  2·m·⌈n/g⌉ (float16)      qzeros  m·⌈n/g⌉·b/8      g_idx  4·n (int32)      bias  2·m

In the pivoted form the second factor has m − r outputs, and the order of outputs takes 2·m (int16; int32 above 32768).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from lord_quant.config import FLOAT_BITS, FORMS, GROUP_SIZES, GptqConfig, LowrankConfig
from lord_quant.errors import ConfigError, GroupSizeError, RankError
from lord_quant.modules import order_dtype
from lord_quant.targets import LinearSite, find_matching, select


PACK_MULTIPLE = 32
TWO_FACTOR, PIVOTED = FORMS
_Value = TypeVar("_Value")


class Packing(NamedTuple):
    """How a layer is packed: bits of its weights (16 for float) and inputs per scale."""

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
    """Returns (in_features, out_features) of both factors of a layer, by suffix."""
    predicted = out_features - rank if form == PIVOTED else out_features
    return {".down": (in_features, rank), ".up": (rank, predicted)}


def order_bytes(out_features: int) -> int:
    """Returns the bytes of a pivoted layer's order of outputs."""
    return order_dtype(out_features).itemsize * out_features


@dataclass(frozen=True)
class LayerPlan:
    """The fate of one linear layer.

    Attributes:
        name: Full module path.
        block: Index of the transformer block.
        in_features: Input features.
        out_features: Output features.
        has_bias: Whether the dense layer has a bias.
        rank: Rank of the factors, or None for a layer that stays dense.
        adds_bias: Whether the factors get a bias the dense layer did not have.
        weight_bytes: Stored bytes of weights, scales, zeros and indices.
        bias_bytes: Stored bytes of the bias.
        note: Why a targeted layer stays dense; empty otherwise.
        form: How a decomposed layer is stored: `two_factor` or `pivoted`.
        bits: Bits of its packed weights; 16 for float.
        group_size: Inputs per scale.
    """

    name: str
    block: int
    in_features: int
    out_features: int
    has_bias: bool
    rank: int | None
    adds_bias: bool
    weight_bytes: int
    bias_bytes: int
    note: str = ""
    form: str = TWO_FACTOR
    bits: int = FLOAT_BITS
    group_size: int = PACK_MULTIPLE

    @property
    def dense_weights(self) -> int:
        """Number of weights of the dense layer."""
        return self.in_features * self.out_features

    @property
    def weights(self) -> int:
        """Number of weights after decomposition."""
        return sum(inputs * outputs for inputs, outputs in self.factor_shapes().values())

    @property
    def counted_bytes(self) -> int:
        """Bytes that count towards bits per weight: weights with scales, zeros, indices, and any added bias."""
        return self.weight_bytes + (self.bias_bytes if self.adds_bias else 0)

    @property
    def bpw(self) -> float:
        """Stored bits per weight of the dense layer."""
        return 8 * self.counted_bytes / self.dense_weights

    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns (in_features, out_features) of each linear layer this one becomes, by suffix."""
        if self.rank is None:
            return {"": (self.in_features, self.out_features)}
        return factor_shapes(self.in_features, self.out_features, self.rank, self.form)


@dataclass(frozen=True)
class Plan:
    """What becomes of every linear layer of a model.

    Attributes:
        layers: One entry per linear layer of the transformer blocks, in registration order.
        bits: Bits of packed weights where a layer's own say nothing else; 16 for float, everywhere.
        group_size: Inputs per scale, likewise.
        mean_correction: Whether decomposed layers carry a bias corrected for the mean.
        other_bytes: Stored bytes of everything else: embeddings, norms, head.
    """

    layers: tuple[LayerPlan, ...]
    bits: int
    group_size: int
    mean_correction: bool
    other_bytes: int

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Rank of every decomposed layer by full module path; what the checkpoint records."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    @property
    def form_pattern(self) -> dict[str, str]:
        """Form of every decomposed layer that is not `two_factor`, by full module path; what the checkpoint records."""
        return {layer.name: layer.form for layer in self.layers if layer.rank is not None and layer.form != TWO_FACTOR}

    @property
    def bits_pattern(self) -> dict[str, int]:
        """Bits of every layer whose bits are not the plan's, by full module path; what the checkpoint records."""
        return {layer.name: layer.bits for layer in self.layers if layer.bits != self.bits}

    @property
    def group_size_pattern(self) -> dict[str, int]:
        """Group size of every layer whose own is not the plan's, by full module path; what the checkpoint records."""
        return {layer.name: layer.group_size for layer in self.layers if layer.group_size != self.group_size}

    @property
    def packings(self) -> dict[str, Packing]:
        """How every linear layer that there will be is packed, factors included, by full module path."""
        return {
            layer.name + suffix: Packing(layer.bits, layer.group_size)
            for layer in self.layers
            for suffix in layer.factor_shapes()
        }

    @property
    def mixed(self) -> bool:
        """Whether some packed layers differ from the others in bits or group size."""
        return self.bits != FLOAT_BITS and bool(self.bits_pattern or self.group_size_pattern)

    @property
    def block_path(self) -> str:
        """Module path of the list of transformer blocks."""
        first = self.layers[0]
        return first.name.split(f".{first.block}.", 1)[0]

    @property
    def bpw(self) -> float:
        """Stored bits per dense weight over all linear layers: weights, scales, zeros, indices and added biases."""
        return 8 * sum(layer.counted_bytes for layer in self.layers) / sum(layer.dense_weights for layer in self.layers)

    @property
    def param_ratio(self) -> float:
        """Fraction of the linear layers' weights kept."""
        return sum(layer.weights for layer in self.layers) / sum(layer.dense_weights for layer in self.layers)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors in the checkpoint."""
        return self.other_bytes + sum(layer.weight_bytes + layer.bias_bytes for layer in self.layers)

    @property
    def scheme(self) -> str:
        """Short label such as ``lord-0.80-w4g64``, or ``lord-0.80-mixed`` where layers differ."""
        form = "-pivoted" if self.form_pattern else ""
        kept = f"lord-{self.param_ratio:.2f}{form}" if self.rank_pattern else "dense"
        packing = "float" if self.bits == FLOAT_BITS else f"w{self.bits}g{self.group_size}"
        return f"{kept}-{'mixed' if self.mixed else packing}"


def rank_step(group_size: int) -> int:
    """Ranks are multiples of this: lcm(32, group_size)."""
    return math.lcm(PACK_MULTIPLE, group_size)


def choose_group_size(sites: Iterable[LinearSite], bits: int) -> int:
    """Returns the largest of 128, 64, 32 that divides the inputs of every layer; for float, 32 where none does.

    Raises:
        GroupSizeError: None does, and weights are to be packed.
    """
    features = {site.in_features for site in sites}
    for size in (128, 64, 32):
        if all(n % size == 0 for n in features):
            return size
    if bits == FLOAT_BITS:
        return PACK_MULTIPLE
    odd = sorted(n for n in features if n % 32)
    raise GroupSizeError(f"no group size suits layers with {odd} inputs; wanted multiples of 32. Use --bits 16")


def check_packable(sites: Sequence[LinearSite], bits: int, group_size: int, own: Mapping[str, int] | None = None) -> None:
    """Refuses shapes that cannot be packed, naming every layer; does nothing for float.

    `own` has the group sizes, by full path, of layers whose group size is not `group_size`.

    Raises:
        GroupSizeError: Features are no multiple of 32, or inputs no multiple of the group size.
    """
    if bits == FLOAT_BITS:
        return
    problems = []
    for site in sites:
        size = (own or {}).get(site.name, group_size)
        if site.in_features % PACK_MULTIPLE or site.out_features % PACK_MULTIPLE:
            shape = f"{site.out_features}x{site.in_features}"
            problems.append(f"  {site.name}: {shape}; wanted multiples of {PACK_MULTIPLE} on both sides")
        elif site.in_features % size:
            legal = [other for other in GROUP_SIZES if site.in_features % other == 0]
            found = f"group size {size} does not divide {site.in_features} inputs"
            problems.append(f"  {site.name}: {found}; nearest: {min((abs(other - size), other) for other in legal)[1]}")
    if problems:
        raise GroupSizeError("\n".join(["layers that cannot be packed:", *problems]))


def build_plan(
    sites: Sequence[LinearSite],
    lowrank: LowrankConfig,
    gptq: GptqConfig,
    *,
    itemsize: int,
    other_bytes: int,
) -> Plan:
    """Decides every layer and checks that the result is legal.

    Args:
        sites: The linear layers of the model.
        lowrank: Which layers, which ranks, which forms.
        gptq: Bits and group sizes.
        itemsize: Bytes of a float value in the checkpoint.
        other_bytes: Bytes of all other tensors.

    Raises:
        TargetError: A pattern matches nothing.
        GroupSizeError: A shape cannot be packed.
        RankError: An explicit rank is illegal, a layer has a form but no rank, or ratios below 1 leave every layer dense.
    """
    group_size = gptq.group_size or choose_group_size(sites, gptq.bits)
    bits, sizes = _by_name(gptq.bits_pattern, sites), _by_name(gptq.group_size_pattern, sites)
    forms = _by_name(lowrank.form_pattern, sites)
    check_packable(sites, gptq.bits, group_size, sizes)
    packings = {site.name: Packing(bits.get(site.name, gptq.bits), sizes.get(site.name, group_size)) for site in sites}
    targeted = select(sites, lowrank.targets, lowrank.ignore)
    explicit = _explicit_ranks(sites, lowrank, targeted, packings)
    layers = []
    for site in sites:
        rank, note, form = None, "", forms.get(site.name, lowrank.form)
        if site.name in targeted:
            rank, note = _rank(site, lowrank, explicit, form, rank_step(packings[site.name].group_size))
        layers.append(_layer_plan(site, rank, note, form, lowrank.mean_correction, packings[site.name], itemsize))
    plan = Plan(tuple(layers), gptq.bits, group_size, lowrank.mean_correction, other_bytes)
    asked = lowrank.rank_pattern or min(lowrank.rank_ratio or 1, lowrank.param_ratio or 1) < 1
    if asked and not plan.rank_pattern:
        raise RankError(_nothing_decomposed(plan))
    formless = [layer for layer in layers if layer.name in forms and layer.rank is None]
    if formless:
        lines = [f"  {layer.name}: {layer.note or 'dense'}; wanted a rank for it, or no form" for layer in formless]
        raise RankError("\n".join(["form_pattern names layers without a rank:", *lines]))
    return plan


def _by_name(pattern: Mapping[str, _Value] | None, sites: Sequence[LinearSite]) -> dict[str, _Value]:
    """Returns a value by layer pattern as a value by full path; later entries win."""
    return {name: value for key, value in (pattern or {}).items() for name in sorted(find_matching(key, sites))}


def _layer_plan(
    site: LinearSite, rank: int | None, note: str, form: str, mean_correction: bool, packing: Packing, itemsize: int
) -> LayerPlan:
    adds_bias = rank is not None and mean_correction and not site.has_bias
    has_bias = site.has_bias or adds_bias
    if rank is None:
        parts = [linear_bytes(site.in_features, site.out_features, has_bias, *packing, itemsize)]
    else:
        shapes = factor_shapes(site.in_features, site.out_features, rank, form)
        biased = {".down": has_bias and form == PIVOTED, ".up": has_bias}
        parts = [linear_bytes(*shapes[part], biased[part], *packing, itemsize) for part in shapes]
        if form == PIVOTED:
            parts.append(LinearBytes(order_bytes(site.out_features), 0))
    weight, bias = sum(part.weight for part in parts), sum(part.bias for part in parts)
    return LayerPlan(*site, rank, adds_bias, weight, bias, note, form, *packing)


def _rank(
    site: LinearSite, lowrank: LowrankConfig, explicit: dict[str, int], form: str, step: int
) -> tuple[int | None, str]:
    """Returns the rank of one targeted layer, or None and the reason."""
    smaller, dense = min(site.in_features, site.out_features), site.in_features * site.out_features
    if 1 in (lowrank.rank_ratio, lowrank.param_ratio) or (lowrank.rank_pattern is not None and site.name not in explicit):
        return None, ""
    if lowrank.rank_pattern is not None:
        wanted: float = explicit[site.name]
    elif lowrank.rank_ratio is not None:
        wanted = lowrank.rank_ratio * smaller
    elif lowrank.param_ratio is not None:
        wanted = lowrank.param_ratio * dense / (site.in_features + site.out_features)
    else:
        raise ConfigError("no rank is chosen: wanted rank_ratio, param_ratio or rank_pattern")
    # The tolerance keeps 0.3 * 320 = 96.00000000000001 from snapping to the next multiple.
    rank = step * max(1, math.ceil(wanted / step - 1e-9))
    if rank > smaller:
        rank = smaller // step * step
        if not rank or not lowrank.force_rank:
            return None, f"dense: rank {wanted:.0f} snaps up past the full rank {smaller}"
    if form == PIVOTED and rank >= site.out_features:
        return None, f"dense: the pivoted form at rank {rank} is the layer itself"
    shapes = factor_shapes(site.in_features, site.out_features, rank, form)
    if sum(math.prod(shape) for shape in shapes.values()) >= dense and not lowrank.force_rank:
        return None, f"dense: rank {rank} would not make it smaller"
    return rank, ""


def _explicit_ranks(
    sites: Sequence[LinearSite], lowrank: LowrankConfig, targeted: frozenset[str], packings: Mapping[str, Packing]
) -> dict[str, int]:
    ranks, problems = {}, []
    by_name = {site.name: site for site in sites}
    for pattern, rank in (lowrank.rank_pattern or {}).items():
        for name in sorted(find_matching(pattern, sites)):
            smaller = min(by_name[name].in_features, by_name[name].out_features)
            step = rank_step(packings[name].group_size)
            if rank % step or rank > smaller:
                nearest = max(step, min(round(rank / step) * step, smaller // step * step))
                hint = f"nearest: {nearest}" if nearest <= smaller else "there is none"
                problems.append(f"  {name}: rank {rank}; wanted a multiple of {step} up to {smaller}, {hint}")
            if name not in targeted:
                problems.append(f"  {name}: has a rank but is not among the targets; wanted it in one or not in the other")
            ranks[name] = rank
    if problems:
        raise RankError("\n".join(["illegal ranks in rank_pattern:", *problems]))
    return ranks


def _largest_shrinking_rank(layer: LayerPlan) -> int:
    """Returns the largest legal rank at which a layer's factors are smaller than itself, or 0."""
    smaller, step = min(layer.in_features, layer.out_features), rank_step(layer.group_size)
    for rank in range(smaller // step * step, 0, -step):
        shapes = factor_shapes(layer.in_features, layer.out_features, rank, layer.form)
        if sum(math.prod(shape) for shape in shapes.values()) < layer.dense_weights:
            return rank
    return 0


def _nothing_decomposed(plan: Plan) -> str:
    sizes = sorted({layer.group_size for layer in plan.layers})
    steps, groups = (", ".join(map(str, values)) for values in (map(rank_step, sizes), sizes))
    lines = [f"no layer would be decomposed: ranks snap up to multiples of {steps} (group size {groups})"]
    for layer in plan.layers:
        if layer.block == plan.layers[0].block and layer.note:
            largest = _largest_shrinking_rank(layer)
            legal = f"largest rank that shrinks it: {largest}" if largest > 0 else "no legal rank shrinks it"
            lines.append(f"  {layer.name} {layer.out_features}x{layer.in_features} {layer.note}; {legal}")
    smaller_groups = f", a --group-size below {sizes[-1]}" if sizes[-1] > min(GROUP_SIZES) else ""
    lines.append(
        f"choose a smaller ratio{smaller_groups}, --force-rank for studies, or --rank-ratio 1 for quantization only"
    )
    return "\n".join(lines)
