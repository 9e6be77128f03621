# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of a model beside its baseline."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lord_quant.errors import EvaluationError
from lord_quant.evaluation.speed import _weight_bytes, measure_speed


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


def test_memory_is_the_models_own() -> None:
    small, large = tiny(), GPT2LMHeadModel(GPT2Config(vocab_size=53, n_positions=64, n_embd=64, n_layer=2, n_head=2))
    speed = measure_speed(small, large, prompt_tokens=4, new_tokens=2, repeats=1)
    alone = measure_speed(small, prompt_tokens=4, new_tokens=2, repeats=1)
    assert speed.baseline is not None
    assert speed.model.weight_bytes == alone.model.weight_bytes
    # `parameters` gives the tied embeddings once.
    assert speed.baseline.weight_bytes == sum(p.nbytes for p in [*large.parameters(), *large.buffers()])
    assert speed.model.working_bytes is None, "the processor's allocator does not tell"


def test_weights_are_all_that_modules_keep_and_each_once() -> None:
    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = torch.nn.Parameter(torch.zeros(10))  # 40 bytes
            self.register_buffer("qweight", torch.zeros(100, dtype=torch.int32))  # 400
            self.register_buffer("unsaved", torch.zeros(3, dtype=torch.int8), persistent=False)  # 3
            self.view = self.qweight[:50]
            self.cache = {torch.float32: torch.zeros(1000), "list": [torch.zeros(1), None]}  # 4004
            self.cache["itself"] = self.cache

    first, second = Packed(), Packed()
    second.qweight = first.qweight
    model = torch.nn.Sequential(first, second, first)
    assert _weight_bytes(model) == 2 * (40 + 400 + 3 + 4004) - 400 + 400  # the second's view keeps the old storage


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_working_memory_leaves_out_the_other_model() -> None:
    config = GPT2Config(vocab_size=53, n_positions=64, n_embd=1024, n_layer=2, n_head=2)
    large, small = GPT2LMHeadModel(config).cuda(), tiny().cuda()
    speed = measure_speed(small, large, prompt_tokens=8, new_tokens=2, repeats=1)
    assert speed.model.working_bytes is not None
    assert 0 < speed.model.working_bytes < 10 << 20 < _weight_bytes(large)
