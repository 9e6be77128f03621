# SPDX-License-Identifier: Apache-2.0
"""What becomes of every linear layer: rank, bits, exact stored bytes. Pure arithmetic on shapes, no model.

Every layer has its own bits and group size, and so may each of its factors. Ranks are snapped *up* to a multiple of lcm(32,
group size of `up`), at every bit width alike: packing wants features in multiples of 32, 4-bit CPU kernels want whole
groups, and float and quantized runs of one command line must have the same ranks to be comparable. A layer whose two
factors would not be smaller than itself stays dense unless forced.

Layers that are to be grouped are planned as the one layer that all their outputs together make (`sizes/ranks.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from lord_quant.config import FLOAT_BITS, GptqConfig, LowrankConfig
from lord_quant.errors import RankError
from lord_quant.sizes.layer_bytes import (
    GROUPED,
    PACK_MULTIPLE,
    PIVOTED,
    TWO_FACTOR,
    LinearBytes,
    Packing,
    factor_shapes,
    linear_bytes,
    num_weights,
    order_bytes,
)
from lord_quant.sizes.packable import UNPACKABLE, check_group_sizes, choose_group_size, packable_of
from lord_quant.sizes.ranks import Unit, choose_rank, divides_rank, explicit_ranks, nothing_decomposed
from lord_quant.targets import LinearSite, find_matching, matching, select, siblings


FACTORS = (".down", ".up")
SHARED = {"group_size": "group size", "up_group_size": "group size of `up`", "rank": "rank"}
SHARED |= {"up_bits": "bits of `up`", "biased": "bias"}
"""What grouped layers must have in common and what it is called; what follows from another comes after it."""
_Value = TypeVar("_Value")


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
        form: How a decomposed layer is stored, one of `config.FORMS`.
        bits: Bits of its packed weights, or of the `down` it uses; 16 for float.
        group_size: Inputs per scale of its packed weights, or of the `down` it uses.
        up_bits: Bits of `up`; of a layer that stays dense, the same as `bits`.
        up_group_size: Inputs per scale of `up`, likewise.
        leader: Of a grouped layer, the full path of the one that holds the `down` it uses; empty otherwise.
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
    up_bits: int = FLOAT_BITS
    up_group_size: int = PACK_MULTIPLE
    leader: str = ""

    @property
    def dense_weights(self) -> int:
        """Number of weights of the dense layer."""
        return self.in_features * self.out_features

    @property
    def packed(self) -> bool:
        """Whether its weights are quantized."""
        return self.bits != FLOAT_BITS

    @property
    def shape(self) -> str:
        """Outputs and inputs, as they are told."""
        return f"{self.out_features}x{self.in_features}"

    @property
    def biased(self) -> bool:
        """Whether what the layer becomes has a bias."""
        return self.has_bias or self.adds_bias

    @property
    def weights(self) -> int:
        """Number of weights after decomposition; a group's shared factor counts with its leader."""
        return num_weights(self.factor_shapes())

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
        shapes = factor_shapes(self.in_features, self.out_features, self.rank, self.form)
        if self.leader not in ("", self.name):
            del shapes[".down"]
        return shapes

    def packings(self) -> dict[str, Packing]:
        """Returns how each linear layer this one becomes is packed, by suffix."""
        first, up = Packing(self.bits, self.group_size), Packing(self.up_bits, self.up_group_size)
        return {suffix: up if suffix == ".up" else first for suffix in self.factor_shapes()}


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
    def group_pattern(self) -> dict[str, str]:
        """Leader of every grouped layer that uses another's `down`, by full module path; what the checkpoint records."""
        return {layer.name: layer.leader for layer in self.layers if layer.leader not in ("", layer.name)}

    @property
    def unpackable(self) -> list[LayerPlan]:
        """Layers that stay in float beside packed ones, since they cannot be packed."""
        return [layer for layer in self.layers if layer.note == UNPACKABLE]

    @property
    def bits_pattern(self) -> dict[str, int]:
        """Bits that are not the plan's; what the checkpoint records.

        By full module path of the layer, or of the factor where the two of a layer differ.
        """
        return self._pattern("bits")

    @property
    def group_size_pattern(self) -> dict[str, int]:
        """Group sizes that are not the plan's, likewise."""
        return self._pattern("group_size")

    def _pattern(self, what: str) -> dict[str, int]:
        """Returns what layers, or their factors, have of their own."""
        usual, pattern = getattr(self, what), dict[str, int]()
        for layer in self.layers:
            own: dict[str, int] = {suffix: getattr(packing, what) for suffix, packing in layer.packings().items()}
            if getattr(layer, what) == getattr(layer, f"up_{what}"):
                own = {"": getattr(layer, what)}
            pattern |= {layer.name + suffix: value for suffix, value in own.items() if value != usual}
        return pattern

    @property
    def packings(self) -> dict[str, Packing]:
        """How every linear layer that there will be is packed, factors included, by full module path."""
        return {layer.name + suffix: packing for layer in self.layers for suffix, packing in layer.packings().items()}

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
        form = "".join(f"-{form}" for form in sorted(set(self.form_pattern.values())))
        kept = f"lord-{self.param_ratio:.2f}{form}" if self.rank_pattern else "dense"
        packing = "float" if self.bits == FLOAT_BITS else f"w{self.bits}g{self.group_size}"
        return f"{kept}-{'mixed' if self.mixed else packing}"


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
        GroupSizeError: No layer can be packed, or a group size does not suit one.
        RankError: An explicit rank is illegal, a layer has a form but no rank, a factor has bits or a group size but there
            is none, grouped layers are not alike, or ratios below 1 leave every layer dense.
    """
    fitting = sites if gptq.bits == FLOAT_BITS else packable_of(sites)
    odd = {site.name for site in sites} - {site.name for site in fitting}
    group_size = gptq.group_size or choose_group_size(fitting)
    meant = {what: _meant(getattr(gptq, what) or {}, fitting) for what in ("bits_pattern", "group_size_pattern")}
    bits, sizes = (
        {name: getattr(gptq, what)[key] for key, names in keys.items() for name in names} for what, keys in meant.items()
    )
    forms = _by_name(lowrank.form_pattern, fitting)
    targeted = select(sites, lowrank.targets, lowrank.ignore) - odd
    units = _units(sites, lowrank, forms, targeted)
    rank_sizes = {name: divides_rank(name, unit.form, sizes, group_size) for name, unit in units.items()}
    explicit = explicit_ranks(fitting, lowrank, targeted, units, rank_sizes)
    layers = []
    for site in sites:
        unit = units[site.name]
        rank, note = None, UNPACKABLE if site.name in odd else ""
        if site.name in targeted:
            rank, note = choose_rank(unit, lowrank, explicit.get(site.name), rank_sizes[site.name])
        named = (site.name, site.name) if rank is None else (f"{unit.site.name}.down", f"{site.name}.up")
        usual = FLOAT_BITS if site.name in odd else gptq.bits
        down, up = (Packing(bits.get(name, usual), sizes.get(name, group_size)) for name in named)
        layers.append(_layer_plan(site, unit, rank, note, lowrank.mean_correction, down, up, itemsize))
    if gptq.bits != FLOAT_BITS:
        check_group_sizes(fitting, {layer.name: layer.group_size for layer in layers})
    _require_alike(layers, units)
    plan = Plan(tuple(layers), gptq.bits, group_size, lowrank.mean_correction, other_bytes)
    asked = lowrank.rank_pattern or min(lowrank.rank_ratio or 1, lowrank.param_ratio or 1) < 1
    if asked and not plan.rank_pattern:
        noted = {layer.name: layer.note for layer in layers if layer.block == layers[0].block and layer.note}
        raise RankError(nothing_decomposed(noted, units, rank_sizes))
    formless = [layer for layer in layers if layer.name in forms and layer.rank is None]
    if formless:
        lines = [f"  {layer.name}: {layer.note or 'dense'}; wanted a rank for it, or no form" for layer in formless]
        raise RankError("\n".join(["form_pattern names layers without a rank:", *lines]))
    for what, keys in meant.items():
        idle = [key for key, names in keys.items() if names.isdisjoint({*plan.packings, *plan.rank_pattern})]
        if idle:
            listed = ", ".join(map(repr, idle))
            raise RankError(f"{what} names factors that no layer will have: {listed}; wanted a rank for them, or layers")
    return plan


def _by_name(pattern: Mapping[str, _Value] | None, sites: Sequence[LinearSite]) -> dict[str, _Value]:
    """Returns a value by layer pattern as a value by full path; later entries win."""
    return {name: value for key, value in (pattern or {}).items() for name in sorted(find_matching(key, sites))}


def _meant(keys: Iterable[str], sites: Sequence[LinearSite]) -> dict[str, set[str]]:
    """Returns what keys of a packing pattern mean, by full path: layers and both of their factors, or factors alone.

    A key that ends in ``.down`` or ``.up`` and matches no layer means that factor of the layers the rest of it matches.
    """
    found: dict[str, set[str]] = {}
    for key in keys:
        factor = next((suffix for suffix in FACTORS if key.endswith(suffix)), "")
        alone = bool(factor) and not matching(key, sites)
        names = find_matching(key.removesuffix(factor) if alone else key, sites)
        found[key] = {name + suffix for name in names for suffix in ((factor,) if alone else ("", *FACTORS))}
    return found


def _units(
    sites: Sequence[LinearSite], lowrank: LowrankConfig, forms: Mapping[str, str], targeted: frozenset[str]
) -> dict[str, Unit]:
    """Returns what is decomposed as one, by layer: itself, or the siblings it is grouped with; those with none are not."""
    by_name = {site.name: site for site in sites}
    chosen = targeted if lowrank.rank_pattern is None else targeted & _by_name(lowrank.rank_pattern, sites).keys()
    form = {site.name: forms.get(site.name, lowrank.form) for site in sites}
    units = {name: Unit(site, TWO_FACTOR if form[name] == GROUPED else form[name]) for name, site in by_name.items()}
    for together in siblings(sites):
        mine = [site for site in together if form[site.name] == GROUPED and site.name in chosen]
        if len(mine) > 1:
            merged = mine[0]._replace(out_features=sum(site.out_features for site in mine))
            units |= {site.name: Unit(merged, GROUPED) for site in mine}
    return units


def _require_alike(layers: Sequence[LayerPlan], units: Mapping[str, Unit]) -> None:
    """Refuses groups whose layers differ in what they must share.

    Raises:
        RankError: They do (all are named).
    """
    by_name = {layer.name: layer for layer in layers}
    problems = []
    for layer in layers:
        unit = units[layer.name]
        first = by_name[unit.site.name]
        if unit.form != GROUPED or layer.rank is first.rank is None:
            continue
        different = [what for what in SHARED if getattr(layer, what) != getattr(first, what)]
        for what in different[:1]:
            mine, wanted = getattr(layer, what), getattr(first, what)
            problems.append(f"  {layer.name}: {SHARED[what]} {mine}; wanted that of {first.name}, {wanted}")
    if problems:
        raise RankError("\n".join(["grouped layers share a bottleneck and must be alike:", *problems]))


def _layer_plan(
    site: LinearSite,
    unit: Unit,
    rank: int | None,
    note: str,
    mean_correction: bool,
    down: Packing,
    up: Packing,
    itemsize: int,
) -> LayerPlan:
    adds_bias = rank is not None and mean_correction and not site.has_bias
    leader = unit.site.name if unit.form == GROUPED and rank is not None else ""
    plan = LayerPlan(*site, rank, adds_bias, 0, 0, note, unit.form, *down, *up, leader)
    biased = {"": plan.biased, ".down": plan.biased and unit.form == PIVOTED, ".up": plan.biased}
    packings = plan.packings()
    parts = [
        linear_bytes(*shape, biased[suffix], *packings[suffix], itemsize) for suffix, shape in plan.factor_shapes().items()
    ]
    if rank is not None:
        parts.append(LinearBytes(order_bytes(site.in_features, site.out_features, unit.form), 0))
    weight, bias = sum(part.weight for part in parts), sum(part.bias for part in parts)
    return replace(plan, weight_bytes=weight, bias_bytes=bias)
