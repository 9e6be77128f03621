# SPDX-License-Identifier: Apache-2.0
"""The sensitivity pass: what every layer of a model would lose, block after block.

One pass over the calibration data, one backward, a few solves per layer (`probe.py`), which take most of the time. What
they told of a block is kept in a file when the block is done, and a pass that was cut off goes on behind it; the passes
through the model are made again. Several processes share windows and layers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lord_quant.blocks.residency import RESIDENT, Residency
from lord_quant.blocks.stream import block_kinds, capture
from lord_quant.config import GptqConfig, JointConfig
from lord_quant.distributed import ALONE, World
from lord_quant.engine import gather
from lord_quant.errors import NumericsError
from lord_quant.losses.crossfit import Half
from lord_quant.losses.probe import LayerLoss, probe
from lord_quant.losses.statistics import SoFar, Statistics
from lord_quant.losses.steepness import RoundingSlope
from lord_quant.moments import Moments
from lord_quant.progress import Progress
from lord_quant.runs.operations import relative_cost
from lord_quant.sensitivity import Derivatives, Expansion, Steepness
from lord_quant.sizes.packable import packable_of
from lord_quant.targets import LinearSite, dense_weight, find_blocks, find_linears, siblings


@torch.no_grad()
def measure_statistics(
    model: nn.Module,
    halves: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    expansions: tuple[Expansion, Expansion] | None,
    *,
    gptq: GptqConfig,
    options: JointConfig,
    so_far: SoFar,
    mean_correction: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    residency: Residency = RESIDENT,
    progress: Progress | None = None,
    world: World = ALONE,
) -> Statistics:
    """Measures every linear layer of the blocks; the model is left as it was.

    Args:
        model: A loaded dense model in evaluation mode.
        halves: Token windows of either half of the text with shape (batch, seq_len), all without padding; the other one may
            be empty, and losses are then those of the text that chose.
        expansions: How much the loss minds errors, from either half of the text; used up. None counts output errors alike.
        gptq: How layers would be quantized.
        options: How they would be stacked.
        so_far: What was measured before, and what the statistics are to say of where they come from.
        mean_correction: Whether factors get a bias their layer did not have.
        seed: Of the probes.
        dtype: dtype of moments and algebra.
        residency: Which blocks have their weights.
        progress: Where it is told how far the pass is.
        world: The processes that share windows and layers; all end with the same statistics.

    Raises:
        NumericsError: Activations, gradients or weights hold NaN or inf; the layer is named.
        CalibrationError: No token reached a layer.
    """
    blocks, sites = find_blocks(model), packable_of(find_linears(model))
    kinds = block_kinds(model, len(blocks.modules))
    streams = [capture(model, blocks.modules, kinds, world.share(half), residency) for half in halves if half]
    settings: dict[str, Any] = {"mean_correction": mean_correction, "gptq": gptq, "options": options}
    losses, groups = so_far.statistics.losses, so_far.statistics.groups
    found = Statistics(losses, {site.name: site for site in sites}, groups, so_far.statistics.origin)
    labels = [each.num_labels for each in expansions] if expansions else [None, None]
    progress = progress or Progress()
    with progress.phase("probe", len(blocks.modules), so_far.blocks):
        for index, block in enumerate(blocks.modules):
            with residency.of(index, then=index + 1):
                prefix = f"{blocks.path}.{index}."
                to_come = [site for site in sites if site.block == index >= so_far.blocks]
                layers = {site.name.removeprefix(prefix): site for site in to_come}
                minded = [each.of_block(index, block, kinds[index], list(layers), dtype) for each in expansions or ()]
                moments = []
                for stream in streams:
                    with gather({name: block.get_submodule(name) for name in layers}, dtype) as gathered:
                        for batch in stream:
                            batch.hidden = batch.run(block, kinds[index])
                    moments.append(gathered.results(prefix, world))
                together = [
                    [site.name.removeprefix(prefix) for site in group]
                    for group in siblings(to_come)
                    if len({id(moments[-1][site.name.removeprefix(prefix)]) for site in group}) == 1
                ]
                seen = _Seen(block, layers, minded, moments, labels)
                units, number = [*([name] for name in layers), *together], len(losses) + len(groups)
                seeds = [seed * 2 * len(sites) + number + place for place in range(len(units))]
                tasks = [
                    functools.partial(seen.probed, names, seed=own, **settings)
                    for names, own in zip(units, seeds, strict=True)
                ]
                costs = [relative_cost([layers[name] for name in names]) for names in units]
                for names, loss in zip(units, world.share_out(tasks, costs, number, "cpu"), strict=True):
                    if len(names) == 1:
                        losses[prefix + names[0]] = loss
                    else:
                        groups[tuple(prefix + name for name in names)] = loss
            if index >= so_far.blocks:
                progress.block(f"{blocks.path}.{index}")
                so_far.keep(found, index + 1)
    if expansions:
        slope = RoundingSlope.of(list(losses.values()), sum(each.num_following for each in expansions))
        losses = {name: slope.counted(loss) for name, loss in losses.items()}
        groups = {names: slope.counted(loss) for names, loss in groups.items()}
    return found._replace(losses=losses, groups=groups)


class _Seen(NamedTuple):
    """What was seen of a block.

    Attributes:
        block: The dense block.
        layers: Its layers that are measured, by path inside the block.
        minded: What their errors cost, by either half of the text; empty counts output errors alike.
        moments: Of their inputs, by either half, or of the one there is.
        labels: Tokens that sensitivities are of, by either half.
    """

    block: nn.Module
    layers: Mapping[str, LinearSite]
    minded: Sequence[Mapping[str, Derivatives]]
    moments: Sequence[Mapping[str, Moments]]
    labels: Sequence[int | None]

    def probed(self, names: Sequence[str], **settings: Any) -> LayerLoss:
        """Probes one layer, or several of one input as one.

        Raises:
            NumericsError: Something holds NaN or inf; the layer is named.
        """
        weights = {name: dense_weight(self.block.get_submodule(name)) for name in names}
        nothing = [None, None]
        metrics: Sequence[torch.Tensor | None] = [_together(each, weights) for each in self.minded] or nothing
        slopes: Sequence[Steepness | None] = [_stacked(each, weights) for each in self.minded] or nothing
        ends = self.moments[0][names[0]], self.moments[-1][names[0]]
        first, second = (Half(*own) for own in zip(ends, metrics, slopes, self.labels, strict=True))
        has_bias = all(self.layers[name].has_bias for name in names)
        try:
            return probe(torch.cat(list(weights.values())), (first, second), has_bias=has_bias, **settings)
        except NumericsError as error:
            raise NumericsError(f"layer {self.layers[names[0]].name!r}: {error}") from error


def _together(minded: Mapping[str, Derivatives], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the sensitivity of layers on top of each other; the loss does not depend on one that was not called."""
    silent = {name: weight.new_zeros(len(weight), len(weight)) for name, weight in weights.items() if name not in minded}
    return torch.block_diag(*(silent[name] if name in silent else minded[name].sensitivity for name in weights))


def _stacked(minded: Mapping[str, Derivatives], weights: Mapping[str, torch.Tensor]) -> Steepness:
    """Returns the slopes of layers on top of each other; flat where one was not called."""
    flat = {name: Steepness(torch.zeros_like(weight), weight.new_zeros(len(weight))) for name, weight in weights.items()}
    parts = [minded[name].slope if name in minded else flat[name] for name in weights]
    return Steepness(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))
