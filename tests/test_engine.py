# SPDX-License-Identifier: Apache-2.0
"""The naive stack's engine over tiny models: the moments it collects, what it replaces, and what it refuses."""

import copy
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from model_runs import (
    BATCHES,
    BOOM_PLACES,
    POISONED,
    TOKENS,
    logits,
    plan_of,
    poison,
    require_hooks_to_survive,
    whole_model_inputs,
)
from models import tiny_model
from torch import nn

from lord_quant import engine
from lord_quant.decompose import Factors, OutputSpectrum, decompose
from lord_quant.engine import DecompositionRecord, decompose_model
from lord_quant.errors import CalibrationError, NumericsError
from lord_quant.modules import LowRankLinear
from lord_quant.moments import MomentAccumulator, Moments
from lord_quant.plan import Plan
from lord_quant.targets import find_linears


FAMILIES = ["gpt2", "bigcode", "codegen", "llama", "qwen2", "gemma2", "gemma3"]
SLIDING = ["qwen2", "gemma2", "gemma3"]


def full_rank_plan(model: nn.Module) -> Plan:
    ranks = {site.name: min(site.in_features, site.out_features) for site in find_linears(model)}
    return plan_of(model, rank_ratio=None, rank_pattern=ranks)


@pytest.fixture
def seen_moments(monkeypatch: pytest.MonkeyPatch) -> list[Moments]:
    """The moments the engine decomposes with, in the order of its records."""
    kept: list[Moments] = []

    def spy(*args: Any, **kwargs: Any) -> tuple[Factors, OutputSpectrum]:
        kept.append(args[2])
        return decompose(*args, **kwargs)

    monkeypatch.setattr(engine, "decompose", spy)
    return kept


def compare(records: list[DecompositionRecord], moments: list[Moments], inputs: dict[str, np.ndarray]) -> float:
    """Returns the worst relative deviation of the moments from those of `inputs`."""
    worst = 0.0
    for record, (mean, covariance, _) in zip(records, moments, strict=True):
        rows = inputs[record.name]
        assert record.num_tokens == len(rows) == TOKENS.numel()
        expected = np.cov(rows, rowvar=False, bias=True)
        worst = max(worst, np.abs(covariance.numpy() - expected).max() / np.abs(expected).max())
        worst = max(worst, np.abs(mean.numpy() - rows.mean(0)).max() / np.abs(rows).max())
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_a_whole_model_forward(family: str, seen_moments: list[Moments]) -> None:
    model = tiny_model(family)
    plan = plan_of(model)
    names = [site.name for site in find_linears(model)]
    inputs = whole_model_inputs(copy.deepcopy(model), names)
    records = decompose_model(model, plan, BATCHES, dtype=torch.float64)
    assert [record.name for record in records] == names
    assert compare(records, seen_moments, inputs) < 1e-11


@pytest.mark.parametrize("family", SLIDING)
def test_the_test_above_notices_a_wrong_mask(
    family: str, seen_moments: list[Moments], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    inputs = whole_model_inputs(copy.deepcopy(model), [site.name for site in find_linears(model)])
    monkeypatch.setattr(engine, "block_kinds", lambda model, count: ["block"] * count)
    records = decompose_model(model, plan_of(model), BATCHES, dtype=torch.float64)
    assert compare(records, seen_moments, inputs) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_leaves_the_logits_alone(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    records = decompose_model(model, full_rank_plan(model), BATCHES, dtype=torch.float64)
    assert len(records) == len(find_linears(tiny_model(family)))
    assert all(record.rel_output_error == 0 for record in records)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_records_hold_the_error_that_the_layer_really_makes(family: str) -> None:
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    records = decompose_model(model, plan_of(model), BATCHES, dtype=torch.float64)
    inputs = whole_model_inputs(dense, [record.name for record in records])
    for record in records:
        x = torch.from_numpy(inputs[record.name])
        layer = model.get_submodule(record.name)
        assert type(layer) is LowRankLinear and layer.down.out_features == record.rank
        with torch.no_grad():
            wanted, found = dense.get_submodule(record.name)(x), layer(x)
        share = float(((wanted - found) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum())
        assert record.rel_output_error == pytest.approx(share, abs=1e-9)
        assert record.seconds >= 0 and record.remedies == () and record.effective_rank > 0
        torch.testing.assert_close(found.mean(0), wanted.mean(0), rtol=0, atol=1e-9)


def test_batching_changes_nothing_but_rounding() -> None:
    results = []
    for batches in ([TOKENS], list(TOKENS.split(1)), BATCHES):
        model = tiny_model("llama")
        decompose_model(model, plan_of(model), batches, dtype=torch.float64)
        results.append(logits(model))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-8)


def test_only_planned_layers_change_and_everything_else_is_the_same_tensor() -> None:
    model = tiny_model("gpt2")
    before = dict(model.named_parameters())
    plan = plan_of(model, rank_ratio=None, rank_pattern={"re:h.1.*c_fc": 32})
    decompose_model(model, plan, BATCHES)
    after = dict(model.named_parameters())
    changed = {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}
    assert changed == {
        f"transformer.h.1.mlp.c_fc.{leaf}" for leaf in ("weight", "bias", "down.weight", "up.weight", "up.bias")
    }


def test_a_plan_without_ranks_does_not_run_the_model() -> None:
    model = tiny_model("gpt2")
    model.forward = None
    assert decompose_model(model, plan_of(tiny_model("gpt2"), rank_ratio=1), BATCHES) == []


@pytest.mark.parametrize(("family", "per_block"), [("llama", 4), ("gpt2", 4), ("codegen", 3)])
def test_layers_fed_the_same_tensor_share_one_accumulator(
    family: str, per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # llama: q/k/v, o, gate/up, down. gpt2: four. codegen is parallel: qkv and fc_in share the normed input.
    made = []

    class Counted(MomentAccumulator):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(engine, "MomentAccumulator", Counted)
    model = tiny_model(family)
    decompose_model(model, plan_of(model), BATCHES)
    assert len(made) == 2 * per_block
    assert {accumulator.num_tokens for accumulator in made} == {TOKENS.numel()}


def test_inputs_of_earlier_batches_are_not_kept() -> None:
    model = tiny_model("llama")
    seen: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(args[0]))

    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(watch)
    decompose_model(model, plan_of(model), list(TOKENS.split(1)))
    assert alive == [0] * len(TOKENS)


@pytest.mark.parametrize("failure", [None, *BOOM_PLACES])
def test_hooks_of_others_survive_and_ours_are_gone_whatever_happens(failure: str | None) -> None:
    model = tiny_model("llama")
    plan = plan_of(model, targets=("o_proj", "up_proj"))
    require_hooks_to_survive(model, failure, lambda: decompose_model(model, plan, BATCHES))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("path", "layer"), POISONED)
def test_activations_that_are_not_finite_name_the_layer(path: str, layer: str, value: float) -> None:
    model = tiny_model("llama")
    poison(model, path, value)
    with pytest.raises(NumericsError, match=f"'{layer}'.*NaN or inf"):
        decompose_model(model, plan_of(model), BATCHES)
    assert type(model.get_submodule(layer)) is nn.Linear


def test_weights_that_are_not_finite_name_the_layer() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"'transformer\.h\.1\.mlp\.c_proj': weight: 1 of"):
        decompose_model(model, plan_of(model), BATCHES)


@pytest.mark.parametrize("reached", ["never", "with no token"])
def test_a_layer_that_no_token_reaches_is_named(reached: str) -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: x if reached == "never" else x + 0 * mlp.down_proj(mlp.up_proj(x[:0])).sum()
    plan = plan_of(model, targets=("up_proj", "down_proj"))
    with pytest.raises(CalibrationError, match=r"no calibration token reached model\.layers\.1\.mlp\.up_proj"):
        decompose_model(model, plan, BATCHES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_statistics_are_float32_and_layers_keep_their_dtype(dtype: torch.dtype, seen_moments: list[Moments]) -> None:
    model = tiny_model("llama", dtype)
    decompose_model(model, plan_of(model), BATCHES)
    assert {moments.covariance.dtype for moments in seen_moments} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.isfinite(logits(model)).all()


def test_the_dense_models_statistics_are_used_for_every_block(seen_moments: list[Moments]) -> None:
    """Decomposing block 0 changes what block 1 sees; the naive stack must not notice."""
    model = tiny_model("llama")
    decompose_model(model, plan_of(model), BATCHES, dtype=torch.float64)
    both = seen_moments[7:]
    del seen_moments[:]
    model = tiny_model("llama")
    plan = plan_of(model, targets=("re:layers.1",))
    decompose_model(model, plan, BATCHES, dtype=torch.float64)
    assert len(both) == len(seen_moments) == 7
    for left, right in zip(both, seen_moments, strict=True):
        torch.testing.assert_close(left.covariance, right.covariance, rtol=0, atol=1e-12)


def test_a_run_is_reproducible() -> None:
    models = [tiny_model("gpt2", torch.float32) for _ in range(2)]
    for model in models:
        decompose_model(model, plan_of(model), BATCHES)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_mean_correction_off_leaves_biases_as_they_were(family: str) -> None:
    model = tiny_model(family)
    biases = {name: tensor.clone() for name, tensor in model.named_parameters() if name.endswith("bias")}
    plan = plan_of(model, mean_correction=False)
    for record in decompose_model(model, plan, BATCHES, dtype=torch.float64):
        bias = model.get_submodule(record.name).up.bias
        dense = biases.get(f"{record.name}.bias")
        assert (bias is None) == (dense is None)
        assert bias is None or torch.equal(bias, dense)
