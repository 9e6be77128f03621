# SPDX-License-Identifier: Apache-2.0
"""Token windows for calibration: one list feeds decomposition and quantization alike.

Documents are shuffled with the run's own generator, tokenized, joined by the end-of-text token and cut into windows of
equal length, so there is no padding and no sample is short. Several times more windows than asked for are cut where the
corpus allows, and the sample is drawn from those, so that it spreads over documents.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import torch

from lord_quant.corpus import Corpus
from lord_quant.errors import CalibrationError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOL_FACTOR = 4
"""Windows cut per window asked for, before sampling."""
PASS_TOKENS = 2048
"""Tokens per pass: enough to keep a processor busy, few enough for what a block makes of them, or a large vocabulary's
logits, to take less memory than the block."""
MOST_AT_ONCE = 4
"""Windows per forward pass, however short."""


class TokenWindows(NamedTuple):
    """Calibration tokens.

    Attributes:
        input_ids: int64, with shape (num_samples, seq_len).
        source: Where the text came from.
        sha256: Digest of the tokens; equal digests mean equal calibration.
    """

    input_ids: torch.Tensor
    source: str
    sha256: str

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all windows."""
        return self.input_ids.numel()

    def batches(self, size: int | None) -> list[torch.Tensor]:
        """Splits into batches with shape (≤ size, seq_len); None takes what `windows_at_once` does."""
        return list(self.input_ids.split(size or windows_at_once(self.input_ids.shape[1])))

    def as_samples(self) -> list[dict[str, torch.Tensor]]:
        """Returns what Optimum takes: one dict of (1, seq_len) tensors per window."""
        return [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in self.input_ids]


def windows_at_once(seq_len: int) -> int:
    """Returns how many windows a forward pass takes where nobody says so."""
    return max(1, min(MOST_AT_ONCE, PASS_TOKENS // seq_len))


def sample_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    fewer: bool = False,
) -> TokenWindows:
    """Samples token windows from a corpus.

    Args:
        corpus: The documents.
        tokenizer: The model's tokenizer.
        num_samples: Windows wanted.
        seq_len: Tokens per window.
        fewer: Take fewer windows, but at least one, where the corpus fills no more.
        seed: Seed of the generator; global random state is neither read nor changed.

    Raises:
        CalibrationError: The corpus has too few tokens; the message names how many windows it could fill.
    """
    generator = torch.Generator().manual_seed(seed)
    separator = tokenizer.eos_token_id
    stream: list[int] = []
    wanted = num_samples * POOL_FACTOR * seq_len
    for index in torch.randperm(len(corpus.documents), generator=generator).tolist():
        stream += tokenizer(corpus.documents[index], add_special_tokens=False, verbose=False)["input_ids"]
        if separator is not None:
            stream.append(separator)
        if len(stream) >= wanted:
            break
    available = len(stream) // seq_len
    if available < (1 if fewer else num_samples):
        found = (
            f"{corpus.source} fills {available} windows of {seq_len} tokens ({len(stream)} tokens); wanted {num_samples}"
        )
        longest = len(stream) // num_samples
        ways = [f"--num-samples {available}"] * (available > 0) + [f"a --seq-len of at most {longest}"] * (longest > 1)
        raise CalibrationError(f"{found}. Use {', '.join([*ways, ''])}{'or ' * bool(ways)}more text")
    pool = torch.tensor(stream[: available * seq_len]).view(available, seq_len)
    chosen = pool[torch.randperm(available, generator=generator)[:num_samples]].contiguous()
    return as_windows(chosen, corpus.source)


def as_windows(input_ids: torch.Tensor, source: str) -> TokenWindows:
    """Wraps tokens with shape (num_samples, seq_len) and computes their digest."""
    digest = hashlib.sha256(str(tuple(input_ids.shape)).encode() + input_ids.to("cpu", torch.int64).numpy().tobytes())
    return TokenWindows(input_ids, source, digest.hexdigest())


def require_known(input_ids: torch.Tensor, vocabulary: int, what: str) -> None:
    """Refuses tokens that a model has no embedding for.

    Args:
        input_ids: Of any shape.
        vocabulary: How many tokens the model knows.
        what: What holds them, for the message.

    Raises:
        CalibrationError: There are such.
    """
    smallest, largest = int(input_ids.min()), int(input_ids.max())
    if smallest < 0 or largest >= vocabulary:
        odd = largest if smallest >= 0 else smallest
        raise CalibrationError(f"{what} hold token {odd}; the model knows 0 to {vocabulary - 1}: is it its own tokenizer?")
