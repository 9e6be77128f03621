# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of several architectures, built from their configurations; nothing is downloaded."""

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig


WIDTH, VOCABULARY = 64, 97


def _config(family: str, **changes: object) -> PretrainedConfig:
    import transformers

    gpt2 = {"n_embd": WIDTH, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": VOCABULARY}
    llama = {
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
    }
    sliding = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    known = {
        "gpt2": ("GPT2Config", gpt2),
        "bigcode": ("GPTBigCodeConfig", gpt2 | {"multi_query": True}),
        "codegen": ("CodeGenConfig", gpt2 | {"rotary_dim": 8, "n_ctx": 64}),
        "llama": ("LlamaConfig", llama),
        "qwen2": ("Qwen2Config", llama | sliding | {"use_sliding_window": True}),
        "olmo": ("OlmoConfig", llama | {"clip_qkv": 0.3}),
        "gemma2": ("Gemma2Config", llama | sliding),
        "gemma3": ("Gemma3TextConfig", llama | sliding),
    }
    name, values = known[family]
    return getattr(transformers, name)(**(values | {"bos_token_id": 1, "eos_token_id": 2} | changes))


def tiny_model(family: str, dtype: torch.dtype = torch.float64, **changes: object) -> torch.nn.Module:
    """Builds a model of `family` in evaluation mode, every parameter random, biases and norms too.

    Args:
        family: gpt2, bigcode, codegen, llama, olmo, qwen2, gemma2, gemma3; qwen2 and the gemmas: a sliding first block.
        dtype: dtype of its parameters.
        changes: Values of its configuration to replace.
    """
    model = AutoModelForCausalLM.from_config(_config(family, **changes), attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
    return model.to(dtype).eval()


def random_tokens(rows: int = 6, length: int = 24) -> torch.Tensor:
    """Returns random token windows with shape (rows, length)."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
