# SPDX-License-Identifier: Apache-2.0
"""Peak memory is the process's own: a larger model takes at least its additional weights more, a parent's do not count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lord_quant.errors import ElsewhereError
from lord_quant.evaluation.memory import peak_process_memory, peak_resident_bytes


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
    with pytest.raises(ElsewhereError, match=r"peak memory of .*missing"):
        peak_process_memory(str(tmp_path / "missing"))


def test_what_a_parent_once_held_does_not_count() -> None:
    held = bytearray(b"x") * (256 * 2**20)
    before = peak_resident_bytes()
    assert before > len(held)
    del held
    assert peak_resident_bytes() >= before - 2**20  # a peak stays, up to what the kernel has not added up yet
    code = "from lord_quant.evaluation.memory import peak_resident_bytes; print(peak_resident_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 * 2**20 < int(done.stdout) < 256 * 2**20
