# SPDX-License-Identifier: Apache-2.0
"""The joint stack in the metric of the loss, over whole models: each layer gets its own, and a trained model gains."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from model_runs import BATCHES, plan_of, run_joint
from models import VOCABULARY, random_tokens, tiny_model
from torch import nn

from lord_quant.calibration import TokenWindows, sample_windows
from lord_quant.config import CalibrationConfig, GptqConfig, JointConfig, LordConfig, LowrankConfig
from lord_quant.corpus import load_corpus
from lord_quant.plan import build_plan
from lord_quant.runs import joint
from lord_quant.runs.pipeline import compress_model
from lord_quant.sensitivity import Sensitivity
from lord_quant.targets import find_linears
from lord_quant.truncation import unit_metric


DEMO = Path(__file__).parents[2] / "eval" / "models" / "pycoder-starcoder-humaneval"


class OfSomeLayers(Sensitivity):
    """Leaves out all layers but some."""

    kept: tuple[str, ...] = ()

    def of_block(self, index: int, block: nn.Module, kind: str, names: Sequence[str], dtype: Any = torch.float32) -> Any:
        inside = [name for name in names if any(kept.endswith(f".{index}.{name}") for kept in self.kept)]
        return super().of_block(index, block, kind, inside, dtype)


def test_sensitivities_keep_their_precision_where_weights_have_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a sensitivity of a few tokens would be indefinite."""
    seen: list[torch.dtype] = []
    monkeypatch.setattr(
        joint, "unit_metric", lambda metric, tokens: (seen.append(metric.dtype), unit_metric(metric, tokens))[1]
    )
    model = tiny_model("llama", torch.bfloat16)
    sensitivity = Sensitivity.measure(model, BATCHES)
    done = run_joint(model, plan_of(model), sensitivity=sensitivity, dtype=torch.float32)
    assert len(seen) == len(done.records) and set(seen) == {torch.float32}


@pytest.mark.parametrize("family", ["bigcode", "codegen", "llama"])
def test_a_sensitivity_changes_its_own_layer_alone(family: str) -> None:
    dense = tiny_model(family)
    plan = plan_of(dense)
    names = tuple(layer.name for layer in plan.layers)
    runs = {}
    for label, kept in (("none", ()), ("last", names[-1:]), ("all", names)):
        model = copy.deepcopy(dense)
        sensitivity = OfSomeLayers.measure(model, BATCHES)
        sensitivity.kept = kept
        runs[label] = run_joint(model, plan, sensitivity=sensitivity), model.state_dict()
    for label, changed in (("last", set(names[-1:])), ("all", set(names))):
        (records, state), (plain_records, plain) = runs[label], runs["none"]
        moved = {name.rsplit(".", 2)[0] for name in state if not torch.equal(state[name], plain[name])}
        assert moved == changed
        pairs = zip(records.records, plain_records.records, strict=True)
        assert {new.name for new, old in pairs if new.rel_stacked_error != old.rel_stacked_error} == changed
    untouched = copy.deepcopy(dense)
    run_joint(untouched, plan)
    assert all(torch.equal(value, runs["none"][1][name]) for name, value in untouched.state_dict().items())


def test_a_run_takes_the_first_windows_and_its_seed() -> None:
    """`fisher_samples` windows of the calibration, the calibration's seed: what is done by hand gives the same weights."""
    dense = tiny_model("llama", torch.float32)
    tokens = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(2))
    windows = TokenWindows(tokens, "random", "")
    config = LordConfig(
        model="m",
        lowrank=LowrankConfig(rank_ratio=0.5, force_rank=True),
        gptq=GptqConfig(bits=16, group_size=32),
        calibration=CalibrationConfig(seed=5, batch_size=2),
        joint=JointConfig(fisher_samples=3),
    )
    plan = build_plan(find_linears(dense), config.lowrank, config.gptq, itemsize=4, other_bytes=0)
    ours = copy.deepcopy(dense)
    assert "sensitivity" in compress_model(ours, plan, windows, config).seconds
    by_hand = copy.deepcopy(dense)
    sensitivity = Sensitivity.measure(by_hand, [tokens[:3]], seed=5)
    run_joint(by_hand, plan, sensitivity=sensitivity, batches=tokens.split(2), seed=5, dtype=torch.float32)
    for (name, found), expected in zip(ours.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize(
    ("changes", "joint"), [({}, {"fisher": False}), ({"rank_ratio": 1, "force_rank": False}, {})], ids=["off", "dense"]
)
def test_without_it_nothing_goes_back(changes: dict[str, Any], joint: dict[str, Any]) -> None:
    """Switched off, or with nothing to truncate: no backward pass, and the weights of a run that has no sensitivity."""
    dense = tiny_model("llama", torch.float32)
    windows = TokenWindows(random_tokens(), "random", "")
    config = LordConfig(
        model="m",
        lowrank=LowrankConfig(**({"rank_ratio": 0.5, "force_rank": True} | changes)),
        gptq=GptqConfig(bits=16, group_size=32),
        joint=JointConfig(**joint),
    )
    plan = build_plan(find_linears(dense), config.lowrank, config.gptq, itemsize=4, other_bytes=0)
    ours, by_hand = copy.deepcopy(dense), copy.deepcopy(dense)
    assert "sensitivity" not in compress_model(ours, plan, windows, config).seconds
    run_joint(by_hand, plan, batches=windows.batches(4), dtype=torch.float32)
    for (name, found), expected in zip(ours.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.slow
@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not in this checkout")
def test_a_trained_model_loses_less() -> None:
    """Excess of the held-out loss over the dense model's, half the rank everywhere, in float."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    dense = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    sample = {split: load_corpus("python-stdlib", split=split) for split in ("calibration", "heldout")}
    tokens = {
        split: sample_windows(corpus, tokenizer, num_samples=24, seq_len=256, seed=0).input_ids
        for split, corpus in sample.items()
    }
    plan = plan_of(dense)
    batches = list(tokens["calibration"].split(8))
    sensitivity = Sensitivity.measure(dense, batches[:1])

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(model(input_ids=tokens["heldout"], labels=tokens["heldout"]).loss)

    lost = {}
    for label, used in (("output error", None), ("loss", sensitivity)):
        model = copy.deepcopy(dense)
        run_joint(model, plan, sensitivity=used, batches=batches, dtype=torch.float32)
        lost[label] = loss(model) - loss(dense)
    assert lost["output error"] > 0
    assert lost["loss"] < 0.8 * lost["output error"]
