# SPDX-License-Identifier: Apache-2.0
"""Models of StarCoder's shape (GPTBigCode, one key and value head) with random weights, as wide and as deep as wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any


STEP = 0.02
"""Standard deviation of the weights."""
HEAD = 128
"""Width of an attention head."""


def make_model(
    tokenizer: str, folder: Path, width: int, blocks: int, vocabulary: int | None = None, device: str = "cpu"
) -> int:
    """Writes a model in bfloat16 with a tokenizer; returns the bytes of its tensors.

    Args:
        tokenizer: Folder of the model whose tokenizer is used.
        folder: Where it goes.
        width: Hidden size, a multiple of 128.
        blocks: Transformer blocks.
        vocabulary: Rows of the embedding; as many as the tokenizer has words unless said otherwise.
        device: Where weights are drawn; other devices draw others.

    Raises:
        SystemExit: The width is no multiple of 128, or the vocabulary is smaller than the tokenizer's.
    """
    if width < HEAD or width % HEAD:
        nearest = max(HEAD, round(width / HEAD) * HEAD)
        raise SystemExit(f"width {width}; wanted a multiple of {HEAD}, the width of a head: nearest {nearest}")
    from lord_quant.silence import import_hosts

    import_hosts()
    import torch
    from transformers import AutoTokenizer, GPTBigCodeConfig, GPTBigCodeForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    if vocabulary is not None and vocabulary < len(words):
        raise SystemExit(f"vocabulary {vocabulary}; wanted {len(words)} at least, the words of the tokenizer")
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=vocabulary or len(words), n_embd=width, n_layer=blocks, n_head=width // HEAD, n_inner=4 * width,
        n_positions=2048, multi_query=True, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, initializer_range=STEP,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    with torch.device(device):
        model: Any = GPTBigCodeForCausalLM(config)
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
