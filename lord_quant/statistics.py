# SPDX-License-Identifier: Apache-2.0
"""The sensitivity pass: what every layer of a model would lose, measured once and kept in a file.

One pass over the calibration data, one backward, a few solves per layer (`probe.py`). Any budget can be planned from the
file alone, without the model: it holds spectra and a few numbers per layer, not the moments. It says what it was made
from: statistics of another model or of another way of rounding are refused. The calibration is named, but a plan may be run
on another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from lord_quant.checkpoint import atomic_file
from lord_quant.config import GptqConfig, JointConfig
from lord_quant.engine import gather
from lord_quant.errors import CheckpointError, NumericsError
from lord_quant.probe import LayerLoss, probe
from lord_quant.sensitivity import Sensitivity
from lord_quant.stream import block_kinds, capture
from lord_quant.targets import LinearSite, dense_weight, find_blocks, find_linears


VERSION = 1
METADATA = "lord_statistics"
SAMPLES, SAMPLE_BYTES = 256, 4096
PASSING = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})
"""What a configuration says of how it was loaded and by what."""


class Statistics(NamedTuple):
    """What every layer would lose.

    Attributes:
        losses: By full module path, in registration order.
        sites: The layers, likewise.
        origin: What they were measured on: digests of model and calibration, settings.
    """

    losses: dict[str, LayerLoss]
    sites: dict[str, LinearSite]
    origin: dict[str, Any]


@torch.no_grad()
def measure_statistics(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    sensitivity: Sensitivity | None,
    *,
    gptq: GptqConfig,
    options: JointConfig,
    origin: dict[str, Any],
    mean_correction: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Statistics:
    """Measures every linear layer of the blocks; the model is left as it was.

    Args:
        model: A loaded dense model in evaluation mode.
        batches: Token windows with shape (batch, seq_len), all without padding.
        sensitivity: How much the loss minds errors in outputs; used up. None counts output errors alike.
        gptq: How layers would be quantized.
        options: How they would be stacked.
        origin: What the file is to say of where it comes from.
        mean_correction: Whether factors get a bias their layer did not have.
        seed: Of the probes.
        dtype: dtype of moments and algebra.

    Raises:
        NumericsError: Activations, gradients or weights hold NaN or inf; the layer is named.
        CalibrationError: No token reached a layer.
    """
    blocks, sites = find_blocks(model), find_linears(model)
    kinds = block_kinds(model, len(blocks.modules))
    stream = capture(model, blocks.modules, kinds, batches)
    losses: dict[str, LayerLoss] = {}
    for index, block in enumerate(tqdm(blocks.modules, desc="probe", unit="block", disable=None)):
        prefix = f"{blocks.path}.{index}."
        layers = {site.name.removeprefix(prefix): site for site in sites if site.block == index}
        minded = {} if sensitivity is None else sensitivity.of_block(index, block, kinds[index], list(layers), dtype)
        with gather({name: block.get_submodule(name) for name in layers}, dtype) as gathered:
            for batch in stream:
                batch.hidden = batch.run(block, kinds[index])
        moments = gathered.results(prefix)
        for name, site in layers.items():
            try:
                losses[site.name] = probe(
                    dense_weight(block.get_submodule(name)),
                    moments[name],
                    minded.pop(name, None),
                    has_bias=site.has_bias,
                    mean_correction=mean_correction,
                    gptq=gptq,
                    options=options,
                    seed=seed * len(sites) + len(losses),
                )
            except NumericsError as error:
                raise NumericsError(f"layer {site.name!r}: {error}") from error
    return Statistics(losses, {site.name: site for site in sites}, origin)


def save_statistics(statistics: Statistics, path: str | Path) -> None:
    """Writes a safetensors file: spectra as tensors, the rest as JSON in its header. It appears by one rename.

    Raises:
        OutputError: It cannot be written.
    """
    from safetensors.torch import save_file

    layers = {
        name: {
            **statistics.sites[name]._asdict(),
            "dense": loss.dense,
            "groups": loss.groups,
            "group_size": loss.group_size,
            "share": loss.share,
        }
        for name, loss in statistics.losses.items()
    }
    about = {"version": VERSION, "origin": statistics.origin, "layers": layers}
    tails = {name: loss.tail for name, loss in statistics.losses.items()}
    with atomic_file(path) as staging:
        save_file(tails, staging, metadata={METADATA: json.dumps(about)})


def load_statistics(path: str | Path) -> Statistics:
    """Reads what `save_statistics` wrote.

    Raises:
        CheckpointError: The file is missing, not one of ours, newer, or its parts do not fit together.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            about = json.loads((handle.metadata() or {})[METADATA])
            if about["version"] != VERSION:
                raise CheckpointError(
                    f"statistics {str(path)!r} have version {about['version']!r}; wanted {VERSION}: measure again"
                )
            losses, sites = {}, {}
            for name, values in about["layers"].items():
                tail = handle.get_tensor(name)
                site = LinearSite(**{field: values[field] for field in LinearSite._fields})
                if tail.shape != (min(site.in_features, site.out_features) + 1,) or not torch.isfinite(tail).all():
                    raise CheckpointError(f"statistics {str(path)!r}: the spectrum of {name!r} does not fit its layer")
                losses[name] = LayerLoss(
                    tail,
                    {int(bits): float(noise) for bits, noise in values["dense"].items()},
                    {int(size): float(ratio) for size, ratio in values["groups"].items()},
                    int(values["group_size"]),
                    None if values["share"] is None else float(values["share"]),
                )
                sites[name] = site
            return Statistics(losses, sites, dict(about["origin"]))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"statistics {str(path)!r} cannot be read: {error}") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} holds no statistics of this package: {error!r}") from error


def model_digest(config: dict[str, Any], files: Sequence[str]) -> str:
    """Returns a SHA-256 that tells models apart, without reading all of them.

    Args:
        config: The model's configuration as plain values; what says nothing of the model itself is left out.
        files: Its safetensors files; of each the header, the size and `SAMPLES` pieces spread over the weights count.
    """
    own = {key: value for key, value in config.items() if key not in PASSING}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode())
    for file in sorted(files):
        with open(file, "rb") as handle:
            header = int.from_bytes(handle.read(8), "little")
            digest.update(handle.read(header))
            size = handle.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            for sample in range(SAMPLES):
                handle.seek(8 + header + (size - 8 - header) * sample // SAMPLES)
                digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()
