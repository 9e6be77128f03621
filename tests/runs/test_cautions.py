# SPDX-License-Identifier: Apache-2.0
"""Cautions name numbers, and are silent when there is nothing to say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lord_quant.calibration import TokenWindows, as_windows
from lord_quant.config import GptqConfig, LowrankConfig
from lord_quant.plan import Plan, build_plan
from lord_quant.runs.cautions import run_cautions
from lord_quant.targets import find_linears


CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Linear(64, 256)
        self.experts = nn.Parameter(torch.zeros(hidden, 64))


class Model(nn.Module):
    def __init__(self, hidden: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(hidden)])


def plan(model: nn.Module, force: bool = False, ratio: float = 0.5) -> Plan:
    lowrank = LowrankConfig(rank_ratio=ratio, force_rank=force)
    return build_plan(find_linears(model), lowrank, GptqConfig(group_size=32), itemsize=4, other_bytes=0)


def windows(tokens: int) -> TokenWindows:
    return as_windows(torch.zeros(1, tokens, dtype=torch.int64), "test")


def test_nothing_to_say() -> None:
    assert run_cautions(Model(), plan(Model()), windows(640), CPU, "naive") == ()


def test_too_few_tokens_are_counted_against_the_widest_layer() -> None:
    (caution,) = run_cautions(Model(), plan(Model()), windows(63), CPU, "joint")
    assert "63 calibration tokens" in caution and "64 inputs" in caution


def test_losses_predicted_on_other_tokens_are_told() -> None:
    given = windows(640)
    assert run_cautions(Model(), plan(Model()), given, CPU, "joint", given.sha256) == ()
    (caution,) = run_cautions(Model(), plan(Model()), given, CPU, "joint", windows(641).sha256)
    assert windows(641).sha256[:12] in caution and given.sha256[:12] in caution


def test_weights_that_are_no_linear_layers_are_noticed() -> None:
    (caution,) = run_cautions(Model(hidden=1024), plan(Model(hidden=1024)), windows(640), CPU, "naive")
    assert "only 20% of the blocks' parameters" in caution  # 16384 of 16384 + 256 + 65536


def test_enlarged_layers_are_counted() -> None:
    (caution,) = run_cautions(Model(), plan(Model(), force=True, ratio=1 - 1e-3), windows(640), CPU, "naive")
    assert "makes 1 layers larger" in caution


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 64) for _ in range(3))


@pytest.mark.parametrize(("rank", "enlarged"), [(32, 0), (64, 3)])
def test_a_group_is_enlarged_as_a_whole_or_not_at_all(rank: int, enlarged: int) -> None:
    """Its leader holds what all share: by itself it is always as large as the layer it was."""
    model = Model()
    model.layers = nn.ModuleList([Attention()])
    lowrank = LowrankConfig(rank_pattern={"all": rank}, form="grouped", force_rank=True)
    made = build_plan(find_linears(model), lowrank, GptqConfig(group_size=32), itemsize=4, other_bytes=0)
    assert made.layers[0].weights >= made.layers[0].dense_weights
    found = run_cautions(model, made, windows(640), CPU, "joint")
    assert found == ((f"--force-rank makes {enlarged} layers larger than they were",) if enlarged else ())


def test_dense_targets_are_counted_among_the_targets_only() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.square = nn.Linear(64, 256), nn.Linear(64, 64)

    model = Model()
    model.layers = nn.ModuleList([Two()])
    (caution,) = run_cautions(model, plan(model), windows(640), CPU, "naive")
    assert caution.startswith("1 of 2 targeted layers stay dense")


def test_only_the_naive_stack_lends_the_first_mask_to_every_block() -> None:
    model = Model()
    model.config = SimpleNamespace(layer_types=["sliding_attention", "full_attention"])  # type: ignore[assignment]
    assert run_cautions(model, plan(model), windows(640), CPU, "joint") == ()
    (caution,) = run_cautions(model, plan(model), windows(640), CPU, "naive")
    assert "first block's mask" in caution and "full_attention, sliding_attention" in caution
