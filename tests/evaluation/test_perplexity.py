# SPDX-License-Identifier: Apache-2.0
"""Perplexity over windows of a token stream against an oracle."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from lord_quant.corpus import Corpus
from lord_quant.errors import EvaluationError, NumericsError
from lord_quant.evaluation.perplexity import corpus_perplexity, iter_windows, stream_perplexity


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=53, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5)
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def stream() -> torch.Tensor:
    return torch.randint(0, 53, (61,), generator=torch.Generator().manual_seed(1))


def oracle(model: Any, stream: torch.Tensor, window: int, stride: int) -> tuple[float, int]:
    """Token by token in plain Python: the first window that holds a token predicts it from that window's tokens."""
    total, count = 0.0, 0
    for position in range(1, len(stream)):
        start = next(s for s in range(0, len(stream), stride) if s + window > position)
        if start == position:
            continue
        with torch.no_grad():
            logits = model(stream[None, start:position]).logits[0, -1].tolist()
        top = max(logits)
        total += top + math.log(sum(math.exp(v - top) for v in logits)) - logits[int(stream[position])]
        count += 1
    return total, count


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 8), (16, 1), (7, 7), (7, 3), (2, 2), (2, 1), (13, 12)])
def test_equals_the_oracle(model: Any, stream: torch.Tensor, window: int, stride: int, batch_size: int) -> None:
    result = stream_perplexity(model, stream, window=window, stride=stride, batch_size=batch_size)
    total, count = oracle(model, stream, window, stride)
    assert result.num_tokens == count
    assert result.nll == pytest.approx(total, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-12)
    assert (result.window, result.stride, result.dtype) == (window, stride, "float64")


def test_weighs_tokens_not_windows(model: Any, stream: torch.Tensor) -> None:
    result = stream_perplexity(model, stream[:19], window=16)
    long, short = (stream_perplexity(model, part, window=16) for part in (stream[:16], stream[16:19]))
    assert (long.num_tokens, short.num_tokens) == (15, 2)
    assert result.nll == pytest.approx(long.nll + short.nll, rel=1e-12)
    mean_of_windows = math.exp((long.nll / 15 + short.nll / 2) / 2)
    assert abs(result.perplexity - mean_of_windows) > 1e-3 * mean_of_windows


@given(st.integers(0, 80), st.integers(2, 12), st.data())
def test_windows_count_each_token_once(num_tokens: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    windows = list(iter_windows(num_tokens, window, stride))
    counted = [t for w in windows for t in range(w.first_new, w.stop)]
    assert len(counted) == len(set(counted))
    skipped = set(range(0, num_tokens, window)) if stride == window else {0}
    assert set(counted) == set(range(num_tokens)) - skipped
    assert all(w.stop - w.start <= window and w.first_new > w.start for w in windows)


def test_max_windows(model: Any, stream: torch.Tensor) -> None:
    result = stream_perplexity(model, stream, window=8, max_windows=2)
    assert result.nll == pytest.approx(stream_perplexity(model, stream[:16], window=8).nll, rel=1e-12)
    assert (result.num_windows, result.num_tokens) == (2, 14)


def test_model_and_stream_are_left_as_they_were(model: Any, stream: torch.Tensor) -> None:
    before = stream.clone()
    model.train()
    try:
        stream_perplexity(model, stream, window=8)
        assert model.training
    finally:
        model.eval()
    assert torch.equal(stream, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_an_error(model: Any, stream: torch.Tensor, bad: float) -> None:
    import copy

    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.ln_f.bias[0] = bad
    with pytest.raises(NumericsError, match="NaN"):
        stream_perplexity(broken, stream, window=8)


@pytest.mark.parametrize(
    "settings", [{"window": 1}, {"window": 8, "stride": 9}, {"window": 8, "stride": 0}, {"window": 17}, {"batch_size": 0}]
)
def test_illegal_settings(model: Any, stream: torch.Tensor, settings: dict[str, int]) -> None:
    with pytest.raises(EvaluationError):
        stream_perplexity(model, stream, **{"window": 8, **settings})


def test_stream_too_short(model: Any) -> None:
    with pytest.raises(EvaluationError, match="1 tokens"):
        stream_perplexity(model, torch.zeros(1, dtype=torch.int64), window=8)


def test_corpus_joins_documents_by_eos(model: Any) -> None:
    class Letters:
        eos_token_id = 52

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) - ord("a") for c in text]}

    corpus = Corpus(("abc", "defgh"), "here", "digest")
    expected = torch.tensor([0, 1, 2, 52, 3, 4, 5, 6, 7, 52])
    result = corpus_perplexity(model, Letters(), corpus, window=6)
    assert result.nll == pytest.approx(stream_perplexity(model, expected, window=6).nll, rel=1e-12)
    assert (result.source, result.sha256) == ("here", "digest")
    cut = corpus_perplexity(model, Letters(), corpus, window=6, stride=2, max_windows=2)
    assert cut.nll == pytest.approx(stream_perplexity(model, expected[:8], window=6, stride=2).nll, rel=1e-12)


def test_tokenizer_without_eos(model: Any) -> None:
    with pytest.raises(EvaluationError, match="EOS"):
        corpus_perplexity(model, SimpleNamespace(eos_token_id=None), Corpus(("a",), "s", "d"), window=6)
