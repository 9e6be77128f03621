# SPDX-License-Identifier: Apache-2.0
"""Packed words: one stream of bits, lowest first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_quant.files.packing import pack_words, unpack_words


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([2, 3, 4, 8]), st.integers(0, 10**6))
def test_the_words_of_a_column_are_one_stream_of_bits(blocks: int, width: int, bits: int, seed: int) -> None:
    values = torch.randint(2**bits, (32 * blocks, width), generator=torch.Generator().manual_seed(seed))
    words = pack_words(values, bits)
    assert words.dtype == torch.int32 and words.shape == (blocks * bits, width)
    for column in range(width):
        stream = np.unpackbits(words[:, column].numpy().astype("<i4").view(np.uint8), bitorder="little")
        found = stream.reshape(-1, bits) @ (1 << np.arange(bits))
        assert np.array_equal(found, values[:, column].numpy())
    assert torch.equal(unpack_words(words, bits), values.int())


def test_values_that_fill_no_word_are_refused() -> None:
    with pytest.raises(ValueError, match="33 values per column cannot be packed; wanted a multiple of 32"):
        pack_words(torch.zeros(33, 2, dtype=torch.uint8), 4)


def test_words_that_hold_no_whole_values_are_refused() -> None:
    with pytest.raises(ValueError, match="4 words per column cannot be unpacked; wanted a multiple of 3"):
        unpack_words(torch.zeros(4, 2, dtype=torch.int32), 3)
