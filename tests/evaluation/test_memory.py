# SPDX-License-Identifier: Apache-2.0
"""Peak memory is the model's own: a larger model takes at least its additional weights more."""

from __future__ import annotations

from pathlib import Path

import pytest

from lord_quant.errors import EvaluationError
from lord_quant.evaluation.memory import peak_process_memory


def saved(folder: Path, vocabulary: int) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=vocabulary, n_embd=64, n_layer=1, n_head=2, n_positions=256, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_peak_grows_by_the_weights(tmp_path: Path) -> None:
    small = peak_process_memory(saved(tmp_path / "small", 1000), prompt_tokens=2, new_tokens=2)
    large = peak_process_memory(saved(tmp_path / "large", 1_001_000), prompt_tokens=2, new_tokens=2)
    weights = 1_000_000 * 64 * 4
    assert 0.9 * weights < large - small < 3 * weights


@pytest.mark.slow
def test_a_failing_process_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"peak memory of .*missing"):
        peak_process_memory(str(tmp_path / "missing"))
