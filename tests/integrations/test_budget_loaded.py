# SPDX-License-Identifier: Apache-2.0
"""A budget in `from_pretrained`: what the command line makes of it, and saved as what was chosen."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest

from lord_quant.budgets.budget import Planner
from lord_quant.budgets.menu import Menu
from lord_quant.budgets.plan_file import apply_plan
from lord_quant.config import JointConfig, LordConfig
from lord_quant.errors import BudgetError, ConfigError
from lord_quant.losses.sensing import sense, statistics_of
from lord_quant.losses.statistics import save_statistics
from lord_quant.runs.execution import execute
from lord_quant.runs.pipeline import prepare


BUDGET: dict[str, Any] = {"target_bpw": 2.4, "min_param_ratio": 0.3}


@pytest.fixture(scope="module")
def run(model_folder: Callable[..., Path], corpus_file: Path) -> LordConfig:
    return LordConfig.from_dict(
        {
            "model": str(model_folder("compressible")),
            "calibration": {"dataset": str(corpus_file), "num_samples": 4, "seq_len": 64},
            "joint": {"fisher_samples": 2, "refine": 1},
            "budget": BUDGET,
        }
    )


def load(run: LordConfig, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from lord_quant import LordGPTQConfig

    calibration = {"dataset": run.calibration.dataset, "num_samples": 4, "seq_len": 64, "fisher_samples": 2, "refine": 1}
    config = LordGPTQConfig(**(calibration | BUDGET | changes))
    return AutoModelForCausalLM.from_pretrained(run.model, quantization_config=config)


@pytest.mark.slow
def test_a_budget_gives_the_pipelines_tensors_and_is_saved_as_what_it_chose(run: LordConfig, tmp_path: Path) -> None:
    planner = Planner(run, statistics_of(run), Menu(min_param_ratio=0.3))
    chosen = apply_plan(run, planner.settings(planner.choose(run.budget)))
    execute(prepare(LordConfig.from_dict(chosen.to_dict() | {"output": str(tmp_path / "pipeline")})), verify=False)
    model = load(run)
    model.save_pretrained(tmp_path / "fly")
    assert families.different_tensors(tmp_path / "pipeline", tmp_path / "fly") == []
    one, other = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("pipeline", "fly")
    )
    assert one.items() <= other.items() and one["bits_pattern"] and one["rank_pattern"]
    assert not {"target_bpw", "min_param_ratio", "statistics", "dataset"} & set(other)
    reloaded, _ = families.load_fresh(tmp_path / "results.pt", tmp_path / "fly")
    families.require_equal(reloaded[str(tmp_path / "fly")], families.probe_logits(model))


@pytest.mark.slow
def test_statistics_in_a_file_are_used_and_other_calibration_is_told(
    run: LordConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_statistics(sense(run), tmp_path / "model.stats")
    with caplog.at_level(logging.WARNING, "lord_quant"):
        same = load(run, statistics=str(tmp_path / "model.stats"))
    assert "other calibration tokens" not in caplog.text
    with caplog.at_level(logging.WARNING, "lord_quant"):
        other = load(run, statistics=str(tmp_path / "model.stats"), seed=1)
    assert "other calibration tokens" in caplog.text
    assert same.config.quantization_config.rank_pattern == other.config.quantization_config.rank_pattern


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target_size": "4MB"}, BudgetError, "2 budgets are given"),
        ({"rank_ratio": 0.5}, ConfigError, "a budget and rank_ratio are given"),
        ({"bits": 3, "group_size": 64}, ConfigError, "a budget and bits, group_size are given; wanted one or the other"),
        ({"bits_pattern": {"mlp": 3}}, ConfigError, "a budget and bits_pattern are given"),
        ({"target_bpw": None}, BudgetError, "0 budgets are given"),
        ({"target_bpw": 0.1}, BudgetError, "no plan is as small as 0.1; what can be reached is"),
    ],
)
def test_what_is_wrong_with_a_budget_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str, run: LordConfig
) -> None:
    with pytest.raises(error, match=message):
        load(run, **changes)


def test_a_revision_has_its_own_statistics_and_tokenizer(
    run: LordConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from transformers import AutoModelForCausalLM

    from lord_quant import LordGPTQConfig

    cached = tmp_path / "models--acme--m"
    (cached / "refs").mkdir(parents=True)
    for name, letter, seed in (("main", "a", 0), ("v1", "b", 5)):
        families.save(families.build("llama", seed=seed), cached / "snapshots" / (letter * 40))
        (cached / "refs" / name).write_text(letter * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    shared = {"dataset": run.calibration.dataset, "num_samples": 4, "seq_len": 64}
    of_main = dataclasses.replace(run, model="acme/m", budget=None, joint=JointConfig(fisher=False, refine=0))
    save_statistics(sense(of_main), tmp_path / "main.stats")

    def load_revision(revision: str, **settings: Any) -> Any:
        config = LordGPTQConfig(**shared, **settings)
        return AutoModelForCausalLM.from_pretrained("acme/m", revision=revision, quantization_config=config)

    budget = {"target_bpw": 4.0, "statistics": str(tmp_path / "main.stats"), "fisher": False, "refine": 0}
    assert load_revision("main", **budget).config.quantization_config.bits in (2, 3, 4, 8)
    with pytest.raises(BudgetError, match="the statistics were made for another model than 'acme/m'"):
        load_revision("v1", **budget)
    (cached / "refs" / "main").unlink()  # as if never fetched
    assert load_revision("v1", bits=8, rank_ratio=1, group_size=32).config.quantization_config.bits == 8
