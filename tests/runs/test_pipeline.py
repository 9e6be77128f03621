# SPDX-License-Identifier: Apache-2.0
"""What every entrance refuses before work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from models import tiny_model

from lord_quant.calibration import as_windows
from lord_quant.config import LordConfig
from lord_quant.errors import CalibrationError, ModelError, NumericsError
from lord_quant.modules import LowRankLinear
from lord_quant.runs.pipeline import compress_model, plan_model, prepare


CONFIG = LordConfig.from_dict({"model": "tiny", "lowrank": {"rank_ratio": 0.5}, "gptq": {"bits": 16, "group_size": 32}})


def test_a_decomposed_model_is_not_decomposed_again() -> None:
    model = tiny_model("llama", torch.float32)
    plan_model(model, CONFIG, 4)
    model.model.layers[1].mlp.up_proj = LowRankLinear(64, 32, 128, bias=True)
    with pytest.raises(ModelError, match=r"already compressed \(layer 'model\.layers\.1\.mlp\.up_proj'\)"):
        plan_model(model, CONFIG, 4)


def test_nan_weights_are_named_before_the_first_forward_pass() -> None:
    model = tiny_model("llama", torch.float32)
    plan = plan_model(model, CONFIG, 4)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was run"))
    windows = as_windows(torch.zeros(1, 8, dtype=torch.int64), "test")
    with pytest.raises(NumericsError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight': 1 of"):
        compress_model(model, plan, windows, CONFIG)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_before_weights_are_read(
    tmp_path: Path, corpus_file: Path
) -> None:
    folder = families.save(families.build("llama", vocab_size=512), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    config: dict[str, Any] = {
        "model": str(folder),
        "lowrank": {"rank_ratio": 1},
        "calibration": {"dataset": str(corpus_file)},
    }
    config["calibration"] |= {"num_samples": 4, "seq_len": 64}
    with pytest.raises(CalibrationError, match=r"calibration windows hold token 40\d\d; the model knows 0 to 511"):
        prepare(LordConfig.from_dict(config))
