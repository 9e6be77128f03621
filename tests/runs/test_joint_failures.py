# SPDX-License-Identifier: Apache-2.0
"""A joint run that fails or refuses: hooks are gone, and the message names the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_runs import BOOM_PLACES, POISONED, Boom, plan_of, poison, require_hooks_to_survive, rounding, run_joint
from models import tiny_model
from torch import nn

from lord_quant.errors import CalibrationError, NumericsError
from lord_quant.rounding.refine import Quantized


@pytest.mark.parametrize("failure", [None, *BOOM_PLACES, "solver", "late solver"])
def test_hooks_of_others_survive_and_ours_are_gone_whatever_happens(failure: str | None) -> None:
    model = tiny_model("llama")
    left = {"solver": 1, "late solver": 5}.get(str(failure), -1)

    def solve(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
        nonlocal left
        left -= 1
        if not left:
            raise Boom
        return rounding(weight, hessian)

    plan = plan_of(model, targets=("o_proj", "up_proj"))
    require_hooks_to_survive(model, failure, lambda: run_joint(model, plan, solve))


@pytest.mark.parametrize("solve", [None, rounding], ids=["float", "rounded"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("path", "layer"), POISONED)
def test_activations_that_are_not_finite_name_the_layer(path: str, layer: str, value: float, solve: Any) -> None:
    model = tiny_model("llama")
    poison(model, path, value)
    with pytest.raises(NumericsError, match=f"inputs of layer '{layer}'.*NaN or inf"):
        run_joint(model, plan_of(model), solve)
    assert type(model.get_submodule(layer)) is nn.Linear


@pytest.mark.parametrize("rank_ratio", [0.5, 1])
def test_weights_that_are_not_finite_name_the_layer(rank_ratio: float) -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"layer 'transformer\.h\.1\.mlp\.c_proj': .*NaN or inf"):
        run_joint(model, plan_of(model, bits=4, rank_ratio=rank_ratio), rounding)


@pytest.mark.parametrize("reached", ["never", "with no token"])
def test_a_layer_that_no_token_reaches_is_named(reached: str) -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.register_module("spare", nn.Linear(64, 64, dtype=torch.float64))
    if reached == "with no token":
        mlp.act_fn.register_forward_hook(lambda module, args, output: (mlp.spare(output[:0, ..., :64]), output)[1])
    with pytest.raises(CalibrationError, match=r"reached model\.layers\.1\.mlp\.spare; wanted more text"):
        run_joint(model, plan_of(model))


class Router(nn.Module):
    """Sends the tokens whose first value is positive through a layer, as a mixture of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(64, 64, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x[..., 0] > 0
        return x.masked_scatter(chosen[..., None], self.expert(x[chosen]))


def test_streams_that_part_ways_are_refused_by_name() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = Router()
    tokens = r"\(\d+,\)"
    message = rf"layer 'model\.layers\.1\.mlp\.expert' saw {tokens} tokens in the dense model, {tokens} in .*--stack naive"
    with pytest.raises(CalibrationError, match=message):
        run_joint(model, plan_of(model))


class Twice(nn.Module):
    """Sends everything through the same layer two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Wanders(nn.Module):
    """One layer follows another's input, and is called again with something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(64, 64, dtype=torch.float64) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x) + self.second(2 * x)


def test_a_layer_that_leaves_the_input_it_shared_is_refused_by_name() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = Wanders()
    with pytest.raises(CalibrationError, match=r"^model\.layers\.1\.mlp\.second: not called once.*--stack naive"):
        run_joint(model, plan_of(model))


def test_a_layer_that_is_called_twice_is_refused_by_name() -> None:
    """Its inputs of one batch would be paired with those of another."""
    model = tiny_model("llama")
    model.model.layers[1].mlp = Twice()
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.layer: not called once.*--stack naive"):
        run_joint(model, plan_of(model))
