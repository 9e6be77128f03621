# SPDX-License-Identifier: Apache-2.0
"""Runs over tiny models: calibration batches, plans, what layers see, and what may go wrong underway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from models import random_tokens
from torch import nn

from lord_quant.blocks.stream import block_kinds
from lord_quant.config import GptqConfig, JointConfig, LowrankConfig
from lord_quant.plan import Plan, build_plan
from lord_quant.rounding.refine import Quantized
from lord_quant.runs.joint import StackedModel, stack_model
from lord_quant.sensitivity import Expansion, Sensitivity, Steepness
from lord_quant.targets import find_blocks, find_linears


TOKENS = random_tokens()
BATCHES = list(TOKENS.split([4, 2]))
IDEAS = JointConfig()


def plan_of(model: nn.Module, bits: int = 16, **lowrank: Any) -> Plan:
    """Half the rank everywhere, unless told otherwise."""
    settings = LowrankConfig(**({"rank_ratio": 0.5, "force_rank": True} | lowrank))
    return build_plan(find_linears(model), settings, GptqConfig(bits=bits, group_size=32), itemsize=8, other_bytes=0)


def run_joint(model: nn.Module, plan: Plan, solve: Any = None, options: JointConfig = IDEAS, **rest: Any) -> StackedModel:
    batches = rest.pop("batches", BATCHES)
    solver = None if solve is None else lambda layer: solve
    return stack_model(model, plan, batches, solver, options, **({"dtype": torch.float64} | rest))


def rounding(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
    """Round to nearest, 4 bits, one group per row."""
    scales = (weight.abs().amax(dim=1, keepdim=True) / 7).clamp_min(1e-6)
    codes = (weight / scales).round().clamp(-8, 7) + 8
    return Quantized(codes, scales, torch.full_like(scales, 8), torch.zeros(weight.shape[1], dtype=torch.int32), 4)


def logits(model: nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def whole_model_inputs(model: nn.Module, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Inputs of layers by plain hooks while the whole model runs: the reference that streams are held against."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kept=seen[name]: kept.append(args[0].reshape(-1, args[0].shape[-1]).clone())
        )
        for name in names
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double().numpy() for name, parts in seen.items()}


def sensitivities(
    model: nn.Module, names: Sequence[str], batches: Sequence[torch.Tensor] = BATCHES, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Output sensitivities of layers of the whole model, by full path, in float64."""
    return block_by_block(model, names, Sensitivity.measure(model, batches, seed=seed))


def slopes(model: nn.Module, names: Sequence[str], batches: Sequence[torch.Tensor] = BATCHES) -> dict[str, Steepness]:
    """Slopes of the text's loss, likewise."""
    found = block_by_block(model, names, Expansion.measure(model, batches))
    return {name: both.slope for name, both in found.items()}


def block_by_block(model: nn.Module, names: Sequence[str], measured: Any) -> dict[str, Any]:
    """Asks for layers of the whole model, by full path, in float64."""
    blocks = find_blocks(model)
    kinds = block_kinds(model, len(blocks.modules))
    found = {}
    for index, (block, kind) in enumerate(zip(blocks.modules, kinds, strict=True)):
        prefix = f"{blocks.path}.{index}."
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        of_block = measured.of_block(index, block, kind, inside, torch.float64)
        found |= {prefix + name: values for name, values in of_block.items()}
    return found


class Boom(Exception):
    """Raised in the middle of a run, on purpose."""


BOOM_PLACES = ("embedding", "first block", "second block")


def require_hooks_to_survive(model: nn.Module, failure: str | None, run: Callable[[], Any]) -> None:
    """Fails unless a run over a llama leaves the hooks of others in place and none of its own.

    Args:
        model: The model.
        failure: Where the run fails with a `Boom`: one of `BOOM_PLACES`, or another name where `run` sees to it itself.
        run: The run.
    """
    calls = []
    blocks = find_blocks(model).modules
    for module in (model, *blocks, blocks[0].self_attn.q_proj, blocks[1].mlp.down_proj):
        module.register_forward_pre_hook(lambda module, args: calls.append(module))
        module.register_forward_hook(lambda module, args, output: calls.append(module))
    boom = None
    if failure in BOOM_PLACES:
        inside = (model.model.embed_tokens, blocks[0].mlp.act_fn, blocks[1].mlp.act_fn)

        def fail(*_: Any) -> None:
            raise Boom

        boom = inside[BOOM_PLACES.index(failure)].register_forward_hook(fail)
    before = _hook_ids(model)
    if failure:
        with pytest.raises(Boom):
            run()
    else:
        run()
    after = _hook_ids(model)
    assert calls
    assert {name: after[name] for name in before if name in after} == {n: ids for n, ids in before.items() if n in after}
    assert all(not ids for name, ids in after.items() if name not in before)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    if boom:
        boom.remove()
    calls.clear()
    logits(model)
    assert {model, *blocks} <= set(calls)


def _hook_ids(model: nn.Module) -> dict[str, list[int]]:
    return {
        name: [*module._forward_pre_hooks, *module._forward_hooks, *module._forward_pre_hooks_with_kwargs]
        for name, module in model.named_modules()
    }


# Where a llama's activations are spoilt → the first layer that sees it.
POISONED = [
    ("model.layers.1.post_attention_layernorm", "model.layers.1.mlp.gate_proj"),
    ("model.layers.0.mlp.act_fn", "model.layers.0.mlp.down_proj"),
]


def poison(model: nn.Module, path: str, value: float) -> None:
    """Makes one channel of a module's output NaN or infinite."""

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., 3] = value
        return output

    model.get_submodule(path).register_forward_hook(hook)
