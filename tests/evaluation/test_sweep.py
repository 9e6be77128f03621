# SPDX-License-Identifier: Apache-2.0
"""Measured budgets are what their checkpoints measure, loaded again; what cannot be measured is refused before weights."""

from __future__ import annotations

import dataclasses
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lord_quant.budget_config import BudgetConfig
from lord_quant.budgets.budget import Planner
from lord_quant.budgets.menu import Menu
from lord_quant.budgets.plan_file import apply_plan
from lord_quant.config import CalibrationConfig, JointConfig, LordConfig, LowrankConfig
from lord_quant.corpus import Corpus, load_corpus
from lord_quant.errors import BudgetError, EvaluationError
from lord_quant.evaluation.perplexity import corpus_perplexity
from lord_quant.evaluation.sweep import sweep, sweep_table
from lord_quant.losses.sensing import sense
from lord_quant.runs.execution import execute
from lord_quant.runs.pipeline import prepare


BUDGETS = [2.4, 4.0]


@pytest.fixture(scope="module")
def config(model_folder: Callable[..., Path], corpus_file: Path) -> LordConfig:
    return LordConfig(
        model=str(model_folder("compressible")),
        lowrank=LowrankConfig(rank_ratio=1),
        calibration=CalibrationConfig(dataset=str(corpus_file), num_samples=4, seq_len=64),
        joint=JointConfig(fisher_samples=2, refine=1),
    )


@pytest.fixture(scope="module")
def planner(config: LordConfig) -> Planner:
    return Planner(config, sense(config), Menu())


@pytest.fixture(scope="module")
def heldout() -> Corpus:
    return load_corpus(str(Path(sysconfig.get_paths()["stdlib"]) / "calendar.py"))


@pytest.mark.slow
def test_points_are_what_checkpoints_measure(planner: Planner, config: LordConfig, heldout: Corpus, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = sweep(planner, config, BUDGETS, heldout, window=64, max_windows=6)
    tokenizer = AutoTokenizer.from_pretrained(config.model)

    def measure(folder: str | Path) -> float:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return corpus_perplexity(model, tokenizer, heldout, window=64, max_windows=6, batch_size=4).perplexity

    dense = measure(config.model)
    assert found.dense.perplexity == pytest.approx(dense, rel=1e-9) and found.in_nats
    assert (found.dense.num_windows, found.dense.source) == (6, "calendar.py")
    for budget, point in zip(BUDGETS, found.points, strict=True):
        allocation = planner.choose(BudgetConfig(target_bpw=budget))
        run = dataclasses.replace(config, output=str(tmp_path / str(budget)))
        execute(prepare(apply_plan(run, planner.settings(allocation))), verify=False)
        expected = measure(tmp_path / str(budget))
        assert point.perplexity == pytest.approx(expected, rel=1e-6)
        assert point.measured_loss == pytest.approx(math.log(expected / dense), rel=1e-4, abs=1e-7)
        assert (point.budget, point.predicted_loss) == (budget, allocation.loss)
        assert point.bpw == pytest.approx(planner.bpw(allocation))
    # Of random weights a smaller model may do better by chance, so what is measured has no order; what is predicted has.
    assert found.points[0].predicted_loss > 2 * found.points[1].predicted_loss > 0
    last = sweep_table(found).splitlines()
    assert last[3].split()[0] == "4" and last[4].split() == ["dense", "-", "-", "-", f"{dense:.3f}"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": 257}, EvaluationError, "window is 257; wanted 2 to the model's context of 256 tokens"),
        ({"window": 1}, EvaluationError, "window is 1; wanted 2"),
        ({"max_windows": 0}, EvaluationError, "max_windows is 0; wanted at least 1"),
        ({"budgets": [3.0, 0.1]}, BudgetError, r"no plan is as small as 0\.1; what can be reached"),
        ({"budgets": [3.0, -1]}, BudgetError, "target_bpw is -1; wanted a positive number"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str, planner: Planner, config: LordConfig, heldout: Corpus
) -> None:
    with pytest.raises(error, match=message):
        sweep(planner, config, **({"budgets": BUDGETS, "heldout": heldout} | arguments))


def test_the_calibration_text_is_no_heldout_text(planner: Planner, config: LordConfig) -> None:
    with pytest.raises(EvaluationError, match=r"held-out text 'corpus\.jsonl' is the calibration text"):
        sweep(planner, config, BUDGETS, load_corpus(config.calibration.dataset))
