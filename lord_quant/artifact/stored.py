# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint folder really holds: bytes and bits per weight, summed over the tensors in its files.

Works on any folder of a causal language model, dense, low-rank or packed: the layers and their dense shapes come from the
architecture, the bytes from the safetensors headers. Nothing is taken from a report or a plan.
"""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lord_quant.blocks.source import read_config, skeleton_of
from lord_quant.checkpoint import METHOD_GPTQ
from lord_quant.errors import CheckpointError, ModelError
from lord_quant.files.headers import Header, read_headers, weight_files
from lord_quant.files.reading import denied
from lord_quant.targets import LinearSite, find_linears


Headers = dict[str, Header]
PACKED_TENSORS = frozenset({"qweight", "qzeros", "scales", "g_idx"})
DIMENSIONS = {"qweight": 2, "qzeros": 2, "scales": 2, "g_idx": 1, "order": 1}
"""Of tensors that bits, ranks and group sizes are read off."""


class StoredLayer(NamedTuple):
    """One linear layer as stored.

    Attributes:
        site: Name and dense shape.
        form: `dense`, or one of `config.FORMS`, with ` packed` after it where it is.
        rank: Rank of its factors, or None.
        weight_bytes: Bytes of weights, scales, zeros and indices, and of a bias the dense layer did not have.
        bias_bytes: Bytes of a bias the dense layer had.
        bits: Bits of its packed weights, or of the `down` it uses; None where it is not packed as GPTQ packs.
        group_size: Inputs per scale, likewise.
        up_bits: Bits of `up`; of a layer that is not low-rank, the same as `bits`.
        up_group_size: Inputs per scale of `up`, likewise.
        leader: Of a grouped layer, the full path of the one that holds the `down` it uses; empty otherwise.
    """

    site: LinearSite
    form: str
    rank: int | None
    weight_bytes: int
    bias_bytes: int
    bits: int | None
    group_size: int | None
    up_bits: int | None
    up_group_size: int | None
    leader: str

    @property
    def bpw(self) -> float:
        """Stored bits per dense weight."""
        return 8 * self.weight_bytes / (self.site.in_features * self.site.out_features)


class Stored(NamedTuple):
    """A whole checkpoint as stored.

    Attributes:
        layers: Its linear layers.
        quantization_config: What config.json says of it; empty for a dense model.
        tensor_bytes: Bytes of all tensors.
        file_bytes: Bytes of the safetensors files, headers included.
    """

    layers: tuple[StoredLayer, ...]
    quantization_config: dict[str, Any]
    tensor_bytes: int
    file_bytes: int

    @property
    def bpw(self) -> float:
        """Stored bits per dense weight over all linear layers."""
        dense = sum(layer.site.in_features * layer.site.out_features for layer in self.layers)
        return 8 * sum(layer.weight_bytes for layer in self.layers) / dense


def measure(folder: str | Path) -> Stored:
    """Measures a checkpoint folder from its safetensors headers.

    Raises:
        ModelError: The folder is missing or its configuration unreadable.
        CheckpointError: It holds no readable safetensors, or a layer lacks tensors; up to ten are named.
    """
    if not os.path.isfile(os.path.join(folder, "config.json")):
        found = denied(os.path.join(folder, "config.json")) or "it holds no config.json"
        raise ModelError(f"{str(folder)!r} is no checkpoint: {found}")
    _, config = read_config(str(folder))
    quantization = getattr(config, "quantization_config", None) or {}
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = skeleton_of(config, str(folder))
    sites, prefix = find_linears(model), f"{model.base_model_prefix}."
    files = weight_files(folder)
    headers = read_headers(files)
    settings = getattr(quantization, "to_dict", lambda: quantization)()
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"quantization_config in {str(folder)!r} is {type(settings).__name__}; wanted a mapping")
    _require_shapes(headers, str(folder))
    tensors = {s.name: _tensors_of(s.name, headers) or _tensors_of(s.name.removeprefix(prefix), headers) for s in sites}
    ours = settings.get("quant_method") == METHOD_GPTQ
    leaders = _leaders_of(settings, tensors)
    missing = [
        f"{layer}.{name}"
        for layer, mine in tensors.items()
        for name in _missing_of(mine, ours, ("down.", "up.") if leaders.get(layer, layer) == layer else ("up.",))
    ]
    if missing:
        more = [f"… and {len(missing) - 10} more"] if len(missing) > 10 else []
        raise CheckpointError(
            "\n  ".join([f"the weights in {str(folder)!r} do not hold every layer; missing:", *missing[:10], *more])
        )
    return Stored(
        layers=tuple(_stored_layer(site, tensors, leaders.get(site.name, "")) for site in sites),
        quantization_config=dict(settings),
        tensor_bytes=sum(size for _, _, size in headers.values()),
        file_bytes=sum(Path(file).stat().st_size for file in files),
    )


def _require_shapes(headers: Headers, folder: str) -> None:
    """Refuses tensors of factors and packed layers that bits, ranks and group sizes cannot be read off.

    Raises:
        CheckpointError: They are empty or have more or fewer dimensions (up to ten are named).
    """
    odd = []
    for name, (shape, _, _) in headers.items():
        owner, _, leaf = name.rpartition(".")
        dimensions = 2 if leaf == "weight" and owner.endswith((".down", ".up")) else DIMENSIONS.get(leaf)
        if dimensions is not None and (len(shape) != dimensions or 0 in shape):
            odd.append(f"{name} is {shape}, wanted {dimensions} dimensions")
    if odd:
        raise CheckpointError("\n  ".join([f"tensors in {folder!r} have shapes that none of their kind has:", *odd[:10]]))


def _leaders_of(settings: Mapping[str, Any], layers: Container[str]) -> dict[str, str]:
    """Returns the leader of every grouped layer, leaders included.

    Raises:
        CheckpointError: `group_pattern` is no mapping of layers to layers.
    """
    pattern = settings.get("group_pattern") or {}
    if not isinstance(pattern, Mapping):
        raise CheckpointError(f"group_pattern is {type(pattern).__name__}; wanted a mapping of path to leader")
    odd = [f"{name}: {leader!r}" for name, leader in pattern.items() if not isinstance(leader, str) or leader not in layers]
    if odd:
        raise CheckpointError(f"group_pattern names leaders that the model does not have: {', '.join(odd)}")
    return {leader: leader for leader in pattern.values()} | dict(pattern)


def _tensors_of(layer: str, headers: Headers) -> Headers:
    return {name.removeprefix(f"{layer}."): value for name, value in headers.items() if name.startswith(f"{layer}.")}


def _missing_of(mine: Headers, ours: bool, factors: tuple[str, ...]) -> list[str]:
    """Names what a layer cannot be measured without; of other packing methods than ours only what is certain."""
    missing = []
    for part in factors if any(name.startswith(("down.", "up.")) for name in mine) else ("",):
        leaves = {name.removeprefix(part) for name in mine if name.startswith(part)}
        wanted: set[str] = set()
        if "qweight" in leaves or (ours and leaves & PACKED_TENSORS):
            wanted |= PACKED_TENSORS if ours else {"scales"}
        elif part or not leaves - {"bias"}:
            wanted.add("weight")
        missing += [part + name for name in sorted(wanted - leaves)]
    return missing


def _stored_layer(site: LinearSite, tensors: Mapping[str, Headers], leader: str) -> StoredLayer:
    mine = tensors[site.name]
    biases = {name for name in mine if name.rpartition(".")[2] == "bias"}
    own_bias = biases if site.has_bias else set()
    packed = any(name.endswith("qweight") for name in mine)
    rank = None
    if any(name.startswith("up.") for name in mine):
        rank = mine["up.g_idx"][0][0] if "up.g_idx" in mine else mine["up.weight"][0][1]
    form = "dense" if rank is None else "grouped" if leader else "two_factor"
    if rank is not None and "order" in mine:
        taken = mine["down.g_idx"][0][0] if "down.g_idx" in mine else mine["down.weight"][0][1]
        form = "column_pivoted" if taken < site.in_features else "pivoted"
    form += " packed" if packed else ""
    used = tensors[leader] if leader else mine
    parts = (_packing(used, ""), _packing(used, "down."), _packing(mine, "up."))
    packings = [found for found in parts if found is not None]
    return StoredLayer(
        site=site,
        form=form,
        rank=rank,
        weight_bytes=sum(size for name, (_, _, size) in mine.items() if name not in own_bias),
        bias_bytes=sum(mine[name][2] for name in own_bias),
        bits=packings[0][0] if packings else None,
        group_size=packings[0][1] if packings else None,
        up_bits=packings[-1][0] if packings else None,
        up_group_size=packings[-1][1] if packings else None,
        leader=leader if rank is not None else "",
    )


def _packing(mine: Headers, part: str) -> tuple[int, int] | None:
    """Reads bits and group size off the shapes of packed tensors."""
    if not {part + leaf for leaf in PACKED_TENSORS} <= mine.keys():
        return None
    inputs, words, groups = (mine[part + leaf][0][0] for leaf in ("g_idx", "qweight", "scales"))
    return 32 * words // inputs, inputs // groups
