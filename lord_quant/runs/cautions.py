# SPDX-License-Identifier: Apache-2.0
"""What a user should know before a run that is legal but may not do what they expect."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import torch

from lord_quant.calibration import TokenWindows
from lord_quant.config import FLOAT_BITS
from lord_quant.plan import Plan


logger = logging.getLogger(__name__)

LEAST_SHARE = 0.9
"""Share of the blocks' parameters that the found layers must hold, or a caution is due."""


def log_cautions(
    model: torch.nn.Module, plan: Plan, windows: TokenWindows, stack: str, measured_on: str | None = None
) -> None:
    """Logs what the command line prints before a run."""
    for warning in run_cautions(model, plan, windows, next(model.parameters()).device, stack, measured_on):
        logger.warning(warning)


def run_cautions(
    model: torch.nn.Module,
    plan: Plan,
    windows: TokenWindows,
    device: torch.device,
    stack: str,
    measured_on: str | None = None,
) -> tuple[str, ...]:
    """Returns what a user should know before a run: short calibration, idle targets, hosts' habits.

    `stack` is that of the run; only the naive one lets Optimum run blocks and choose devices. `measured_on` is the digest
    of the tokens of the sensitivity pass that the plan rests on, None where it rests on none.
    """
    found = [*_plan_warnings(plan, windows), *_model_warnings(model, plan)]
    if measured_on not in (None, windows.sha256):
        found.append(
            f"the plan's losses were predicted on other calibration tokens (sha256 {str(measured_on)[:12]}) than these "
            f"({windows.sha256[:12]}); wanted the same dataset, windows and seed for both"
        )
    if stack != "naive":
        return tuple(found)
    found += _mask_warnings(model, plan)
    if plan.bits != FLOAT_BITS and torch.cuda.is_available() and (device.type == "cpu" or device.index not in (None, 0)):
        found.append(f"Optimum solves on the first GPU, not on {device}; CUDA_VISIBLE_DEVICES chooses which it sees")
    return tuple(found)


def _plan_warnings(plan: Plan, windows: TokenWindows) -> Iterator[str]:
    widest = max(layer.in_features for layer in plan.layers)
    if windows.num_tokens < widest:
        yield (
            f"{windows.num_tokens} calibration tokens are fewer than the {widest} inputs of the widest layer: its "
            f"covariance will be singular; wanted at least {widest}, better {10 * widest}"
        )
    odd = plan.unpackable
    if odd:
        told = f"such as {odd[0].name} ({odd[0].shape}), stay in float: no multiples of 32"
        yield f"{len(odd)} of {len(plan.layers)} layers, {told}"
    dense = [layer for layer in plan.layers if layer.note and layer not in odd]
    if dense:
        targeted = len(dense) + len(plan.rank_pattern)
        yield f"{len(dense)} of {targeted} targeted layers stay dense (`optimum-cli lord plan` says why)"
    grown: Counter[str] = Counter()  # weights, by layer or by group, whose leader holds what all share
    for layer in plan.layers:
        grown[layer.leader or layer.name] += layer.weights - layer.dense_weights
    enlarged = [layer for layer in plan.layers if grown[layer.leader or layer.name] > 0]
    if enlarged:
        yield f"--force-rank makes {len(enlarged)} layers larger than they were"


def _model_warnings(model: torch.nn.Module, plan: Plan) -> Iterator[str]:
    path = plan.block_path
    inside = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(f"{path}."))
    share = sum(layer.dense_weights for layer in plan.layers) / inside
    if share < LEAST_SHARE:
        yield (
            f"only {share:.0%} of the blocks' parameters are linear layers that can be found (mixture-of-experts weights "
            "are not): the rest stays as it is, and bits per weight do not count it"
        )


def _mask_warnings(model: torch.nn.Module, plan: Plan) -> Iterator[str]:
    kinds = set(getattr(getattr(model, "config", None), "layer_types", None) or ())
    if plan.bits != FLOAT_BITS and len(kinds) > 1:
        listed = ", ".join(sorted(kinds))
        yield f"Optimum's GPTQ calibrates every block with the first block's mask; this model has {listed}"
