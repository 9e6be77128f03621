# SPDX-License-Identifier: Apache-2.0
"""What becomes of one layer, or of several compressed as one, whatever the numerics make of it.

A layer whose weights or inputs hold NaN or inf is an error, always. One that is sound but cannot be compressed is not worth
a run of a day: the algebra is repeated in float64, and if that does not help either, the layer stays as it was, unpacked.
That happens where scales or biases leave float16, in which packed layers store them, where a factorization fails whatever
the damping, and where the outcome would be worse than no layer at all (weights too small for any scale). Whatever was done
is in the layer's record, under `remedies`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lord_quant.config import FLOAT_BITS, JointConfig
from lord_quant.decompose import Factors
from lord_quant.errors import NumericsError
from lord_quant.linalg import require_finite
from lord_quant.moments import PairedMoments
from lord_quant.plan import LayerPlan, Plan
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.solver import Solvers
from lord_quant.sizes.layer_bytes import TWO_FACTOR, linear_bytes
from lord_quant.stack import Stacked, stack_layer


KEPT = "kept dense and unpacked"
"""What the remedy of a layer begins with that stays as it was."""


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
        process: Which process did it.
        kept: Whether it stays as it was, unpacked, whatever was planned.
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
    process: int = 0
    kept: bool = False


class Outcome(NamedTuple):
    """What becomes of a layer, or of several compressed as one, and all that is to be known of it.

    Attributes:
        factors: As they will be read back, or None.
        weight: Of a layer that stays dense, or None.
        bias: With shape (out_features,), or None.
        quantized: What is to be packed, by full module path.
        records: One per layer.
    """

    factors: Factors | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    quantized: dict[str, Quantized]
    records: list[StackRecord]


def outcome_of(
    layers: Sequence[LayerPlan],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    moments: PairedMoments,
    solve: Solvers | None,
    options: JointConfig,
    dtype: torch.dtype,
    **settings: Any,
) -> Outcome:
    """Compresses one layer, or several as one; where that cannot be done they stay as they were.

    Args:
        layers: What is planned for them, the one that holds a group's `down` first.
        weight: Theirs on top of each other, finite, with shape (m, n), in the dtype of their modules.
        bias: Likewise, with shape (m,), or None.
        moments: Of their input, finite.
        solve: Their solvers, or None for factors in float.
        options: Which ideas of the joint stack are on.
        dtype: In which moments were to be taken.
        **settings: Further arguments of `stack_layer`.
    """
    start, first, problems = time.perf_counter(), layers[0], list[str]()
    notes = [*_silent_inputs(moments)]
    if moments.covariance.dtype != dtype:
        notes.append("moments in float64: squares of activations overflow")
    for attempt in dict.fromkeys((moments.covariance.dtype, torch.float64)):
        try:
            stacked = stack_layer(
                weight, bias, moments.to(attempt), first.rank, first.form, solve, options, **_cast(settings, attempt)
            )
            _require_storable(stacked, weight.dtype)
        except (NumericsError, torch.linalg.LinAlgError) as error:
            problems.append(str(error))
            continue
        if problems:
            notes.append(f"algebra in float64: {problems[0]}")
        quantized = _parts(layers, stacked.quantized)
        solving = sum(item.seconds for item in stacked.quantized.values())
        seconds = (time.perf_counter() - start - solving) / len(layers)
        remedies = tuple(dict.fromkeys((*notes, *stacked.remedies)))
        records = [_record(layer, stacked, moments.num_tokens, seconds, remedies) for layer in layers]
        return Outcome(stacked.factors, stacked.weight, stacked.bias, quantized, records)
    seconds = (time.perf_counter() - start) / len(layers)
    remedies = (f"{KEPT}: {problems[-1]}", *notes)
    return Outcome(None, None, None, {}, [_kept(layer, moments.num_tokens, seconds, remedies) for layer in layers])


def _silent_inputs(moments: PairedMoments) -> Iterator[str]:
    """Tells of inputs that never vary: what becomes of their weights is not measured."""
    silent, inputs = int((moments.covariance.diagonal() <= 0).sum()), len(moments.covariance)
    if silent:
        yield f"{'all' if silent == inputs else 'some'} inputs never vary: their weights are rounded as they are"


def _cast(settings: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in settings.items()}


def _require_storable(stacked: Stacked, dtype: torch.dtype) -> None:
    """Refuses what would not be finite as it is stored, or would do worse than a layer whose weights are zero.

    Args:
        stacked: The layer.
        dtype: That of its module.

    Raises:
        NumericsError: It is so.
    """
    factors = stacked.factors
    if factors is None:
        weights, biases = {"weight": stacked.weight}, {"bias": stacked.bias}
    else:
        weights = {"factor down": factors.down, "factor up": factors.up}
        biases = {f"bias of factor {name}": bias for name, bias in factors.biases().items()}
    for name, tensor in (weights | biases).items():
        if tensor is not None:
            require_finite(tensor.to(dtype), f"{name} in {dtype}")
    for name, tensor in biases.items():
        if stacked.quantized and tensor is not None:
            require_finite(tensor.half(), f"{name} stored as float16")
    if not stacked.error < 1:
        raise NumericsError(f"{stacked.error:.3g} of the output energy would be lost; a layer of zeros loses 1")


def _parts(layers: Sequence[LayerPlan], quantized: Mapping[str, Quantized]) -> dict[str, Quantized]:
    """Returns what is to be packed by full module path; of a group, its leader's `up` carries the loss of all."""
    found = {layers[0].name + suffix: item.at_rest() for suffix, item in quantized.items()}
    if len(layers) == 1 or not quantized:
        return found
    sizes = [layer.out_features for layer in layers]
    whole = found.pop(f"{layers[0].name}.up")
    parts = zip(*(tensor.split(sizes) for tensor in (whole.codes, whole.scales, whole.zeros)), strict=True)
    for layer, (codes, scales, zeros) in zip(layers, parts, strict=True):
        own = whole._replace(codes=codes, scales=scales, zeros=zeros, g_idx=whole.g_idx.clone())  # hosts pack in place
        found[f"{layer.name}.up"] = own if layer is layers[0] else own._replace(loss=None, seconds=0.0)
    return found


def _record(layer: LayerPlan, stacked: Stacked, num_tokens: int, seconds: float, remedies: tuple[str, ...]) -> StackRecord:
    spectrum = stacked.spectrum
    return StackRecord(
        name=layer.name,
        rank=layer.rank,
        rel_output_error=None if spectrum is None or layer.rank is None else spectrum.discarded_share(layer.rank),
        rel_stacked_error=stacked.error,
        effective_rank=None if spectrum is None else spectrum.effective_rank,
        num_tokens=num_tokens,
        seconds=seconds,
        remedies=remedies,
        largest_coefficient=stacked.largest_coefficient,
    )


def _kept(layer: LayerPlan, num_tokens: int, seconds: float, remedies: tuple[str, ...]) -> StackRecord:
    return StackRecord(layer.name, None, None, 0.0, None, num_tokens, seconds, remedies, None, kept=True)


def plan_as_run(plan: Plan, records: Iterable[StackRecord], itemsize: int) -> Plan:
    """Returns what became of every layer: the plan, but for layers that stay as they were.

    Args:
        plan: What was planned.
        records: What happened.
        itemsize: Bytes of a float value in the checkpoint.

    Raises:
        NumericsError: All that was to be compressed stays as it was (up to three layers are named).
    """
    kept = {record.name: record for record in records if record.kept}
    done = replace(
        plan, layers=tuple(_as_it_was(layer, itemsize) if layer.name in kept else layer for layer in plan.layers)
    )
    asked, left = (
        each.rank_pattern if plan.bits == FLOAT_BITS else [layer for layer in each.layers if layer.bits != FLOAT_BITS]
        for each in (plan, done)
    )
    if asked and not left:
        told = [f"  {name}: {record.remedies[0].removeprefix(KEPT + ': ')}" for name, record in kept.items()]
        more = [f"  … and {len(told) - 3} more"] if len(told) > 3 else []
        raise NumericsError("\n".join(["no layer of the model can be compressed:", *told[:3], *more]))
    return done


def _as_it_was(layer: LayerPlan, itemsize: int) -> LayerPlan:
    size = linear_bytes(layer.in_features, layer.out_features, layer.has_bias, FLOAT_BITS, layer.group_size, itemsize)
    return replace(
        layer,
        rank=None,
        adds_bias=False,
        weight_bytes=size.weight,
        bias_bytes=size.bias,
        note=KEPT,
        form=TWO_FACTOR,
        bits=FLOAT_BITS,
        up_bits=FLOAT_BITS,
        up_group_size=layer.group_size,
        leader="",
    )
