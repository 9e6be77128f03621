# SPDX-License-Identifier: Apache-2.0
"""What readers are fuzzed beside: a tiny model, and the real files that runs over it leave. Everything is made anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lord_quant.silence import import_hosts


WIDTH, VOCABULARY = 64, 97
TEXT = "".join(f"def f{number}(x):\n    return x + {number}\n\n\n" for number in range(400))


class Scene(NamedTuple):
    """Folders of a run.

    Attributes:
        root: Where everything lies.
        dense: A dense model, with a tokenizer.
        packed: What compressing it left.
        digest: What tells the dense model apart from others.
    """

    root: Path
    dense: Path
    packed: Path
    digest: str


def make_scene(root: Path) -> Scene:
    """Makes a model of one block, its statistics, a plan and two checkpoints by running the product on it."""
    import_hosts()
    from lord_quant.budget_config import BudgetConfig
    from lord_quant.budgets.budget import Planner
    from lord_quant.budgets.menu import Menu
    from lord_quant.budgets.plan_file import write_plan
    from lord_quant.config import LordConfig
    from lord_quant.losses.sensing import digest_of, sense
    from lord_quant.losses.statistics import save_statistics
    from lord_quant.runs.execution import execute
    from lord_quant.runs.pipeline import prepare

    dense, text = _save_dense(root / "dense"), root / "text.py"
    text.write_text(TEXT)
    settings = {
        "model": str(dense),
        "lowrank": {"rank_ratio": 0.5, "force_rank": True, "targets": ["attention"]},
        "calibration": {"dataset": str(text), "num_samples": 4, "seq_len": 32},
        "gptq": {"group_size": 32},
        "joint": {"refine": 1, "fisher_samples": 2},
    }
    execute(prepare(LordConfig.from_dict(settings | {"output": str(root / "packed")})))
    config = LordConfig.from_dict(settings | {"lowrank": {}, "gptq": {}, "budget": {"target_bpw": 4.5}})
    statistics = sense(config)
    save_statistics(statistics, root / "model.stats")
    planner = Planner(config, statistics, Menu())
    write_plan(planner.settings(planner.choose(BudgetConfig(target_bpw=4.5))), root / "plan.yaml")
    return Scene(root, dense, root / "packed", digest_of(str(dense)))


def _save_dense(folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=64,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    letters = sorted({*TEXT, *map(chr, range(32, 127))})
    vocabulary = {"<eos>": 0} | {letter: 1 + number for number, letter in enumerate(letters)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<eos>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
