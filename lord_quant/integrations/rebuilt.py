# SPDX-License-Identifier: Apache-2.0
"""A model rebuilt on the meta device, before tensors are loaded: what its files must hold, what must not be made up."""

from __future__ import annotations

from typing import Any

import torch

from lord_quant.checkpoint import check_tensors
from lord_quant.surgery import is_compressed


def check_files(model: torch.nn.Module, block_path: str, files: list[str] | None) -> None:
    """Holds the checkpoint's headers against the tensors that the rebuilt model calls for."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return
    ours = _stored_names(model, block_path)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name in ours}
    check_tensors(expected, [str(file) for file in files], block_path)


def _stored_names(model: Any, block_path: str) -> set[str]:
    """Names the tensors a checkpoint must hold: the blocks', what is around them, and the head unless it is tied.

    A classification head is none of these: the host may make up a new one, as it does for dense models.
    """
    body, head = getattr(model, "base_model", model), model.get_output_embeddings()
    names = set()
    for path, module in model.named_modules():
        if module is body or path == block_path:
            names |= {f"{path}.{name}".lstrip(".") for name in module.state_dict()}
        elif head is not None and module is head:
            tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
            names |= {f"{path}.{name}" for name in module.state_dict() if not (tied and name == "weight")}
    return names


def protect_from_initialization(model: torch.nn.Module) -> None:
    """Keeps GPT-2 and GPTBigCode from initialising weights that packed layers do not have.

    Their `_init_weights` draws `c_proj.weight` anew on modules that were not marked as loaded. Only modules without
    tensors of their own are marked, so that computed buffers (CodeGen's position table) are still filled.
    """
    for module in model.modules():
        if module._parameters or module._buffers:
            continue
        if any(is_compressed(child) for child in module.children()):
            vars(module)["_is_hf_initialized"] = True
