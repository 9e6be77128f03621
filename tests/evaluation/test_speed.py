# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lord_quant.errors import EvaluationError
from lord_quant.evaluation.speed import measure_speed


def tiny() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=53, n_positions=64, n_embd=32, n_layer=1, n_head=2))


def test_a_slower_model_reads_slower_and_turns_alternate() -> None:
    fast, slow, turns = tiny(), tiny(), []
    fast.register_forward_pre_hook(lambda *_: turns.append("fast"))

    def delay(*_: object) -> None:
        turns.append("slow")
        time.sleep(0.02)

    slow.register_forward_pre_hook(delay)
    speed = measure_speed(slow, fast, prompt_tokens=8, new_tokens=4, repeats=3)
    assert speed.baseline is not None
    assert speed.prefill_ratio is not None and speed.prefill_ratio < 0.5
    assert speed.decode_ratio is not None and speed.decode_ratio < 0.5
    # Three new tokens after the first, each after 20 ms at least.
    assert speed.model.decode_tokens_per_second < 50
    assert speed.model.peak_memory_bytes > 1 << 20
    # A warm-up and three repeats, each of four forward passes, in turns.
    assert turns == (["slow"] * 4 + ["fast"] * 4) * 4


def test_decoding_uses_the_cache() -> None:
    model, lengths = tiny(), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    measure_speed(model, batch_size=2, prompt_tokens=8, new_tokens=3, repeats=1)
    assert lengths == [(2, 8), (2, 1), (2, 1)] * 2
    assert model.training, "the mode is put back"


def test_alone_there_is_no_ratio() -> None:
    speed = measure_speed(tiny(), prompt_tokens=4, new_tokens=2, repeats=1)
    assert (speed.baseline, speed.prefill_ratio, speed.decode_ratio) == (None, None, None)
    assert (speed.device, speed.threads) == ("cpu", torch.get_num_threads())


@pytest.mark.parametrize("settings", [{"new_tokens": 1}, {"repeats": 0}, {"batch_size": 0}, {"prompt_tokens": 0}])
def test_illegal_counts(settings: dict[str, int]) -> None:
    with pytest.raises(EvaluationError):
        measure_speed(tiny(), **settings)
