# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode speed, and peak memory, of a model, optionally beside a baseline.

Decoding is greedy with a KV cache, driven here token by token: `generate` would add its own bookkeeping, which on a
small model costs more than the model. Two models are measured in turns (A B A B), because a machine that warms up or is
shared drifts: measured one after the other, the drift would read as a difference. Medians, for the same reason.
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
        peak_memory_bytes: CUDA: most memory allocated on the device while this model ran (both models are loaded). CPU:
            peak resident size of the process so far, which includes everything loaded before.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int


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
    memory = [0 for _ in models]
    for turn in range(repeats + 1):
        for index, candidate in enumerate(models):
            pair, peak = _one_run(candidate, batch_size, prompt_tokens, new_tokens)
            memory[index] = max(memory[index], peak)
            if turn > 0:
                times[index].append(pair)
    speeds = [
        ModelSpeed(
            batch_size * prompt_tokens / statistics.median(prefill for prefill, _ in runs),
            batch_size * (new_tokens - 1) / statistics.median(decode for _, decode in runs),
            peak,
        )
        for runs, peak in zip(times, memory, strict=True)
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


def _one_run(model: Any, batch_size: int, prompt_tokens: int, new_tokens: int) -> tuple[tuple[float, float], int]:
    """Returns ((prefill seconds, decode seconds), peak memory in bytes) of one generation."""
    import torch

    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = torch.arange(batch_size * prompt_tokens, device=device).reshape(batch_size, prompt_tokens) % vocabulary
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
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
    return (middle - start, end - middle), _peak_memory(device)


def _now(device: Any) -> float:
    """Seconds on a monotonic clock, once the device has finished what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_memory(device: Any) -> int:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else


def _device_name(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
