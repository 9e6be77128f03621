# SPDX-License-Identifier: Apache-2.0
"""What every layer of a model would lose, measured once (`sensing.py`) and kept in a file.

Any budget can be planned from the file alone, without the model: it holds spectra and a few numbers per layer, not the
moments. It says what it was made from: statistics of another model or of another way of rounding are refused. The
calibration is named, but a plan may be run on another.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lord_quant.checkpoint import atomic_file
from lord_quant.config import GROUP_SIZES
from lord_quant.errors import CheckpointError, OutputError
from lord_quant.files.reading import open_tensors, parse_json
from lord_quant.losses.probe import PROBED_BITS, SLOPES, FactorNoise, LayerLoss, Orders
from lord_quant.sizes.layer_bytes import COLUMN_PIVOTED, PACK_MULTIPLE, PIVOTED, pivoted_forms
from lord_quant.sizes.packable import packable_of
from lord_quant.targets import LinearSite, find_blocks, find_linears, siblings


VERSION = 8
JOINED = "+"
"""Joins the names of layers with one input."""
METADATA = "lord_statistics"
ORDERS = ("dense_orders", "factor_orders")


class Statistics(NamedTuple):
    """What every layer would lose.

    Attributes:
        losses: By full module path, in registration order.
        sites: The layers, likewise.
        groups: What layers with one input would lose as the one layer that all their outputs make, by their names.
        origin: What they were measured on: digests of model and calibration, settings.
    """

    losses: dict[str, LayerLoss]
    sites: dict[str, LinearSite]
    groups: dict[tuple[str, ...], LayerLoss]
    origin: dict[str, Any]

    @classmethod
    def of_shapes(cls, sites: Sequence[LinearSite], origin: Mapping[str, Any]) -> Statistics:
        """Makes some up, for what shapes alone decide: all that can become of layers, at losses that fall with bytes."""
        found = cls({site.name: _alike(site) for site in sites}, {site.name: site for site in sites}, {}, dict(origin))
        for together in siblings(sites):
            names = tuple(site.name for site in together)
            found.groups[names] = _alike(found.site_of(names))
        return found

    def site_of(self, names: Sequence[str]) -> LinearSite:
        """Returns a layer, or the layer that several with one input make; it has the first one's name."""
        together = [self.sites[name] for name in names]
        height, biased = sum(site.out_features for site in together), all(site.has_bias for site in together)
        return together[0]._replace(out_features=height, has_bias=biased)


def _alike(site: LinearSite) -> LayerLoss:
    """Returns a loss of which nothing is this layer's own, for all that may become of one of its shape."""
    smaller = min(site.in_features, site.out_features)
    falling = torch.linspace(1, 0, smaller + 1, dtype=torch.float64)
    by_bits = {bits: 4.0**-bits for bits in PROBED_BITS}
    noise = FactorNoise(smaller, by_bits, 0.0)
    groups = {size: size / max(GROUP_SIZES) for size in GROUP_SIZES if site.in_features % size == 0}
    forms = dict.fromkeys(pivoted_forms(site.in_features, site.out_features), 1.0)
    return LayerLoss(falling, falling, by_bits, groups, max(GROUP_SIZES), noise, noise, forms)


class SoFar:
    """What a pass has measured, kept in a file after every block until whoever wanted it has all.

    Args:
        path: The file; None keeps nothing.
        origin: What the pass is made from; what another one kept does not count.

    Attributes:
        statistics: Of the first blocks, as they were measured.
        blocks: How many these are.
    """

    def __init__(self, path: Path | None, origin: dict[str, Any]) -> None:
        self.path, self.statistics, self.blocks = path, Statistics({}, {}, {}, origin), 0
        if path is not None:
            with contextlib.suppress(CheckpointError):  # there is none, or it is spoilt
                found, blocks = _read(path)
                if found.origin == origin and blocks is not None:
                    self.statistics, self.blocks = found, blocks

    def probed_layers(self, model: nn.Module) -> list[list[str]]:
        """Returns the layers that are still to be measured, by path inside their block, per block."""
        blocks, names = find_blocks(model), [site.name for site in packable_of(find_linears(model))]
        own = [
            [name.removeprefix(f"{blocks.path}.{index}.") for name in names if name.startswith(f"{blocks.path}.{index}.")]
            for index in range(len(blocks.modules))
        ]
        return [[] for _ in own[: self.blocks]] + own[self.blocks :]

    def keep(self, statistics: Statistics, blocks: int) -> None:
        """Keeps what was measured of the first blocks, if that is possible: it serves a pass that is cut off."""
        if self.path is not None:
            with contextlib.suppress(OSError, OutputError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                save_statistics(statistics, self.path, blocks)


def save_statistics(statistics: Statistics, path: str | Path, blocks: int | None = None) -> None:
    """Writes a safetensors file: spectra as tensors, the rest as JSON in its header. It appears by one rename.

    Args:
        statistics: What was measured.
        path: Where it goes.
        blocks: Of how many blocks it is all there is, if it is not of all of them.

    Raises:
        OutputError: It cannot be written.
    """
    from safetensors.torch import save_file

    layers = {name: statistics.sites[name]._asdict() | _plain(loss) for name, loss in statistics.losses.items()}
    groups = {JOINED.join(names): _plain(loss) for names, loss in statistics.groups.items()}
    about = {"version": VERSION, "origin": statistics.origin, "layers": layers, "groups": groups}
    about |= {} if blocks is None else {"blocks": blocks}
    every = statistics.losses | {JOINED.join(names): loss for names, loss in statistics.groups.items()}
    tensors = {name: torch.stack((loss.tail, loss.cut)) for name, loss in every.items()}
    with atomic_file(path) as staging:
        save_file(tensors, staging, metadata={METADATA: json.dumps(about)})


def is_statistics(path: Path) -> bool:
    """Tells whether a file looks like one of statistics, of whatever version."""
    from safetensors import SafetensorError

    try:
        with open_tensors(str(path)) as handle:
            return METADATA in (handle.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load_statistics(path: str | Path) -> Statistics:
    """Reads what `save_statistics` wrote.

    Raises:
        CheckpointError: The file is missing, not one of ours, newer, not finished, or its parts do not fit together.
    """
    statistics, blocks = _read(path)
    if blocks is not None:
        raise CheckpointError(
            f"statistics {str(path)!r} are what a pass that was cut off had measured of the first {blocks} blocks; wanted "
            "those of all: start it again as before, and it goes on"
        )
    return statistics


def _read(path: str | Path) -> tuple[Statistics, int | None]:
    """Returns what a file holds, and of how many blocks, if not of all."""
    from safetensors import SafetensorError

    try:
        with open_tensors(path) as handle:
            about = parse_json((handle.metadata() or {})[METADATA])
            if about["version"] != VERSION:
                raise CheckpointError(
                    f"statistics {str(path)!r} have version {about['version']!r}; wanted {VERSION}: measure again"
                )
            sites = {name: _site(name, values) for name, values in about["layers"].items()}
            statistics = Statistics({}, sites, {}, dict(about["origin"]))
            for key, values in (about["layers"] | about["groups"]).items():
                names = tuple(key.split(JOINED)) if key in about["groups"] else (key,)
                loss, site = _loss(handle.get_tensor(key), values), statistics.site_of(names)
                wanted = (min(site.in_features, site.out_features) + 1,)
                if any(part.shape != wanted or not torch.isfinite(part).all() for part in (loss.tail, loss.cut)):
                    raise CheckpointError(f"statistics {str(path)!r}: the spectrum of {key!r} does not fit its layer")
                if len(names) == 1:
                    statistics.losses[key] = loss
                else:
                    statistics.groups[names] = loss
            blocks, last = about.get("blocks"), max((site.block for site in sites.values()), default=0)
            if not (blocks is None or (type(blocks) is int and blocks > last)):
                raise ValueError(f"layers of {blocks!r} blocks")
            return statistics, blocks
    except CheckpointError:  # a ValueError too
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"statistics {str(path)!r} cannot be read: {error}") from error
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{str(path)!r} holds no statistics of this package: {error!r}") from error


def _site(name: str, values: Mapping[str, Any]) -> LinearSite:
    """Returns a layer, of whose sizes plans are made.

    Raises:
        ValueError: It has another name than its entry, or a size that none has.
    """
    site = LinearSite(**{field: values[field] for field in LinearSite._fields})
    sizes = (site.block + 1, site.in_features, site.out_features)
    if (
        site.name != name
        or not isinstance(site.has_bias, bool)
        or not all(type(size) is int and size > 0 for size in sizes)
    ):
        raise ValueError(f"layer {name!r} is said to be {site}")
    return site


def _plain(loss: LayerLoss) -> dict[str, Any]:
    """Returns all but the spectrum as JSON values."""
    factors = {name: None if noise is None else noise._asdict() for name, noise in (("down", loss.down), ("up", loss.up))}
    plain = {"dense": loss.dense, "groups": loss.groups, "group_size": loss.group_size, "pivoted": loss.pivoted}
    orders = {name: getattr(loss, name)._asdict() for name in ORDERS}
    return plain | factors | orders


def _loss(tails: torch.Tensor, values: dict[str, Any]) -> LayerLoss:
    down, up = (None if values[name] is None else _factor(values[name]) for name in ("down", "up"))
    tail, cut = tails.double()
    groups = {int(size): float(ratio) for size, ratio in values["groups"].items()}
    if PACK_MULTIPLE not in groups:
        raise ValueError(
            f"noise in groups of {sorted(groups)}; wanted {PACK_MULTIPLE} among them, which divides every rank"
        )
    pivoted = {form: float(ratio) for form, ratio in values["pivoted"].items()}
    if not pivoted.keys() <= {PIVOTED, COLUMN_PIVOTED}:
        raise ValueError(f"noise of the forms {sorted(pivoted)}; wanted pivoted ones")
    return LayerLoss(
        tail,
        cut,
        _by_bits(values["dense"]),
        groups,
        int(values["group_size"]),
        down,
        up,
        pivoted,
        *(Orders(**{part: float(values[name][part]) for part in Orders._fields}) for name in ORDERS),
    )


def _factor(values: dict[str, Any]) -> FactorNoise:
    rank, slope = int(values["rank"]), float(values["slope"])
    if rank < 1 or not SLOPES[0] <= slope <= SLOPES[1]:
        raise ValueError(f"a factor was measured at rank {rank}, from which its noise falls with power {slope}")
    return FactorNoise(rank, _by_bits(values["by_bits"]), slope)


def _by_bits(values: dict[str, Any]) -> dict[int, float]:
    found = {int(bits): float(noise) for bits, noise in values.items()}
    if not found.keys() >= {*PROBED_BITS}:
        raise ValueError(f"noise at {sorted(found)} bits; wanted {PROBED_BITS}")
    return found
