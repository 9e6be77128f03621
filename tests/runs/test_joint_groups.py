# SPDX-License-Identifier: Apache-2.0
"""The joint run over layers that share a bottleneck: one layer to the algebra, several in the model."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_runs import BATCHES, IDEAS, logits, plan_of, rounding, run_joint, sensitivities, whole_model_inputs
from models import tiny_model
from torch import nn

from lord_quant import outcomes
from lord_quant.config import GptqConfig, JointConfig
from lord_quant.errors import CalibrationError, NumericsError
from lord_quant.modules import GroupedLinear, LowRankLinear
from lord_quant.plan import LayerPlan, Plan
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.solver import Gptq, Solvers
from lord_quant.runs import joint
from lord_quant.runs.joint import stack_model
from lord_quant.sensitivity import Sensitivity
from lord_quant.stack import Stacked, stack_layer
from lord_quant.targets import dense_bias, dense_weight
from lord_quant.truncation import unit_metric


FAMILIES = ["llama", "qwen2"]
GROUPS = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]
Calls = list[tuple[tuple[Any, ...], dict[str, Any], Stacked]]


def grouped_plan(model: nn.Module, **options: Any) -> Plan:
    return plan_of(model, form="grouped", **options)


def groups_of(plan: Plan) -> dict[str, list[LayerPlan]]:
    """Members by leader, the leader first."""
    found: dict[str, list[LayerPlan]] = {}
    for layer in plan.layers:
        if layer.leader:
            found.setdefault(layer.leader, []).append(layer)
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the algebra was given and what it returned, in order."""
    kept: Calls = []

    def spy(*args: Any, **kwargs: Any) -> Stacked:
        kept.append((args, kwargs, stack_layer(*args, **kwargs)))
        return kept[-1][2]

    monkeypatch.setattr(outcomes, "stack_layer", spy)
    return kept


@pytest.mark.parametrize("solve", [None, rounding], ids=["float", "rounded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_is_stacked_as_the_layer_its_outputs_make_and_split_by_rows(family: str, solve: Any, calls: Calls) -> None:
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    plan = grouped_plan(model, bits=4 if solve else 16)
    groups = groups_of(plan)
    assert list(plan.group_pattern) and len(groups) == 4
    done = run_joint(model, plan, solve)
    assert len(calls) == len(plan.layers) - 3 * 2  # two of q, k, v and one of gate, up are done with another, per block
    by_shape = {tuple(args[0].shape): (args, kwargs, result) for args, kwargs, result in calls}
    assert {(128, 64), (256, 64)} <= by_shape.keys()
    merged = [call for call in calls if tuple(call[0][0].shape) in ((128, 64), (256, 64))]
    for (leader, members), (args, kwargs, result) in zip(groups.items(), merged, strict=True):
        sources = [dense.get_submodule(member.name) for member in members]
        assert torch.equal(args[0], torch.cat([dense_weight(source) for source in sources]))
        biases = [dense_bias(source) for source in sources]
        if all(bias is None for bias in biases):
            assert args[1] is None
        else:
            assert torch.equal(args[1], torch.cat(biases))
        assert args[3:5] == (members[0].rank, "grouped")
        again = stack_layer(*args, **kwargs)
        at = 0
        for member in members:
            module, rows = model.get_submodule(member.name), slice(at, at + member.out_features)
            assert type(module) is GroupedLinear and module.bottleneck.leader is model.get_submodule(leader)
            assert torch.equal(module.up.weight, again.factors.up[rows]) and torch.equal(
                module.up.bias, again.factors.bias[rows]
            )
            if solve:
                whole, own = again.quantized[".up"], done.quantized[f"{member.name}.up"]
                for one, other in ((own.codes, whole.codes), (own.scales, whole.scales), (own.zeros, whole.zeros)):
                    assert torch.equal(one.to(other), other[rows])
                assert torch.equal(own.g_idx, whole.g_idx) and torch.equal(own.weight().double(), module.up.weight)
            at += member.out_features
        assert at == len(args[0]) and torch.equal(model.get_submodule(leader).down.weight, again.factors.down)
        records = {record.name: record for record in done.records if record.name in {member.name for member in members}}
        assert {(r.rank, r.rel_stacked_error) for r in records.values()} == {(members[0].rank, result.error)}
    assert done.quantized.keys() == (plan.packings.keys() if solve else set())
    indices = [item.g_idx.data_ptr() for item in done.quantized.values()]
    assert len(set(indices)) == len(indices)  # hosts pack in place
    assert sorted(record.name for record in done.records) == sorted(layer.name for layer in plan.layers)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_a_group_of_full_rank_leaves_the_logits_alone(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    plan = grouped_plan(model, rank_ratio=0.999)
    assert {layer.rank for layer in plan.layers if layer.leader} == {64}
    done = run_joint(model, plan)
    assert max(record.rel_stacked_error for record in done.records) < 1e-12
    assert {type(model.get_submodule(name)) for name in plan.group_pattern} == {GroupedLinear}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_sees_the_model_as_it_will_be(family: str, calls: Calls) -> None:
    """Replaying parts of a block agrees with layers that share an output: compressed inputs are those of the result."""
    model = tiny_model(family)
    plan = grouped_plan(model, bits=4)
    run_joint(model, plan, rounding)
    leaders = [layer.name for layer in plan.layers if layer.leader in ("", layer.name)]
    after = whole_model_inputs(model, leaders)
    for name, (args, _, _) in zip(leaders, calls, strict=True):
        wanted = torch.from_numpy(after[name]).mean(0)
        torch.testing.assert_close(args[2].mean, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("true_sequential", [True, False])
def test_replaying_finished_parts_changes_nothing(true_sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for replay in (True, False):
        if not replay:
            monkeypatch.setattr(joint, "_finished", lambda layers, still_open: [])
        model = tiny_model("llama")
        run_joint(model, grouped_plan(model), true_sequential=true_sequential)
        states.append(model.state_dict())
        assert all(one.bottleneck._latest is None for one in model.modules() if isinstance(one, GroupedLinear))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_mean_output_of_every_member_is_the_dense_one() -> None:
    model = tiny_model("qwen2")
    dense = copy.deepcopy(model)
    plan = grouped_plan(model, bits=4)
    run_joint(model, plan, rounding)
    names = list(plan.rank_pattern)
    before, after = whole_model_inputs(dense, names), whole_model_inputs(model, names)
    with torch.no_grad():
        for name in names:
            wanted = dense.get_submodule(name)(torch.from_numpy(before[name])).mean(0)
            found = model.get_submodule(name)(torch.from_numpy(after[name])).mean(0)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("mean_correction", [True, False])
def test_biases_where_only_some_members_have_one(mean_correction: bool) -> None:
    """The others' count as zeros: at full rank the model is the same, biases being corrected or not."""
    model = tiny_model("llama")
    for block in model.model.layers:
        block.self_attn.k_proj.bias = nn.Parameter(torch.linspace(-1, 1, 32, dtype=torch.float64))
    before = logits(model)
    targets = () if mean_correction else ("mlp",)
    options: dict[str, Any] = {"rank_ratio": 0.999, "mean_correction": mean_correction}
    run_joint(model, grouped_plan(model, **options, **({"targets": targets} if targets else {})))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-8)
    attention = model.model.layers[0].self_attn
    assert (type(attention.k_proj) is GroupedLinear) == mean_correction
    assert (model.model.layers[0].mlp.up_proj.up.bias is not None) == mean_correction


def test_sensitivities_of_a_group_are_their_block_diagonal(calls: Calls) -> None:
    model = tiny_model("llama")
    names = [f"model.layers.0.{name}" for name in GROUPS[0]]
    minded = sensitivities(model, names)
    run_joint(model, grouped_plan(model), sensitivity=Sensitivity.measure(model, BATCHES))
    tokens = sum(batch.numel() for batch in BATCHES)
    wanted = unit_metric(torch.block_diag(*(minded[name] for name in names)), tokens)
    (found,) = [kwargs["metric"] for args, kwargs, _ in calls[:1]]
    assert wanted is not None and found.shape == (128, 128)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_both_factors_have_their_own_solver_and_a_group_asks_once() -> None:
    model = tiny_model("llama", torch.float32)
    plan = grouped_plan(model, bits=4)
    asked = []

    def solvers_of(layer: LayerPlan) -> Solvers:
        asked.append(layer.name)
        return Solvers(*(functools.partial(_with_bits, bits) for bits in (8, 3)))

    done = stack_model(model, plan, BATCHES, solvers_of, dataclasses.replace(IDEAS, refine=0))
    assert len(asked) == len(set(asked)) == len(plan.layers) - len(plan.group_pattern)
    assert not set(asked) & plan.group_pattern.keys()
    bits = {name: item.bits for name, item in done.quantized.items()}
    assert bits == {name: 3 if name.endswith(".up") else 8 for name in plan.packings}


def _with_bits(bits: int, weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
    return rounding(weight, hessian)._replace(bits=bits)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["two_factor", "pivoted", "grouped"])
def test_bits_of_a_factor_are_the_width_of_its_codes(form: str) -> None:
    """Solvers as a run makes them; more bits for one factor alone lower the error."""
    errors = {}
    for bits in ((4, 3), (3, 4), (3, 3), (4, 4)):
        model = tiny_model("llama", torch.float32)
        plan = plan_of(model, bits=4, form=form, targets=("mlp",))

        def solvers_of(layer: LayerPlan, bits: tuple[int, int] = bits) -> Solvers:
            return Solvers(*(Gptq(GptqConfig(bits=width), 32, 144) for width in bits))

        done = stack_model(model, plan, BATCHES, solvers_of, IDEAS, dtype=torch.float32)
        for name in plan.rank_pattern:
            for suffix, width in zip((".down", ".up"), bits, strict=True):
                item = done.quantized.get(name + suffix)
                if item is not None:
                    assert item.bits == width and 2 ** (width - 1) <= item.codes.max() < 2**width
                    weight = model.get_submodule(name + suffix).weight
                    torch.testing.assert_close(item.weight(), weight.detach(), rtol=0, atol=1e-6)
        errors[bits] = sum(record.rel_stacked_error for record in done.records if record.rank)
    assert errors[4, 4] < errors[4, 3] < errors[3, 3] and errors[4, 4] < errors[3, 4] < errors[3, 3]


class Apart(nn.Module):
    """Attention that feeds its layers different tensors, whatever they are called."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 64, dtype=torch.float64) for _ in range(3))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.v_proj(x) + self.k_proj(self.change(x))


@pytest.mark.parametrize("change", [torch.tanh, torch.clone], ids=["another input", "a copy of it"])
def test_grouped_layers_that_are_fed_different_tensors_are_refused_by_name(change: Any) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = Apart(change)
    message = r"grouped with model\.layers\.1\.mlp\.q_proj are not fed the same input; wanted another form"
    with pytest.raises(CalibrationError, match=message):
        run_joint(model, grouped_plan(model))
    model = tiny_model("llama")
    model.model.layers[1].mlp = Apart(change)
    run_joint(model, grouped_plan(model, form_pattern={"*.1.mlp.*": "two_factor"}))
    assert {type(layer) for layer in model.model.layers[1].mlp.children()} == {LowRankLinear}


def test_a_member_that_is_not_finite_names_the_group() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"layer 'model\.layers\.1\.self_attn\.q_proj': .*NaN or inf"):
        run_joint(model, grouped_plan(model), options=JointConfig(fisher=False))
    assert type(model.model.layers[1].self_attn.k_proj) is nn.Linear
