# SPDX-License-Identifier: Apache-2.0
"""Windows of calibration tokens: how they are drawn, how many there must be, what identifies them."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_quant.calibration import TokenWindows, as_windows, require_known, sample_windows, windows_at_once
from lord_quant.corpus import Corpus
from lord_quant.errors import CalibrationError


class WordTokenizer:
    """Every word is a number and its own token; a stand-in for a tokenizer of transformers."""

    eos_token_id: int | None = 0

    def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]:
        assert kwargs["add_special_tokens"] is False
        return {"input_ids": [int(word) for word in text.split()]}


def corpus(documents: int = 20, words: int = 37) -> Corpus:
    """Documents of consecutive numbers, so that a token tells where it stood."""
    texts = [" ".join(str(1 + 1000 * d + w) for w in range(words)) for d in range(documents)]
    return Corpus(tuple(texts), "test", "")


def sample(seed: int = 0, num_samples: int = 8, seq_len: int = 16, **kwargs: int) -> TokenWindows:
    return sample_windows(corpus(**kwargs), WordTokenizer(), num_samples=num_samples, seq_len=seq_len, seed=seed)


def test_windows_have_the_shape_asked_for() -> None:
    windows = sample(num_samples=5, seq_len=12)
    assert windows.input_ids.shape == (5, 12) and windows.input_ids.dtype == torch.int64
    assert windows.num_tokens == 60 and windows.source == "test" and len(windows.sha256) == 64


def test_the_same_seed_gives_the_same_windows_and_another_seed_others() -> None:
    assert torch.equal(sample(3).input_ids, sample(3).input_ids) and sample(3).sha256 == sample(3).sha256
    assert not torch.equal(sample(3).input_ids, sample(4).input_ids) and sample(3).sha256 != sample(4).sha256


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = sample(5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    torch.manual_seed(2)
    assert sample(5).sha256 == first.sha256


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(2, 50), st.integers(0, 99), st.booleans())
def test_windows_are_distinct_contiguous_pieces_of_the_stream(num_samples: int, seq_len: int, seed: int, eos: bool) -> None:
    tokenizer = WordTokenizer()
    tokenizer.eos_token_id = 0 if eos else None
    windows = sample_windows(corpus(), tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed)
    for row in windows.input_ids.tolist():
        for left, right in itertools.pairwise(row):
            last_word = left % 1000 == 37
            if left == 0:
                assert right % 1000 == 1  # a document begins after the separator
            elif eos:
                assert right == (0 if last_word else left + 1)
            else:
                assert right % 1000 == 1 if last_word else right == left + 1
    words = windows.input_ids[windows.input_ids > 0]
    assert len(words.unique()) == len(words)  # no token is used twice


def test_windows_spread_over_the_corpus() -> None:
    windows = sample(num_samples=8, seq_len=16)
    assert len((windows.input_ids.max(1).values // 1000).unique()) >= 5


@pytest.mark.parametrize(
    ("num_samples", "seq_len", "parts"),
    [
        # 2 documents of 37 words and a separator each: 76 tokens
        (8, 16, ["test fills 4 windows of 16 tokens (76 tokens)", "wanted 8", "--num-samples 4", "--seq-len of at most 9"]),
        (1, 100, ["fills 0 windows of 100 tokens", "wanted 1", "Use a --seq-len of at most 76, or more text"]),
        (50, 16, ["wanted 50. Use --num-samples 4, or more text"]),  # windows of one token are none
        (77, 100, ["wanted 77. Use more text"]),
    ],
)
def test_too_few_tokens_says_how_many_there_are(num_samples: int, seq_len: int, parts: list[str]) -> None:
    with pytest.raises(CalibrationError) as caught:
        sample(num_samples=num_samples, seq_len=seq_len, documents=2)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(("num_samples", "seq_len"), [(4, 16), (8, 9), (1, 76)])
def test_what_the_message_proposes_works(num_samples: int, seq_len: int) -> None:
    assert sample(num_samples=num_samples, seq_len=seq_len, documents=2).input_ids.shape == (num_samples, seq_len)


def test_the_digest_depends_on_tokens_shape_and_nothing_else() -> None:
    ids = torch.arange(12).view(3, 4)
    assert as_windows(ids, "a").sha256 == as_windows(ids.clone().int(), "b").sha256
    assert as_windows(ids, "a").sha256 == as_windows(ids.T.contiguous().T, "a").sha256
    changed = ids.clone()
    changed[2, 3] += 1
    assert len({as_windows(x, "a").sha256 for x in (ids, changed, ids.flip(0), ids.view(4, 3))}) == 4


def test_batches_and_samples_hold_the_same_tokens() -> None:
    windows = sample(num_samples=7)
    batches = windows.batches(3)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), windows.input_ids)
    assert [len(batch) for batch in windows.batches(None)] == [4, 3]
    samples = windows.as_samples()
    assert torch.equal(torch.cat([item["input_ids"] for item in samples]), windows.input_ids)
    assert {tuple(tensor.shape) for item in samples for tensor in item.values()} == {(1, 16)}
    assert all((item["attention_mask"] == 1).all() for item in samples)


@pytest.mark.parametrize(("seq_len", "windows"), [(32, 4), (512, 4), (513, 3), (1024, 2), (1025, 1), (2048, 1), (8192, 1)])
def test_a_pass_takes_few_windows_where_they_are_long(seq_len: int, windows: int) -> None:
    assert windows_at_once(seq_len) == windows


def test_tokens_that_a_model_does_not_know_are_refused() -> None:
    tokens = torch.tensor([[0, 3, 7]])
    require_known(tokens, 8, "windows")
    with pytest.raises(CalibrationError, match="windows hold token 7; the model knows 0 to 6: is it its own tokenizer"):
        require_known(tokens, 7, "windows")
    with pytest.raises(CalibrationError, match="windows hold token -1"):
        require_known(tokens - 1, 8, "windows")
