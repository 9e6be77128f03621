# SPDX-License-Identifier: Apache-2.0
"""Compresses a model that is loaded already, from plan to packed layers: the path of `from_pretrained`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from lord_quant.blocks.source import own_memory, refuse_unfit, refuse_unready
from lord_quant.budget_config import BudgetConfig
from lord_quant.budgets.budget import Planner, refuse_unreachable
from lord_quant.budgets.menu import Menu
from lord_quant.budgets.plan_file import apply_plan
from lord_quant.calibration import TokenWindows
from lord_quant.config import LordConfig
from lord_quant.errors import ModelError
from lord_quant.losses.sensing import digest_of, sense_model, unplanned
from lord_quant.losses.statistics import load_statistics
from lord_quant.runs.cautions import log_cautions
from lord_quant.runs.pipeline import DEFAULT_SEQ_LEN, Compressed, calibrate, compress_model, plan_model, vocabulary_of
from lord_quant.runs.weight_reads import refuse_weight_reads


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compress_loaded(model: PreTrainedModel, tokenizer: Any, config: LordConfig, commit: str | None = None) -> Compressed:
    """Plans, calibrates and compresses a loaded dense model in place.

    Args:
        model: The dense model.
        tokenizer: A tokenizer, a path to one, or None for the model's own.
        config: The run, perhaps with a budget; its `model` says where the model came from, and where the tokenizer is when
            none is given.
        commit: That of a hub model; None is the one its name stands for.

    Raises:
        LordError: Whatever is wrong with the model, the plan, the calibration or the budget.
    """
    from accelerate import init_empty_weights
    from transformers import AutoTokenizer

    refuse_unfit(config.model, _dense_config(model))
    refuse_unready(config.model, model)
    if config.stack == "joint" and model.get_output_embeddings() is None:  # the loss it minds is that of next tokens
        raise ModelError(
            f"model {config.model!r} was loaded as {type(model).__name__}, which predicts no tokens; wanted it as "
            "AutoModelForCausalLM loads it, or stack='naive'"
        )
    itemsize, measured_on = next(model.parameters()).element_size(), None
    plan = plan_model(model, config if config.budget is None else unplanned(config), itemsize)
    with init_empty_weights():
        refuse_weight_reads(type(model)(_dense_config(model)), plan)
    if tokenizer is None or isinstance(tokenizer, str):
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer or config.model, revision=None if tokenizer else commit)
        except Exception as error:  # tokenizer backends raise whatever they like
            raise ModelError(f"no tokenizer at {tokenizer or config.model!r}: {error}; pass tokenizer=…") from error
    context = getattr(model.config, "max_position_embeddings", None) or DEFAULT_SEQ_LEN
    windows = calibrate(config, tokenizer, context, vocabulary_of(model))
    if config.budget is not None:
        own_memory(model)
        config, measured_on = _choose(model, windows, config, config.budget, commit)
        plan = plan_model(model, config, itemsize)
    log_cautions(model, plan, windows, config.stack, measured_on)
    return compress_model(model, plan, windows, config)


def _choose(
    model: PreTrainedModel, windows: TokenWindows, config: LordConfig, budget: BudgetConfig, commit: str | None
) -> tuple[LordConfig, str]:
    """Returns the run that a run's budget chooses, and the digest of the tokens that this rests on."""
    digest_of(config.model, commit)  # or it is refused only after the sensitivity pass
    menu = Menu(mean_correction=config.lowrank.mean_correction, min_param_ratio=budget.min_param_ratio or 0)
    if budget.statistics:
        statistics = load_statistics(budget.statistics)
    else:
        refuse_unreachable(config, menu, [budget], model, commit)
        statistics = sense_model(model, windows, config, commit=commit)
    planner = Planner(config, statistics, menu, model, commit)
    chosen = apply_plan(config, planner.settings(planner.choose(budget)))
    return chosen, str(statistics.origin.get("calibration_sha256"))


def _dense_config(model: PreTrainedModel) -> Any:
    """Returns the model's configuration without the compression that is about to happen (transformers sets it early)."""
    config = copy.copy(model.config)
    config.quantization_config = None
    return config
