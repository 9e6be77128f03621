# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the supported architectures, saved as ordinary safetensors folders.

Two blocks, hidden size 128, and the vocabulary of the demo model, so that its tokenizer fits. Weights of linear layers
are drawn large enough that every layer moves the logits: at transformers' own initialisation a two-block model is close
to its embedding table, and a broken layer would hardly show.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


REPOSITORY = Path(__file__).parent.parent
TOKENIZER = REPOSITORY / "eval" / "models" / "pycoder-starcoder-humaneval"
LOADER = Path(__file__).parent / "integrations" / "load_fresh.py"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
VOCABULARY = 4096
CONTEXT = 256
HIDDEN = 128
FALL = 0.95
"""Each singular value of a compressible model's layers over the one before."""

_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT: dict[str, Any] = {**_COMMON, **_DROPOUT, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_LLAMA: dict[str, Any] = {
    **_COMMON,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_bigcode": ("GPTBigCodeConfig", {**_GPT, "n_inner": 2 * HIDDEN, "multi_query": True}),
    "compressible": ("GPTBigCodeConfig", {**_GPT, "n_inner": 2 * HIDDEN, "multi_query": True}),
    "codegen": ("CodeGenConfig", {**_GPT, "n_inner": 2 * HIDDEN, "rotary_dim": 16, "n_ctx": CONTEXT}),
    "gpt2": ("GPT2Config", {**_GPT, "n_inner": 2 * HIDDEN}),
    "llama": ("LlamaConfig", _LLAMA),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 32}),
    "starcoder2": ("Starcoder2Config", _LLAMA),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 16}),
    "gpt_neox": ("GPTNeoXConfig", {**_LLAMA, "tie_word_embeddings": False}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **_LLAMA,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
        },
    ),
    "ctrl": ("CTRLConfig", {**_GPT, "dff": 2 * HIDDEN}),  # its MLP is an `nn.Sequential`
}


def build(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Builds a float32 model of a family; `overrides` are configuration values."""
    import transformers

    name, values = FAMILIES[family]
    config = getattr(transformers, name)(**{**values, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _scale(model)
        if family == "compressible":
            _let_spectra_fall(model)
    return model.eval()


def _scale(model: nn.Module) -> None:
    """Draws matrices with unit gain, biases and embeddings with visible size; normalisations stay."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                embedding = any(part in name for part in ("wte", "wpe", "embed_tokens", "lm_head"))
                parameter.normal_(std=0.5 if embedding else parameter.shape[-1] ** -0.5)
            elif name.endswith("bias") and "ln" not in name and "norm" not in name:
                parameter.normal_(std=0.1)


def _let_spectra_fall(model: nn.Module) -> None:
    """Gives every layer singular values that fall, as those of trained models do: ranks are worth choosing then."""
    with torch.no_grad():
        for module in model.transformer.h.modules():
            if isinstance(module, nn.Linear):
                left, values, right = torch.linalg.svd(module.weight, full_matrices=False)
                fall = FALL ** torch.arange(len(values))
                module.weight.copy_((left * values.norm() * fall / fall.norm()) @ right)


def copy_tokenizer(folder: str | Path) -> None:
    """Puts the demo model's tokenizer beside weights."""
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, Path(folder) / name)


def save(model: Any, folder: str | Path, *, tokenizer: bool = True) -> Path:
    """Saves a model and the tokenizer; returns the folder."""
    model.save_pretrained(folder)
    if tokenizer:
        copy_tokenizer(folder)
    return Path(folder)


def probe_tokens() -> torch.Tensor:
    """Two fixed rows of tokens that every reload is compared on, with shape (2, 24)."""
    return torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(11))


def probe_logits(model: Any) -> torch.Tensor:
    """Returns a model's logits on `probe_tokens`."""
    with torch.no_grad():
        return model(input_ids=probe_tokens()).logits.detach().clone()


def compress(
    model_folder: str | Path,
    output: str | Path,
    dataset: str | Path,
    *,
    lowrank: dict[str, Any] | None = None,
    gptq: dict[str, Any] | None = None,
    calibration: dict[str, Any] | None = None,
    **run: Any,
) -> tuple[Any, torch.Tensor]:
    """Compresses a folder by the product's own steps and keeps the model: what `pipeline.execute` does, less the report.

    Returns:
        The plan, and the logits of the model in memory *after* it was saved.
    """
    gc.freeze()  # the host collects garbage after every model, which costs more than its work on models this small
    from lord_quant.blocks.source import load_model
    from lord_quant.checkpoint import atomic_folder, cast_floats, write_model
    from lord_quant.config import LordConfig
    from lord_quant.runs.pipeline import compress_model, prepare

    config = LordConfig.from_dict(
        {
            "model": str(model_folder),
            "output": str(output),
            "lowrank": lowrank or {"rank_ratio": 0.25},
            "gptq": {"group_size": 32, **(gptq or {})},
            "calibration": {"dataset": str(dataset), "num_samples": 4, "seq_len": 64, **(calibration or {})},
            **run,
        }
    )
    job = prepare(config)
    model = load_model(job.source, job.device)
    compress_model(model, job.plan, job.windows, config)
    cast_floats(model, job.source.dtype)
    with atomic_folder(output) as folder:
        write_model(model, folder)
        job.source.tokenizer.save_pretrained(folder)
    return job.plan, probe_logits(model)


def load_fresh(output: Path, *folders: str | Path) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """Loads folders in a process that knows transformers only; see `integrations/load_fresh.py`.

    Returns:
        What it found, by folder, and the finished process.
    """
    command = [sys.executable, str(LOADER), str(output), *map(str, folders)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stderr
    return torch.load(output, weights_only=False), process


def require_equal(result: dict[str, Any], expected: torch.Tensor) -> None:
    """Fails unless one result of `load_fresh` holds exactly the expected logits."""
    assert "logits" in result, result["trace"]
    assert torch.isfinite(expected).all()
    assert result["logits"].dtype == expected.dtype
    difference = (result["logits"].double() - expected.double()).abs().max().item()
    assert torch.equal(result["logits"], expected), f"largest difference {difference:.3g}"


def stored_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of a checkpoint folder."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes the tensors in the one file of a model folder."""
    from safetensors.torch import save_file

    tensors = stored_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def different_tensors(one: str | Path, other: str | Path) -> list[str]:
    """Names the tensors in which two checkpoint folders differ, bit for bit."""
    left, right = stored_tensors(one), stored_tensors(other)
    names = sorted(left.keys() | right.keys())
    return [name for name in names if name not in left or name not in right or not torch.equal(left[name], right[name])]
