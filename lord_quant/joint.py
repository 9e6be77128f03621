# SPDX-License-Identifier: Apache-2.0
"""The joint stack over a whole model: two streams side by side, one transformer block at a time.

The dense stream carries what the dense model computes, the other what the compressed model computes so far. In every
block the dense stream runs once and leaves each layer's input behind. Then the layers are compressed in the order in which
they are called, those fed the same tensor (q, k and v) together: the compressed stream runs as far as their input, the
moments of both inputs are taken in one pass over the batches, and `stack.stack_layer` does the rest. Parts of the block
whose layers are all compressed (a layer, then the attention) run once and are replayed. Only what one block's layers are
fed and one layer's moments exist at a time.
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from lord_quant.config import JointConfig
from lord_quant.errors import NumericsError
from lord_quant.moments import PairedMoments
from lord_quant.pairing import Runner, gather, record_inputs
from lord_quant.plan import LayerPlan, Plan
from lord_quant.refine import Quantized
from lord_quant.sensitivity import Sensitivity
from lord_quant.solver import Solver
from lord_quant.stack import Stacked, stack_layer
from lord_quant.stream import Replay, block_kinds, capture
from lord_quant.surgery import replace_layer, set_dense
from lord_quant.targets import dense_bias, dense_weight, find_blocks


class StackRecord(NamedTuple):
    """What happened to one layer.

    Attributes:
        name: Full module path.
        rank: Rank of its factors, or None.
        rel_output_error: Share of the output energy, in the metric of the truncation, lost by truncation alone; None for a
            layer that stays dense.
        rel_stacked_error: Share lost by truncation and rounding together.
        effective_rank: Numerical rank of the output covariance, or None.
        num_tokens: Tokens its statistics were taken from.
        seconds: Wall time of its algebra, without the solves, whose own is in what they return.
        remedies: What the numerics needed; empty when nothing.
        largest_coefficient: Largest magnitude in a pivoted layer's predictor, before quantization, or None.
    """

    name: str
    rank: int | None
    rel_output_error: float | None
    rel_stacked_error: float
    effective_rank: int | None
    num_tokens: int
    seconds: float
    remedies: tuple[str, ...]
    largest_coefficient: float | None


@dataclass
class StackedModel:
    """What a run did: a record per layer, and what is to be packed, by full module path."""

    records: list[StackRecord] = field(default_factory=list)
    quantized: dict[str, Quantized] = field(default_factory=dict)


@torch.no_grad()
def stack_model(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[torch.Tensor],
    solve: Callable[[LayerPlan], Solver] | None,
    options: JointConfig,
    *,
    sensitivity: Sensitivity | None = None,
    true_sequential: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> StackedModel:
    """Compresses the layers of `plan` in place; quantized layers hold their weights in float, ready to be packed.

    Args:
        model: A loaded dense model in evaluation mode; changed in place.
        plan: What becomes of every layer.
        batches: Token windows with shape (batch, seq_len), all without padding.
        solve: Gives a layer's solver, which quantizes a weight in a metric; None leaves factors in float and other layers
            alone.
        options: Which ideas are on.
        sensitivity: How much the loss minds errors in outputs; used up. None counts all outputs alike.
        true_sequential: Whether later layers of a block see what was done to earlier ones, or only later blocks do.
        seed: Of the rotations.
        dtype: dtype of statistics and algebra.

    Raises:
        NumericsError: Activations, moments or factors hold NaN or inf; the layer is named.
        CalibrationError: No token reached a layer, or the streams differ in tokens.
    """
    done = StackedModel()
    planned = {layer.name: layer for layer in plan.layers if solve is not None or layer.rank is not None}
    if not planned:
        return done
    compress = functools.partial(stack_layer, options=options, mean_correction=plan.mean_correction)
    blocks = find_blocks(model)
    kinds = block_kinds(model, len(blocks.modules))
    stream = capture(model, blocks.modules, kinds, batches)
    ours = [batch.hidden for batch in stream]
    last = max(layer.block for layer in planned.values())
    for index, block in enumerate(tqdm(blocks.modules[: last + 1], desc="stack", unit="block", disable=None)):
        prefix = f"{blocks.path}.{index}."
        layers = {name: planned[prefix + name] for name, _ in block.named_modules() if prefix + name in planned}
        dense = copy.deepcopy(block)
        minded = {}
        if sensitivity is not None:
            ranked = [name for name, layer in layers.items() if layer.rank is not None]
            minded = sensitivity.of_block(index, dense, kinds[index], ranked, dtype)
        run = Runner(stream, kinds[index], Replay(block))
        inputs = record_inputs(dense, run, list(layers), prefix, outputs=options.anchor)
        open_layers = set(layers)
        for stage in inputs.stages(true_sequential):
            with run.replay.of(_finished(layers, open_layers)):
                moments = gather(block, run, ours, inputs, stage, dtype, options.anchor)
            for leader in stage:
                _require_finite(moments[leader], prefix + leader)
                for name in inputs.members(leader):
                    source = dense.get_submodule(name)
                    own = {
                        "solve": None if solve is None else solve(layers[name]),
                        "sensitivity": minded.pop(name, None),
                        "seed": seed * len(plan.layers) + len(done.records),
                    }
                    _compress(model, layers[name], source, moments[leader], functools.partial(compress, **own), done)
                    open_layers.remove(name)
                inputs.forget(leader)
        if index < last:
            with run.replay.of(_finished(layers, inputs.of_last(true_sequential))):
                ours = list(run(block, ours))
    return done


def _finished(layers: Iterable[str], still_open: Container[str]) -> list[str]:
    """Names the parts of a block, layers or what holds them, all of whose planned layers are compressed."""
    waiting = {part for name in layers if name in still_open for part in _holders(name)}
    return sorted({part for name in layers for part in _holders(name)} - waiting)


def _holders(name: str) -> Iterator[str]:
    """Names a layer and the modules that hold it inside its block."""
    return itertools.accumulate(name.split("."), "{}.{}".format)


def _compress(
    model: nn.Module,
    layer: LayerPlan,
    dense: nn.Module,
    moments: PairedMoments,
    compress: Callable[..., Stacked],
    done: StackedModel,
) -> None:
    """Compresses one layer, puts it into the model and notes what was done."""
    start = time.perf_counter()
    try:
        stacked = compress(dense_weight(dense), dense_bias(dense), moments, layer.rank, layer.form)
    except NumericsError as error:
        raise NumericsError(f"layer {layer.name!r}: {error}") from error
    if stacked.factors is not None:
        replace_layer(model, layer.name, stacked.factors)
    elif stacked.weight is not None:
        set_dense(model, layer.name, stacked.weight, stacked.bias)
    done.quantized |= {layer.name + suffix: item.at_rest() for suffix, item in stacked.quantized.items()}
    solving = sum(item.seconds for item in stacked.quantized.values())
    done.records.append(_record(layer, stacked, moments.num_tokens, time.perf_counter() - start - solving))


def _record(layer: LayerPlan, stacked: Stacked, num_tokens: int, seconds: float) -> StackRecord:
    spectrum = stacked.spectrum
    return StackRecord(
        name=layer.name,
        rank=layer.rank,
        rel_output_error=None if spectrum is None or layer.rank is None else spectrum.discarded_share(layer.rank),
        rel_stacked_error=stacked.error,
        effective_rank=None if spectrum is None else spectrum.effective_rank,
        num_tokens=num_tokens,
        seconds=seconds,
        remedies=() if spectrum is None else spectrum.remedies,
        largest_coefficient=stacked.largest_coefficient,
    )


def _require_finite(moments: PairedMoments, name: str) -> None:
    fine = [bool(torch.isfinite(tensor).all()) for tensor in moments[:4]]
    if moments.of_outputs and fine == [False, True, True, False]:  # overflow, or a weight or bias that is not finite
        raise NumericsError(f"layer {name!r}: its outputs in the dense model hold NaN or inf, its inputs do not")
    if not all(fine):
        raise NumericsError(f"inputs of layer {name!r} hold NaN or inf; wanted finite activations")
