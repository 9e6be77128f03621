# SPDX-License-Identifier: Apache-2.0
"""A rough prediction of time and memory, before heavy work.

The operations of every phase (`operations.py`) divided by the speed of a short matrix product measured on the spot. What
eigendecompositions and the loops of solvers take are rules of thumb, so expect the truth within a factor of about three.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from lord_quant.blocks.residency import waiting_bytes
from lord_quant.plan import Plan
from lord_quant.runs.operations import Work, Workload, count_phases, total


EIGEN_EFFICIENCY = 0.15
LOOP_SECONDS = 1.2e-7
"""For each weight that a solver's compiled loops go over on the CPU, one core whatever there are, polished twice."""
HOST_LOOP_SECONDS = 1e-8
"""For each of them beside a GPU, where rows are independent: the loops alone, and copies there and back."""
TURN_SECONDS = 2e-4
"""For each time that a few columns are handed from a GPU to the loops: some twenty kernels started, a few copies."""
TOKENS_AT_WORK = 8192
"""Tokens of a batch, about; what belongs to others waits, in files if it is much."""


class Estimate(NamedTuple):
    """Predicted cost of a run.

    Attributes:
        seconds: Wall time.
        memory_bytes: Peak memory of weights, stored activations and the largest statistics.
    """

    seconds: float
    memory_bytes: int


def estimate(plan: Plan, load: Workload, device: torch.device) -> Estimate:
    """Predicts time and memory of a run on `device`.

    The joint stack has two streams, two moment matrices, a block's inputs held, and of the model one block and a copy,
    everything else streaming from and to files. The CPU computes in 4-byte floats whatever is stored.
    """
    return Estimate(seconds_of(total(count_phases(plan, load).values()), device), memory_bytes(plan, load, device))


def seconds_of(work: Work, device: torch.device) -> float:
    """Predicts how long work takes on `device`, in seconds."""
    on_cpu = device.type == "cpu"
    speed, straight = matrix_flops(device), work.passes + work.products + work.rotations + work.solves
    straight += work.coupled if on_cpu else 0.0
    loops = work.looped * LOOP_SECONDS if on_cpu else work.looped * HOST_LOOP_SECONDS + work.turns * TURN_SECONDS
    return straight / speed + work.eigen / (speed * EIGEN_EFFICIENCY) + loops


def memory_bytes(plan: Plan, load: Workload, device: torch.device) -> int:
    """Predicts the peak memory of a run on `device`."""
    dense = sum(layer.dense_weights for layer in plan.layers)
    width = min(layer.in_features for layer in plan.layers)
    widest = max(layer.in_features for layer in plan.layers)
    held = 4 if device.type == "cpu" else load.itemsize
    blocks = plan.layers[-1].block + 1
    weights = plan.other_bytes // load.itemsize * held + (2 * dense // blocks if load.joint else dense) * held
    activations = 3 * load.num_tokens * width * held
    if load.joint:
        inside = [layer for layer in plan.layers if layer.block == plan.layers[0].block]
        per_token = held * sum(layer.in_features + layer.out_features for layer in inside)
        waiting = activations + load.num_tokens * per_token + load.fisher_tokens * held * 2 * blocks * width
        in_memory = waiting_bytes(dense // blocks * held)
        activations = min(waiting, in_memory) + min(load.num_tokens, TOKENS_AT_WORK) * per_token
        squares = sum(layer.out_features**2 for layer in inside)
        activations += 4 * squares * bool(load.fisher_tokens)
    return int(weights + activations + 4 * 4 * widest**2)


def matrix_flops(device: torch.device, size: int = 1024) -> float:
    """Measures the speed of a float32 matrix product on `device`, in operations per second."""
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
