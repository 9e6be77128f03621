# SPDX-License-Identifier: Apache-2.0
"""Output sensitivities: against gradients taken otherwise, and against the Fisher information of a softmax."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_runs import BATCHES, TOKENS, plan_of, require_hooks_to_survive, run_joint, sensitivities
from models import tiny_model
from torch import nn

from lord_quant import sensitivity
from lord_quant.errors import NumericsError
from lord_quant.sensitivity import Sensitivity, _draw, _outputs


F64 = torch.float64
FAMILIES = {
    "bigcode": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"],
    "codegen": ["transformer.h.0.attn.qkv_proj", "transformer.h.1.attn.out_proj"],
    "qwen2": ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"],  # the first block's attention slides
    "olmo": ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.q_proj"],  # clamped in place
    "gpt2": ["transformer.h.0.attn.c_attn"],
    "gemma3": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"],
    "llama": ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj"],
}


def by_added_errors(model: nn.Module, name: str, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """G from the gradient of an error added to the layer's outputs, token by token in numpy."""
    error = torch.zeros(*tokens.shape, model.get_submodule(name)(_inputs_of(model, name, tokens)).shape[-1], dtype=F64)
    error.requires_grad_()
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: output + error)
    logits = model(input_ids=tokens).logits.flatten(0, 1)
    handle.remove()
    loss = -logits.log_softmax(dim=-1)[torch.arange(len(labels)), labels].sum()
    (gradient,) = torch.autograd.grad(loss, error)
    rows = gradient.flatten(0, 1).numpy()
    return torch.from_numpy(sum(row[:, None] * row[None, :] for row in rows) / len(rows))


def _inputs_of(model: nn.Module, name: str, tokens: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=tokens)
    handle.remove()
    return seen[0]


def labels_drawn(model: nn.Module, tokens: torch.Tensor, seed: int) -> torch.Tensor:
    chance = torch.rand(tokens.numel(), generator=torch.Generator().manual_seed(seed), dtype=F64)
    with torch.no_grad():
        return _draw(model(input_ids=tokens).logits.float().flatten(0, 1), chance)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_gradient_of_errors_added_to_the_outputs(family: str) -> None:
    model = tiny_model(family)
    found = sensitivities(model, FAMILIES[family], seed=3)
    assert list(found) == FAMILIES[family]
    labels = labels_drawn(model, TOKENS, seed=3)
    for name, matrix in found.items():
        expected = by_added_errors(model, name, TOKENS, labels)
        # logits pass through float32 on their way to the loss
        torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        assert torch.equal(matrix, matrix.T)


def test_batches_change_nothing_and_seeds_do() -> None:
    model, names = tiny_model("llama"), FAMILIES["llama"]
    one = sensitivities(model, names, [TOKENS])
    many = sensitivities(model, names, list(TOKENS.split(1)))
    other = sensitivities(model, names, [TOKENS], seed=1)
    for name in names:
        torch.testing.assert_close(one[name], many[name], rtol=1e-5, atol=1e-5 * float(one[name].abs().max()))
        assert (one[name] - other[name]).abs().max() > 0.01 * one[name].abs().max()


class Classifier(nn.Module):
    """A language model of two blocks that hardly do anything: the Fisher information of its last outputs is known."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.linear(hidden_states)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(width, width), nn.ModuleList([self.Block(width), self.Block(width)])

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> Any:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden_states=hidden)
        return SimpleNamespace(logits=hidden)


def test_it_estimates_the_fisher_information_of_a_softmax() -> None:
    """E[g gᵀ] over labels drawn from p is diag p − p pᵀ; labels of a text would give something else."""
    torch.manual_seed(0)
    model = Classifier(7).eval()
    tokens = torch.randint(0, 7, (40, 1000), generator=torch.Generator().manual_seed(0))
    found = sensitivities(model, ["blocks.0.linear", "blocks.1.linear"], [tokens])
    p = model(tokens).logits.softmax(-1).flatten(0, 1).detach().double()
    expected = torch.diag(p.mean(0)) - p.T @ p / len(p)
    torch.testing.assert_close(found["blocks.1.linear"], expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    weight = model.blocks[1].linear.weight.detach().double()
    before = weight.T @ expected @ weight  # what the block behind makes of an error
    torch.testing.assert_close(found["blocks.0.linear"], before, rtol=0, atol=0.03 * float(before.abs().max()))


def test_labels_follow_the_predictions() -> None:
    logits = torch.tensor([0.0, -torch.inf, 1.0, 2.0, -torch.inf]).repeat(200_000, 1)
    chance = torch.rand(len(logits), generator=torch.Generator().manual_seed(0), dtype=F64)
    share = _draw(logits, chance).bincount(minlength=5) / len(logits)
    torch.testing.assert_close(share, logits[0].softmax(-1), rtol=0, atol=4e-3)
    assert share[1] == share[4] == 0
    edges = torch.tensor([0.0, 1 - 2.0**-53], dtype=F64)
    assert _draw(logits[:2], edges).tolist() == [0, 3]


@pytest.mark.parametrize("failure", [None, "first block"])
def test_the_model_is_left_as_it_was(failure: str | None) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    require_hooks_to_survive(model, failure, lambda: sensitivities(model, FAMILIES["llama"]))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
        assert parameter.requires_grad == (name != "model.norm.weight")


def test_a_layer_the_loss_does_not_see_counts_nothing() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    found = sensitivities(model, ["model.layers.1.mlp.up_proj"])
    assert found["model.layers.1.mlp.up_proj"].abs().max() == 0


def test_a_block_that_changes_an_output_in_place_is_seen_before_that() -> None:
    """As OLMo clamps its queries: what is clamped does not matter to the loss."""
    block = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with _outputs(block, ["q_proj"]) as outputs:
        y = block["q_proj"](x).clamp_(-1e-9, 1e-9)
    (gradient,) = torch.autograd.grad(y.sum(), outputs["q_proj"])
    assert gradient.abs().max() == 0


def test_blocks_are_asked_for_in_order_and_once() -> None:
    model = tiny_model("llama")
    measured = Sensitivity.measure(model, BATCHES)
    blocks = model.model.layers
    with pytest.raises(ValueError, match="block 1; wanted block 0"):
        measured.of_block(1, blocks[1], "block", [])
    measured.of_block(0, blocks[0], "block", [])
    with pytest.raises(ValueError, match="block 0; wanted block 1"):
        measured.of_block(0, blocks[0], "block", [])


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_gradient_of_the_loss_is_the_one_autograd_finds(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "ROWS", rows)
    logits = torch.randn(20, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    chance = torch.rand(20, generator=torch.Generator().manual_seed(1), dtype=F64)
    loss = nn.functional.cross_entropy(logits, _draw(logits.detach(), chance), reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(sensitivity._loss_gradient(logits.detach(), chance), expected)


def test_broken_gradients_are_refused_by_name() -> None:
    """Inputs may be finite where gradients are not: behind the layer something overflows."""
    model = tiny_model("llama")

    def explode(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0 * torch.sqrt(output - output.detach())  # zero, with an infinite slope

    model.model.norm.register_forward_hook(explode)
    plan = plan_of(model)
    with pytest.raises(NumericsError, match=r"layer 'model\.layers\.0\.self_attn\.\w+': output sensitivity .*--no-fisher"):
        run_joint(model, plan, sensitivity=Sensitivity.measure(model, BATCHES))
