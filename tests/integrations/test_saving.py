# SPDX-License-Identifier: Apache-2.0
"""Loaded packed models save what they loaded, or nothing where a kernel has rewritten it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import different_tensors

from lord_quant import LordGPTQConfig
from lord_quant.config import LordConfig
from lord_quant.errors import CheckpointError
from lord_quant.runs.execution import execute
from lord_quant.runs.pipeline import prepare


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packed(model_folder: Callable[..., Path], corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("saving") / "packed"
    values: dict[str, Any] = {
        "model": str(model_folder("llama")),
        "output": str(output),
        "calibration": {"dataset": str(corpus_file), "num_samples": 4, "seq_len": 32},
        "lowrank": {"rank_ratio": 0.5, "targets": ["mlp"]},
        "gptq": {"bits": 4, "group_size": 32},
    }
    execute(prepare(LordConfig.from_dict(values)), verify=False)
    return output


def ran(folder: Path, **settings: Any) -> Any:
    """Returns a loaded model that has run once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    with torch.no_grad():
        model(input_ids=torch.arange(1, 9)[None])
    return model


def test_a_model_that_has_run_is_saved_as_it_was_loaded_or_not_at_all(packed: Path, tmp_path: Path) -> None:
    model = ran(packed)
    rewritten = [part for name, part in model.named_buffers() if name.endswith("qweight") and part.dtype != torch.int32]
    if not rewritten:
        pytest.skip("no kernel on this machine rewrites its weights")
    with pytest.raises(CheckpointError, match=rf"{len(rewritten)} packed layers, such as 'model\.layers\.0\..*gptq_torch"):
        model.save_pretrained(tmp_path / "rewritten")
    assert not list((tmp_path / "rewritten").iterdir())
    ran(packed, quantization_config=LordGPTQConfig(bits=4, backend="gptq_torch")).save_pretrained(tmp_path / "again")
    assert different_tensors(packed, tmp_path / "again") == []
