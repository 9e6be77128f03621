# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode speed, and memory, of a model, optionally beside a baseline.

Decoding is greedy with a KV cache, driven here token by token: `generate` would add its own bookkeeping, which on a
small model costs more than the model. Two models are measured in turns (A B A B), because a machine that warms up or is
shared drifts: measured one after the other, the drift would read as a difference. Medians, for the same reason.

Memory is each model's own, though both are loaded: its weights, counted tensor by tensor, and, where the allocator
tells (CUDA), what its run takes beyond what was allocated before. On the CPU only the peak of the whole process is known,
which belongs to neither model, so none is given.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from lord_quant.errors import EvaluationError


@dataclass(frozen=True)
class ModelSpeed:
    """Speed of one model.

    Attributes:
        prefill_tokens_per_second: Prompt tokens (of all sequences) per second, median of the repeats.
        decode_tokens_per_second: New tokens (of all sequences) per second after the first, median of the repeats.
        weight_bytes: Memory that the model's parameters, buffers and tensors kept by its modules (such as unpacked
            weights) take after the runs, shared memory counted once.
        working_bytes: CUDA: most memory allocated during a measured run (KV cache, activations, weights unpacked for a
            moment) beyond what was allocated before it. None on the CPU.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    weight_bytes: int
    working_bytes: int | None


@dataclass(frozen=True)
class Speed:
    """Speeds of a model and, if given, its baseline.

    Attributes:
        model: The model's own speed.
        baseline: The baseline's, measured in turns with it.
        prefill_ratio: Model over baseline; above 1 the model is faster.
        decode_ratio: Likewise for decoding.
        batch_size: Sequences at a time.
        prompt_tokens: Prompt length of each.
        new_tokens: Decoded tokens of each.
        repeats: Measured turns, after one unmeasured warm-up.
        device: Where it ran.
        threads: Processor threads PyTorch used.
    """

    model: ModelSpeed
    baseline: ModelSpeed | None
    prefill_ratio: float | None
    decode_ratio: float | None
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    device: str
    threads: int


def measure_speed(
    model: Any,
    baseline: Any | None = None,
    *,
    batch_size: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
) -> Speed:
    """Measures `model`, in turns with `baseline` if given. Prompts are fixed tokens: their content changes no timing.

    Raises:
        EvaluationError: A count below its minimum (two new tokens, one of everything else).
    """
    import torch

    if min(batch_size, prompt_tokens, repeats) < 1 or new_tokens < 2:
        raise EvaluationError(
            f"wanted batch_size, prompt_tokens, repeats ≥ 1 and new_tokens ≥ 2; found {batch_size}, {prompt_tokens}, "
            f"{repeats}, {new_tokens}"
        )
    models = [model] if baseline is None else [model, baseline]
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    peaks: list[list[int]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for index, candidate in enumerate(models):
            pair, peak = _one_run(candidate, batch_size, prompt_tokens, new_tokens)
            if turn > 0:  # the warm-up may also allocate what stays
                times[index].append(pair)
                peaks[index] += [peak] if peak is not None else []
    speeds = [
        ModelSpeed(
            batch_size * prompt_tokens / statistics.median(prefill for prefill, _ in runs),
            batch_size * (new_tokens - 1) / statistics.median(decode for _, decode in runs),
            _weight_bytes(candidate),
            max(taken, default=None),
        )
        for candidate, runs, taken in zip(models, times, peaks, strict=True)
    ]
    other = speeds[1] if len(speeds) > 1 else None
    return Speed(
        model=speeds[0],
        baseline=other,
        prefill_ratio=speeds[0].prefill_tokens_per_second / other.prefill_tokens_per_second if other else None,
        decode_ratio=speeds[0].decode_tokens_per_second / other.decode_tokens_per_second if other else None,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        device=_device_name(next(model.parameters()).device),
        threads=torch.get_num_threads(),
    )


def _one_run(model: Any, batch_size: int, prompt_tokens: int, new_tokens: int) -> tuple[tuple[float, float], int | None]:
    """Returns ((prefill seconds, decode seconds), peak bytes beyond those before) of one generation."""
    import torch

    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = torch.arange(batch_size * prompt_tokens, device=device).reshape(batch_size, prompt_tokens) % vocabulary
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            start = _now(device)
            output = model(input_ids=prompt, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
            middle = _now(device)
            for _ in range(new_tokens - 1):
                output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1:].argmax(-1)
            end = _now(device)
    finally:
        model.train(was_training)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return (middle - start, end - middle), peak


def _now(device: Any) -> float:
    """Seconds on a monotonic clock, once the device has finished what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _weight_bytes(model: Any) -> int:
    """Bytes of all memory that the tensors of the model's modules hold on to, shared memory once."""
    import torch

    storages: dict[tuple[str, int], int] = {}
    pending: list[Any] = [[*model.parameters(), *model.buffers()], *(vars(module) for module in model.modules())]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            for part in _plain_tensors(value):
                storage = part.untyped_storage()
                storages[str(storage.device), storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
    return sum(storages.values())


def _plain_tensors(tensor: Any) -> list[Any]:
    """The tensors with memory of their own that a wrapper, such as torchao's quantized weights, is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_tensors(getattr(tensor, name))]


def _device_name(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
