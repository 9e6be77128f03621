# SPDX-License-Identifier: Apache-2.0
"""A rough prediction of time and memory, before heavy work.

Operation counts divided by the speed of a short matrix product measured on the spot. The counts are the leading terms
only, and the fractions of matrix speed that eigendecompositions and the GPTQ solver reach are rules of thumb, so expect
the truth within a factor of about three.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from lord_quant.config import FLOAT_BITS
from lord_quant.plan import Plan


EIGEN_FLOPS = 10
"""Operations per k³ of a symmetric eigendecomposition."""
EIGEN_EFFICIENCY = 0.15
SOLVER_EFFICIENCY = 0.02
"""The solver works column by column."""
FISHER_PASSES = 5
"""Of the dense model: forward once, then forward and back through every block twice."""
JOINT_PASSES = 3
"""Passes of the compressed stream through a block of four stages, finished parts being replayed."""


class Estimate(NamedTuple):
    """Predicted cost of a run.

    Attributes:
        seconds: Wall time.
        memory_bytes: Peak memory of weights, stored activations and the largest statistics.
    """

    seconds: float
    memory_bytes: int


def estimate(
    plan: Plan, num_tokens: int, device: torch.device, itemsize: int, joint: bool, fisher_tokens: int = 0
) -> Estimate:
    """Predicts time and memory of a run on `device`.

    Args:
        plan: The plan.
        num_tokens: Calibration tokens.
        device: Where it will run.
        itemsize: Bytes of a stored float value; the CPU computes in 4-byte floats whatever is stored.
        joint: Whether the joint stack runs: two streams, two moment matrices, a block's inputs held, and of the model one
            block and a copy of it, everything else streaming from and to files.
        fisher_tokens: Tokens of the joint stack's backward pass; 0 for none.
    """
    speed = matrix_flops(device)
    dense = sum(layer.dense_weights for layer in plan.layers)
    kept = sum(layer.weights for layer in plan.layers)
    forward, solve, eigen = 2.0 * dense * num_tokens, 0.0, 0.0
    for layer in plan.layers:
        if layer.rank is not None:
            eigen += EIGEN_FLOPS * min(layer.in_features, layer.out_features) ** 3
        if joint or layer.rank is not None:
            forward += 2.0 * (1 + joint) * layer.in_features**2 * num_tokens
    per_block = len(plan.layers) / (plan.layers[-1].block + 1)
    if joint:
        forward += 2.0 * kept * num_tokens * JOINT_PASSES
        forward += 2.0 * dense * fisher_tokens * FISHER_PASSES
        forward += sum(2.0 * layer.out_features**2 * fisher_tokens for layer in plan.layers if layer.rank is not None)
    elif plan.bits != FLOAT_BITS:
        factors = sum(len(layer.factor_shapes()) for layer in plan.layers) / len(plan.layers)
        forward += 2.0 * kept * num_tokens * (per_block * factors + 1)  # true_sequential: a block once per layer
        forward += sum(2.0 * n * n * num_tokens for layer in plan.layers for n, _ in layer.factor_shapes().values())
    if plan.bits != FLOAT_BITS:
        for layer in plan.layers:
            for inputs, outputs in layer.factor_shapes().values():
                solve += 2.0 * inputs**2 * outputs + inputs**3
    seconds = forward / speed + eigen / (speed * EIGEN_EFFICIENCY) + solve / (speed * SOLVER_EFFICIENCY)
    width = min(layer.in_features for layer in plan.layers)
    widest = max(layer.in_features for layer in plan.layers)
    held = 4 if device.type == "cpu" else itemsize
    blocks = plan.layers[-1].block + 1
    weights = plan.other_bytes // itemsize * held + (2 * dense // blocks if joint else dense) * held
    activations = 3 * num_tokens * width * held
    if joint:
        first = plan.layers[0].block
        activations += num_tokens * held * sum(layer.in_features for layer in plan.layers if layer.block == first)
        # every block's output gradients, one block's graph, and one block's matrices
        inside = [layer for layer in plan.layers if layer.block == first]
        activations += fisher_tokens * held * (2 * blocks * width + sum(layer.out_features for layer in inside))
        activations += 4 * sum(layer.out_features**2 for layer in inside if layer.rank is not None) * bool(fisher_tokens)
    return Estimate(seconds, int(weights + activations + 4 * 4 * widest**2))


def matrix_flops(device: torch.device, size: int = 1024) -> float:
    """Measures the speed of a float32 matrix product on `device`, in operations per second."""
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
