# SPDX-License-Identifier: Apache-2.0
"""Runs a plan on a loaded model, one transformer block at a time.

Blocks are visited in order. The inputs of the first are captured from the model itself; from then on every block is run
once on the stored inputs of the batch stream, while hooks gather the moments of its layers, and its outputs become the
next block's inputs. Only the moments of one block exist at a time. All statistics are the *dense* model's: a block is
decomposed after it was run. (This is the first half of the `naive` stack; it is what LoRD does on its own, and the baseline
of everything else. `runs/joint.py` is the loop that knows what quantization did before.)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lord_quant.blocks.stream import block_kinds, capture
from lord_quant.decompose import decompose
from lord_quant.distributed import ALONE, World
from lord_quant.errors import CalibrationError, NumericsError
from lord_quant.moments import MomentAccumulator, Moments, pooled_alone
from lord_quant.plan import LayerPlan, Plan
from lord_quant.remedies import UNREACHED
from lord_quant.surgery import replace_layer
from lord_quant.targets import dense_bias, dense_weight, find_blocks


@dataclass(frozen=True)
class DecompositionRecord:
    """What happened to one decomposed layer.

    Attributes:
        name: Full module path.
        rank: Rank of the factors.
        rel_output_error: Share of the layer's output variance lost on the calibration tokens.
        effective_rank: Numerical rank of the output covariance.
        num_tokens: Tokens its statistics were taken from.
        seconds: Wall time of the decomposition.
        remedies: What the numerics needed; empty when nothing.
        largest_coefficient: Largest magnitude in a pivoted layer's predictor, before quantization; None in other forms.
    """

    name: str
    rank: int
    rel_output_error: float
    effective_rank: int
    num_tokens: int
    seconds: float
    remedies: tuple[str, ...]
    largest_coefficient: float | None = None


@torch.no_grad()
def decompose_model(
    model: nn.Module, plan: Plan, batches: Sequence[torch.Tensor], *, dtype: torch.dtype = torch.float32
) -> list[DecompositionRecord]:
    """Decomposes the layers of `plan` in place.

    Args:
        model: A loaded dense model in evaluation mode; changed in place.
        plan: Which layers get which rank.
        batches: Token windows with shape (batch, seq_len), all without padding.
        dtype: dtype of statistics and eigendecompositions.

    Returns:
        One record per decomposed layer, in order.

    Raises:
        NumericsError: Activations, moments or factors hold NaN or inf; the layer is named.
    """
    if not plan.rank_pattern:
        return []
    blocks = find_blocks(model)
    kinds = block_kinds(model, len(blocks.modules))
    stream = capture(model, blocks.modules, kinds, batches)
    planned = {layer.name: layer for layer in plan.layers}
    records = []
    last = max(layer.block for layer in plan.layers if layer.rank is not None)
    for index, block in enumerate(tqdm(blocks.modules[: last + 1], desc="decompose", unit="block", disable=None)):
        prefix = f"{blocks.path}.{index}."
        layers = {
            name: module for name, module in block.named_modules() if planned.get(prefix + name, _DENSE).rank is not None
        }
        with gather(layers, dtype) as gathered:
            for batch in stream:
                batch.hidden = batch.run(block, kinds[index])
        moments = gathered.results(prefix)
        for name in layers:
            layer, rank = planned[prefix + name], plan.rank_pattern[prefix + name]
            records.append(_decompose_layer(model, layer, rank, moments[name], plan.mean_correction))
    return records


def _decompose_layer(
    model: nn.Module, layer: LayerPlan, rank: int, moments: Moments, mean_correction: bool
) -> DecompositionRecord:
    start = time.perf_counter()
    module = model.get_submodule(layer.name)
    try:
        factors, spectrum = decompose(
            dense_weight(module),
            dense_bias(module),
            moments,
            rank,
            form=layer.form,
            mean_correction=mean_correction,
        )
    except NumericsError as error:
        raise NumericsError(f"layer {layer.name!r}: {error}") from error
    replace_layer(model, layer.name, factors)
    return DecompositionRecord(
        name=layer.name,
        rank=rank,
        rel_output_error=spectrum.discarded_share(rank),
        effective_rank=spectrum.effective_rank,
        num_tokens=moments.num_tokens,
        seconds=time.perf_counter() - start,
        remedies=spectrum.remedies,
        largest_coefficient=factors.largest_coefficient(),
    )


class Gathered:
    """Accumulators of one block, one per *distinct input*: layers fed the same tensor (q, k and v) share one."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = tuple(layers)
        self.device = next((dense_weight(layer).device for layer in layers.values()), torch.device("cpu"))
        self.leader: dict[str, str] = {}
        self.accumulators: dict[str, MomentAccumulator] = {}

    def results(self, prefix: str, world: World = ALONE) -> dict[str, Moments]:
        """Returns the moments of every layer, over all processes; the same ones for layers of one input.

        Args:
            prefix: Completes layer names in errors.
            world: The processes, each with windows of its own.

        Raises:
            CalibrationError: No token reached a layer.
            NumericsError: Moments hold NaN or inf.
        """
        seen = {name: own for name, own in self.accumulators.items() if own.num_tokens}
        leaders: dict[str, str] = {}
        for told in world.gather({name: leader for name, leader in self.leader.items() if leader in seen}):
            leaders = told | leaders
        unseen = [prefix + name for name in self.layers if name not in leaders]
        if unseen:
            raise CalibrationError(f"no calibration token reached {', '.join(unseen)}; {UNREACHED}")
        own = {name: accumulator.result() for name, accumulator in seen.items()}
        moments = {
            leader: own[leader] if world.size == 1 else pooled_alone(own.get(leader), world, self.device)
            for leader in dict.fromkeys(leaders[name] for name in self.layers)
        }
        for name, statistics in moments.items():
            if not (torch.isfinite(statistics.mean).all() and torch.isfinite(statistics.covariance).all()):
                raise NumericsError(f"inputs of layer {prefix + name!r} hold NaN or inf; wanted finite activations")
        return {name: moments[leaders[name]] for name in self.layers}


@contextmanager
def gather(layers: dict[str, nn.Module], dtype: torch.dtype) -> Iterator[Gathered]:
    """Installs hooks that accumulate input moments, and removes exactly those hooks again, whatever happens."""
    gathered = Gathered(layers)
    inputs: list[tuple[torch.Tensor, str]] = []  # held while the first forward runs, so that identity means sameness

    def hook(name: str) -> Any:
        def observe(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if name not in gathered.leader:
                same = next((leader for seen, leader in inputs if seen is x), None)
                gathered.leader[name] = same or name
                if same is None:
                    gathered.accumulators[name] = MomentAccumulator(x.shape[-1], dtype, x.device)
                inputs.append((x, gathered.leader[name]))
            if gathered.leader[name] == name:
                gathered.accumulators[name].update(x)

        return observe

    def forget(*_: Any) -> None:
        inputs.clear()

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    last = list(layers.values())[-1:]
    handles += [module.register_forward_hook(forget) for module in last]
    try:
        yield gathered
    finally:
        for handle in handles:
            handle.remove()


_DENSE = LayerPlan("", 0, 0, 0, False, None, False, 0, 0)
