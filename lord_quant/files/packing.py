# SPDX-License-Identifier: Apache-2.0
"""Codes of 2, 3, 4 or 8 bits as 32-bit words, in the layout of GPTQ checkpoints.

Values along the first dimension make one stream of bits, lowest bit first, cut into words: 32 values fill as many words as
a value has bits. With 3 bits, two of every 32 values lie across the border of two words.
"""

from __future__ import annotations

import torch


WORD = 32


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs values.

    Args:
        values: Integers 0 to 2^bits − 1 of any dtype, with shape (k, m), k a multiple of 32.
        bits: Bits of a value, 1 to 32.

    Returns:
        Words, int32, with shape (k · bits / 32, m).

    Raises:
        ValueError: k is no multiple of 32.
    """
    count, width = values.shape
    if count % WORD:
        raise ValueError(f"{count} values per column cannot be packed; wanted a multiple of {WORD}")
    groups = values.reshape(count // WORD, WORD, width)
    words = torch.zeros(count // WORD, bits, width, dtype=torch.int32, device=values.device)
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        value = groups[:, place].to(torch.int32)
        words[:, word] |= value << shift
        if shift + bits > WORD:
            words[:, word + 1] |= value >> (WORD - shift)
    return words.view(-1, width)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Undoes `pack_words`.

    Args:
        words: Words, int32, with shape (k · bits / 32, m).
        bits: Bits of a value, 1 to 31.

    Returns:
        Integers 0 to 2^bits − 1, int32, with shape (k, m).

    Raises:
        ValueError: The words do not hold a multiple of 32 values.
    """
    count, width = words.shape
    if count % bits:
        raise ValueError(f"{count} words per column cannot be unpacked; wanted a multiple of {bits}")
    groups = words.reshape(count // bits, bits, width).to(torch.int64) & (2**WORD - 1)  # without their sign
    values = torch.empty(count // bits, WORD, width, dtype=torch.int32, device=words.device)
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        value = groups[:, word] >> shift
        if shift + bits > WORD:
            value |= groups[:, word + 1] << (WORD - shift)
        values[:, place] = (value & (2**bits - 1)).to(torch.int32)
    return values.view(-1, width)
