# SPDX-License-Identifier: Apache-2.0
"""The joint run over tiny models: what its two streams see, and what it leaves in the model."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from model_runs import BATCHES, IDEAS, TOKENS, logits, plan_of, rounding, run_joint, whole_model_inputs
from models import tiny_model
from torch import nn

from lord_quant import outcomes
from lord_quant.blocks import pairing
from lord_quant.blocks.stream import block_kinds
from lord_quant.config import JointConfig
from lord_quant.engine import decompose_model
from lord_quant.modules import ColumnPivotedLinear, LowRankLinear, PivotedLinear
from lord_quant.moments import PairedAccumulator, PairedMoments
from lord_quant.plan import LayerPlan, Plan
from lord_quant.runs import joint
from lord_quant.runs.joint import stack_model
from lord_quant.stack import Stacked, stack_layer
from lord_quant.targets import dense_weight, find_blocks, find_linears


FAMILIES = ["gpt2", "bigcode", "codegen", "llama", "qwen2", "gemma2"]
SLIDING = ["qwen2", "gemma2"]
EAGER_ONLY = ["codegen", "gemma2"]
FORMS = {"two_factor": LowRankLinear, "pivoted": PivotedLinear, "column_pivoted": ColumnPivotedLinear}
NORMS = {"gpt2": "ln_2", "bigcode": "ln_2", "llama": "post_attention_layernorm", "qwen2": "post_attention_layernorm"}
"""What reads the residual stream between attention and MLP."""
ATTENTION, MLP = ("attn.c_proj", "out_proj", "o_proj"), ("mlp.c_proj", "fc_out", "down_proj")
"""How names of the layers end that write to the residual stream."""


def with_ranks(plan: Plan, rank_of: Any, form: str = "two_factor") -> Plan:
    """The same plan with ranks that no configuration would give."""
    layers = [dataclasses.replace(layer, rank=rank_of(layer), form=form) for layer in plan.layers]
    return dataclasses.replace(plan, layers=tuple(layers))


@pytest.fixture
def seen_moments(monkeypatch: pytest.MonkeyPatch) -> list[PairedMoments]:
    """The moments layers are compressed with, in the order of the records."""
    kept: list[PairedMoments] = []

    def spy(*args: Any, **kwargs: Any) -> Stacked:
        kept.append(args[2])
        return stack_layer(*args, **kwargs)

    monkeypatch.setattr(outcomes, "stack_layer", spy)
    return kept


def streams(family: str, model: nn.Module, names: list[str]) -> dict[str, np.ndarray]:
    """The residual stream in front of the layers that write to it, by plain hooks while the whole model runs."""
    if family == "gemma2":  # norms behind attention and MLP: what layers return is not what is added
        return {}
    blocks = {name: name.rpartition(".")[0].rpartition(".")[0] for name in names if name.endswith(ATTENTION + MLP)}
    reads = {
        name: f"{block}.{NORMS[family]}" if name.endswith(MLP) and family in NORMS else block
        for name, block in blocks.items()
    }
    seen = whole_model_inputs(model, sorted(set(reads.values())))
    found = {name: seen[module] for name, module in reads.items()}
    if family == "codegen":  # attention and MLP side by side
        for name in (name for name in blocks if name.endswith(MLP)):
            attention = f"{blocks[name]}.attn.out_proj"
            x = torch.from_numpy(whole_model_inputs(model, [attention])[attention])
            with torch.no_grad():
                found[name] = found[name] + model.get_submodule(attention)(x).numpy()
    return found


def deviation(
    moments: PairedMoments, dense: np.ndarray, ours: np.ndarray, weight: torch.Tensor, owed: np.ndarray | float = 0.0
) -> float:
    """The worst relative deviation of moments from those of given inputs of a layer with this weight.

    Owed is what the residual stream lacks in front of a layer that writes to it.
    """
    dense = dense @ weight.numpy().T + owed if moments.of_outputs else dense
    x, y = dense - dense.mean(0), ours - ours.mean(0)
    expected = dense.mean(0), ours.mean(0), y.T @ y / len(y), x.T @ y / len(x)
    assert moments.num_tokens == len(dense) == len(ours) == TOKENS.numel()
    return max(
        float(np.abs(found.numpy() - wanted).max() / np.abs(wanted).max())
        for found, wanted in zip(moments[:4], expected, strict=True)
    )


@pytest.mark.parametrize("solve", [None, rounding], ids=["float", "rounded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_sees_the_dense_model_and_the_model_as_it_will_be(
    family: str, solve: Any, seen_moments: list[PairedMoments]
) -> None:
    """When a layer is compressed, all before it is final: what it saw then is what it sees in the finished model."""
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    names = [site.name for site in find_linears(model)]
    done = run_joint(model, plan_of(model), solve)
    records = [record.name for record in done.records]
    assert sorted(records) == sorted(names)
    before, after = whole_model_inputs(dense, names), whole_model_inputs(model, names)
    theirs, ours = streams(family, dense, names), streams(family, model, names)
    for name, moments in zip(records, seen_moments, strict=True):
        owed = theirs[name] - ours[name] if name in theirs else 0.0
        assert deviation(moments, before[name], after[name], dense_weight(dense.get_submodule(name)), owed) < 1e-9, name
    thin = {name for name, moments in zip(records, seen_moments, strict=True) if moments.of_outputs}
    assert thin == {name for name in names if name.endswith(MLP if family == "gemma2" else ATTENTION + MLP)}
    drifted = [name for name in names if not np.allclose(before[name], after[name], rtol=1e-3)]
    assert len(drifted) > len(names) / 2  # the test above can tell the streams apart


@pytest.mark.parametrize("family", SLIDING)
def test_the_test_above_notices_a_wrong_mask(
    family: str, seen_moments: list[PairedMoments], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    names = [site.name for site in find_linears(model)]
    before = whole_model_inputs(dense, names)
    monkeypatch.setattr(joint, "block_kinds", lambda model, count: ["block"] * count)
    done = run_joint(model, plan_of(model))
    after = whole_model_inputs(model, names)
    pairs = zip(done.records, seen_moments, strict=True)
    weights = {name: dense_weight(dense.get_submodule(name)) for name in names}
    worst = max(deviation(seen, before[done.name], after[done.name], weights[done.name]) for done, seen in pairs)
    assert worst > 1e-4


@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "codegen", "qwen2"])
def test_the_first_block_is_decomposed_like_the_engine_does(family: str, anchor: bool) -> None:
    """There both streams are the dense model's, unless a layer of the block was compressed already."""
    theirs, together, in_turn = (tiny_model(family) for _ in range(3))
    plan = plan_of(theirs)
    decompose_model(theirs, plan, BATCHES, dtype=torch.float64)
    options = JointConfig(anchor=anchor)
    run_joint(together, plan, options=options, true_sequential=False)
    records = run_joint(in_turn, plan, options=options).records
    first = [layer.name for layer in plan.layers if layer.block == 0]
    x = {layer.name: torch.randn(3, layer.in_features, dtype=torch.float64) for layer in plan.layers}

    def same(model: nn.Module, name: str) -> bool:
        wanted, found = (each.get_submodule(name)(x[name]) for each in (theirs, model))
        return torch.allclose(wanted, found, rtol=0, atol=1e-9 * float(wanted.abs().max()))

    with torch.no_grad():
        assert all(same(together, name) for name in first)
        assert same(in_turn, records[0].name) and not all(same(in_turn, name) for name in first)
        others = [layer.name for layer in plan.layers if layer.block == 1]
        assert not all(same(together, name) for name in others)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_dense_stream_does_not_notice_compression(family: str, seen_moments: list[PairedMoments]) -> None:
    """Whatever is done to block 0, in sequence or at once, rounded or not, the dense inputs of block 1 are the same."""
    means = []
    for solve, sequential in ((None, True), (rounding, True), (rounding, False)):
        del seen_moments[:]
        model = tiny_model(family)
        # Without the residual stream, which on the dense side stands less what the compressed one has.
        options = dataclasses.replace(IDEAS, residual=False)
        done = run_joint(model, plan_of(model), solve, options, true_sequential=sequential)
        means.append({record.name: m.dense_mean for record, m in zip(done.records, seen_moments, strict=True)})
    for other in means[1:]:
        assert all(torch.equal(other[name], means[0][name]) for name in means[0])


@pytest.mark.parametrize(("family", "per_block"), [("llama", 4), ("gpt2", 4), ("codegen", 3)])
@pytest.mark.parametrize("true_sequential", [True, False])
def test_layers_fed_the_same_tensor_share_one_accumulator(
    family: str, per_block: int, true_sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # llama: q/k/v, o, gate/up, down. gpt2: four. codegen is parallel: qkv and fc_in share the normed input.
    made = []

    class Counted(PairedAccumulator):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(pairing, "PairedAccumulator", Counted)
    model = tiny_model(family)
    run_joint(model, plan_of(model), true_sequential=true_sequential)
    assert len(made) == 2 * per_block
    assert {accumulator.ours.num_tokens for accumulator in made} == {TOKENS.numel()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_leaves_the_logits_alone(family: str, form: str) -> None:
    model = tiny_model(family)
    before = logits(model)

    def full(layer: Any) -> int | None:  # at as many pivots as outputs or inputs, a pivoted form is the layer itself
        outputs, inputs = layer.out_features, layer.in_features
        left = {"two_factor": True, "pivoted": outputs > inputs, "column_pivoted": inputs > outputs}
        return min(outputs, inputs) if left[form] else None

    plan = with_ranks(plan_of(model), full, form)
    done = run_joint(model, plan)
    assert len(done.records) == len(plan.rank_pattern) > 0 and done.quantized == {}
    assert all(record.rel_stacked_error < 1e-12 for record in done.records)
    assert {type(model.get_submodule(name)) for name in plan.rank_pattern} == {FORMS[form]}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["gpt2", "bigcode", "codegen", "llama", "qwen2"])
def test_pivoted_and_two_factor_are_the_same_model_with_fewer_weights(family: str, dtype: torch.dtype) -> None:
    found, count, ranks = {}, {}, {}
    for form, module in FORMS.items():
        model = tiny_model(family, dtype)
        narrow = ("k_proj", "v_proj") if family in ("llama", "qwen2") else ()  # of full rank, where forms differ
        plan = plan_of(model, form=form, ignore=narrow)
        run_joint(model, plan, dtype=dtype)
        layers = {name: model.get_submodule(name) for name in plan.rank_pattern}
        assert {type(layer) for layer in layers.values()} == {module}
        found[form], ranks[form] = logits(model), plan.rank_pattern
        count[form] = {name: layer.up.weight.numel() + layer.down.weight.numel() for name, layer in layers.items()}
    tolerance = (1e-8 if dtype == torch.float64 else 1e-4) * float(found["two_factor"].abs().max())
    for form in ("pivoted", "column_pivoted"):
        assert ranks[form] == ranks["two_factor"]
        assert {name: count["two_factor"][name] - fewer for name, fewer in count[form].items()} == {
            name: rank**2 for name, rank in ranks[form].items()
        }
        torch.testing.assert_close(found[form], found["two_factor"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_to_be_packed_is_what_the_layers_hold(family: str, form: str) -> None:
    model = tiny_model(family, torch.float32)
    plan = plan_of(model, bits=4, targets=("mlp",), form=form)
    done = run_joint(model, plan, rounding, dtype=torch.float32)
    expected = {layer.name + suffix: layer for layer in plan.layers for suffix in layer.factor_shapes()}
    assert done.quantized.keys() == expected.keys()
    for name, item in done.quantized.items():
        assert item.codes.dtype == torch.uint8  # they wait for the whole model
        part = name.removeprefix(expected[name].name)
        assert item.codes.shape == expected[name].factor_shapes()[part][::-1]
        assert torch.equal(dense_weight(model.get_submodule(name)), item.weight())
    assert [record.name for record in done.records if record.rank] == list(plan.rank_pattern)
    for record in done.records:
        assert 0 < record.rel_stacked_error < 0.5 and record.num_tokens == TOKENS.numel() and record.seconds > 0
        if record.rank is None:
            assert record.rel_output_error is record.effective_rank is record.largest_coefficient is None
        else:
            assert record.rel_output_error < record.rel_stacked_error and record.effective_rank > 0
            assert (record.largest_coefficient is not None) == (form != "two_factor")


def test_quantization_alone_keeps_every_layer_dense() -> None:
    model = tiny_model("gpt2")
    kinds = [type(module) for module in model.modules()]
    dense = copy.deepcopy(model)
    done = run_joint(model, plan_of(model, bits=4, rank_ratio=1), rounding)
    assert [type(module) for module in model.modules()] == kinds
    assert done.quantized.keys() == {site.name for site in find_linears(model)}
    assert all(torch.equal(dense_weight(model.get_submodule(n)), item.weight()) for n, item in done.quantized.items())
    plain = copy.deepcopy(dense)
    run_joint(plain, plan_of(dense, bits=4, rank_ratio=1), rounding, JointConfig(anchor=False, refine=0))
    wanted = logits(dense)
    assert (logits(model) - wanted).square().mean() < (logits(plain) - wanted).square().mean()


@pytest.mark.parametrize("family", ["codegen", "llama"])
def test_ideas_bring_the_model_nearer_to_the_dense_one(family: str) -> None:
    none = JointConfig(anchor=False, rotate=False, refit=False, order="down_first", deflate=False, refine=0)
    error = {}
    for label, options in (("none", none), ("all", IDEAS)):
        model = tiny_model(family)
        wanted = logits(model)
        run_joint(model, plan_of(model, rank_ratio=0.75), rounding, options)
        error[label] = float((logits(model) - wanted).square().mean())
    assert error["all"] < 0.9 * error["none"]


@pytest.mark.parametrize("family", ["gpt2", "codegen", "llama"])
@pytest.mark.parametrize("true_sequential", [True, False])
def test_replaying_finished_parts_changes_nothing(
    family: str, true_sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, calls = [], []
    for replay in (True, False):
        if not replay:
            monkeypatch.setattr(joint, "_finished", lambda layers, still_open: [])
        model = tiny_model(family)
        count = 0

        def counted(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal count
            count += 1

        attention = find_blocks(model).modules[0].get_submodule("attn" if family != "llama" else "self_attn")
        child = next(iter(attention.children()))  # below what is replayed, so that its calls are real ones
        child.register_forward_hook(counted)
        run_joint(model, plan_of(model, targets=(r"re:mlp|o_proj|out_proj|attn\.c_proj",)), true_sequential=true_sequential)
        states.append(model.state_dict())
        calls.append(count)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert calls[0] < calls[1] if true_sequential else calls[0] == calls[1]


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "eager") for family in FAMILIES), *((family, "sdpa") for family in FAMILIES if family not in EAGER_ONLY)],
)
def test_no_part_of_a_block_runs_twice(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention runs once per batch and stream: what goes on after a layer starts at that layer's kept input."""
    model, calls = tiny_model(family), 0
    model.set_attn_implementation(attention)
    name = "softmax" if attention == "eager" else "scaled_dot_product_attention"
    real = getattr(torch.nn.functional, name)

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(*args, **kwargs)

    plan = plan_of(model)
    monkeypatch.setattr(torch.nn.functional, name, counted)
    run_joint(model, plan)
    blocks = len(find_blocks(model).modules)
    # Once more where attention returns its probabilities too, to see that nothing minds if they are left out; and once
    # on the way to the first block of another kind, to see what that is called with.
    kinds = set(block_kinds(model, blocks))
    assert calls == blocks * (2 * len(BATCHES) + (attention == "eager")) + (len(kinds) - 1)


def test_batching_changes_nothing_but_rounding_and_one_token_is_enough() -> None:
    results = []
    for batches in ([TOKENS], list(TOKENS.split(1)), BATCHES):
        model = tiny_model("llama")
        run_joint(model, plan_of(model), batches=batches)
        results.append(logits(model))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "solve", "form"),
    [("bigcode", None, "pivoted"), ("bigcode", rounding, "two_factor"), ("qwen2", rounding, "pivoted")],
)
def test_batches_of_one_token(family: str, solve: Any, form: str) -> None:
    tokens = TOKENS[:1, :3].T.contiguous()
    for batches, count in ((list(tokens.split(1)), 3), ([tokens[:1]], 1)):
        model = tiny_model(family, torch.float32)
        done = run_joint(model, plan_of(model, form=form), solve, batches=batches, dtype=torch.float32)
        assert {record.num_tokens for record in done.records} == {count}
        assert torch.isfinite(logits(model)).all()


def test_a_run_is_reproducible_and_its_seed_turns_the_rotations() -> None:
    states = []
    for seed in (0, 0, 1):
        model = tiny_model("gpt2", torch.float32)
        run_joint(model, plan_of(model), rounding, seed=seed, dtype=torch.float32)
        states.append(model.state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.h.0.mlp.c_fc.down.weight"], other["transformer.h.0.mlp.c_fc.down.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_statistics_are_float32_and_layers_keep_their_dtype(dtype: torch.dtype, seen_moments: list[PairedMoments]) -> None:
    model = tiny_model("llama", dtype)
    stack_model(model, plan_of(model), BATCHES, lambda layer: rounding, IDEAS)
    assert {moments.cross.dtype for moments in seen_moments} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("block", [0, 1])
def test_only_planned_layers_change_and_everything_else_is_the_same_tensor(block: int) -> None:
    model = tiny_model("gpt2")
    before = dict(model.named_parameters())
    values = {name: tensor.detach().clone() for name, tensor in before.items()}
    run_joint(model, plan_of(model, rank_ratio=None, rank_pattern={f"re:h.{block}.*c_fc": 32}))
    after = dict(model.named_parameters())
    changed = {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}
    assert changed == {
        f"transformer.h.{block}.mlp.c_fc.{leaf}" for leaf in ("weight", "bias", "down.weight", "up.weight", "up.bias")
    }
    assert all(torch.equal(after[name], values[name]) for name in after.keys() & values.keys())


def test_every_layer_asks_for_its_own_solver() -> None:
    model = tiny_model("gpt2", torch.float32)
    plan = plan_of(model)
    asked: list[str] = []

    def solver_of(layer: LayerPlan) -> Any:
        asked.append(layer.name)
        bits = 2 + len(asked)
        return lambda weight, hessian: rounding(weight, hessian)._replace(bits=bits)

    done = stack_model(model, plan, BATCHES, solver_of, dataclasses.replace(IDEAS, refine=0))
    assert asked == [record.name for record in done.records] and sorted(asked) == sorted(
        layer.name for layer in plan.layers
    )
    for count, name in enumerate(asked, start=1):
        assert {done.quantized[f"{name}.{part}"].bits for part in ("down", "up")} == {2 + count}


def test_a_plan_without_ranks_does_not_run_the_model_in_float() -> None:
    model = tiny_model("gpt2")
    model.forward = None
    done = run_joint(model, plan_of(tiny_model("gpt2"), rank_ratio=1))
    assert done.records == [] and done.quantized == {}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("form", FORMS)
def test_mean_correction_off_adds_no_bias(family: str, form: str) -> None:
    model = tiny_model(family)
    had = {site.name: site.has_bias for site in find_linears(model)}
    for record in run_joint(model, plan_of(model, mean_correction=False, form=form)).records:
        layer = model.get_submodule(record.name)
        assert (layer.up.bias is not None) == had[record.name]
        assert (layer.down.bias is not None) == (had[record.name] and form == "pivoted")


@pytest.mark.parametrize(("family", "form"), [("gpt2", "two_factor"), ("llama", "pivoted")])
def test_the_mean_output_of_every_layer_is_the_dense_one(family: str, form: str) -> None:
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    done = run_joint(model, plan_of(model, form=form), rounding)
    biased = {site.name for site in find_linears(dense) if site.has_bias}
    names = [record.name for record in done.records if record.rank is not None or record.name in biased]
    assert len(names) >= 8
    before, after = whole_model_inputs(dense, names), whole_model_inputs(model, names)
    with torch.no_grad():
        for name in names:
            wanted = dense.get_submodule(name)(torch.from_numpy(before[name])).mean(0)
            found = model.get_submodule(name)(torch.from_numpy(after[name])).mean(0)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
