# SPDX-License-Identifier: Apache-2.0
"""How much the model's loss minds errors in each layer's outputs, from one backward pass.

A small error e in a layer's output raises the model's loss, averaged over what the model itself would say next, by
½ eᵀ F e with F the Fisher information of its predictions. Averaged over tokens, and inputs and outputs taken as
independent, an error D of the weight costs

    ½ tr G D H Dᵀ,    H = E[x xᵀ],    G = E[g gᵀ],    g = ∂ loss / ∂ output,

with the loss of labels *drawn from the model's own predictions*: those of the text would give the gradient of fit, which
vanishes on memorised text, and not the curvature. (Kronecker-factored Fisher: KFAC, arXiv 1503.05671; for truncation:
FWSVD, arXiv 2207.00112, has its diagonal; for rounding: YAQA, arXiv 2505.22988.) Labels are drawn once per token. The
gradient at one position sums what it changes at all later ones.

G has as many rows as the layer has outputs, so a few thousand tokens are enough; `stack.py` damps what they leave open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lord_quant.errors import NumericsError


def output_sensitivity(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[torch.Tensor],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Returns G = E[g gᵀ] of the layers' outputs, the mean over tokens of the gradient's outer products.

    Args:
        model: A loaded causal language model in evaluation mode; left as it was, weights get no gradients.
        names: Full module paths of the layers.
        batches: Token windows with shape (batch, seq_len), all without padding; one batch's activations are held at a time.
        seed: Of the labels drawn from the model's predictions.
        dtype: dtype of the sums.

    Returns:
        Symmetric positive semidefinite matrices with shape (out_features, out_features), by name; zero for a layer the
        loss does not depend on.

    Raises:
        NumericsError: Gradients hold NaN or inf; the layers are named.
    """
    count = sum(batch.numel() for batch in batches)
    chances = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).split(
        [batch.numel() for batch in batches]
    )
    sums: dict[str, torch.Tensor] = {}

    def observe(name: str) -> Any:
        def add(gradient: torch.Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1]).to(dtype)
            sums[name].addmm_(rows.T, rows)

        def watch(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if name not in sums:
                sums[name] = torch.zeros(output.shape[-1], output.shape[-1], dtype=dtype, device=output.device)
            output.register_hook(add)

        return watch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [model.get_submodule(name).register_forward_hook(observe(name)) for name in names]
    handles.append(_embedding(model).register_forward_hook(lambda module, args, output: output.requires_grad_()))
    try:
        model.requires_grad_(False)  # gradients of activations are wanted, those of weights would cost as much again
        for batch, chance in zip(tqdm(batches, desc="sensitivity", unit="batch", disable=None), chances, strict=True):
            with torch.enable_grad():
                logits = model(input_ids=batch.to(next(model.parameters()).device), use_cache=False).logits.float()
                logits = logits.flatten(0, 1)
                nn.functional.cross_entropy(logits, _draw(logits.detach(), chance), reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    broken = [name for name, total in sums.items() if not torch.isfinite(total).all()]
    if broken:
        raise NumericsError(
            f"gradients of {', '.join(broken)} hold NaN or inf; wanted finite ones: compute in float32, or use --no-fisher"
        )
    return {name: total / count for name, total in sums.items()}


def _draw(logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Draws one label per row from softmax(logits), where its cumulated probability reaches `chance`, in [0, 1).

    So that a seed draws the same labels however the windows are batched, on whatever device.
    """
    cumulated = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    reached = torch.searchsorted(cumulated, chance.to(logits.device)[:, None] * cumulated[:, -1:], right=True)
    return reached[:, 0].clamp_max(logits.shape[-1] - 1)


def _embedding(model: nn.Module) -> nn.Module:
    """Returns the token embedding, where gradients start."""
    host: Any = model
    return host.get_input_embeddings()
