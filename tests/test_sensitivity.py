# SPDX-License-Identifier: Apache-2.0
"""Output sensitivities: against gradients taken otherwise, and against the Fisher information of a softmax."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_runs import BATCHES, TOKENS, block_by_block, plan_of, run_joint, sensitivities, slopes
from models import tiny_model
from torch import nn

from lord_quant.blocks.residency import Residency
from lord_quant.errors import NumericsError
from lord_quant.sensitivity import Expansion, Sensitivity, _draw
from lord_quant.targets import find_blocks


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
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-12 * float(expected.abs().max()))


def at_once(model: nn.Module, names: Sequence[Sequence[str]], dtype: torch.dtype = F64, spare: int = 2**20) -> Sensitivity:
    """Measures what will be asked for on the way back, if it takes no more than `spare` bytes."""
    residency = Residency()
    residency.spare_bytes = spare
    return Sensitivity.measure(model, BATCHES, names=names, dtype=dtype, residency=residency)


@pytest.mark.parametrize("family", ["bigcode", "olmo", "llama"])
def test_made_on_the_way_back_it_is_the_same(family: str) -> None:
    model, names = tiny_model(family), FAMILIES[family]
    blocks = find_blocks(model)
    inside = [
        [name.split(f".{index}.")[1] for name in names if f".{index}." in name] for index in range(len(blocks.modules))
    ]
    wanted = sensitivities(model, names)
    room = sum(8 * len(matrix) ** 2 for matrix in wanted.values())
    measured = {spare: at_once(model, inside, spare=spare) for spare in (room - 1, room)}
    runs = Counter[bool]()
    for spare, sensitivity in measured.items():
        handles = [
            block.register_forward_pre_hook(lambda *_, once=spare == room: runs.update([once])) for block in blocks.modules
        ]
        found = block_by_block(model, names, sensitivity)
        for handle in handles:
            handle.remove()
        assert list(found) == names
        assert all(torch.equal(found[name], wanted[name]) for name in names)
    assert runs == {False: len(blocks.modules) * len(BATCHES)}  # with room for all, no block is run again


def test_made_on_the_way_back_it_refuses_what_it_was_not_told_of() -> None:
    model = tiny_model("llama")
    block, layers = model.model.layers[0], ["mlp.down_proj"]
    sensitivity = at_once(model, [layers] * len(model.model.layers))
    with pytest.raises(ValueError, match="block 1; wanted block 0"):
        sensitivity.of_block(1, block, "block", layers, F64)
    for names, dtype in ((["mlp.up_proj"], F64), (layers, torch.float32)):
        with pytest.raises(ValueError, match="wanted layers and dtype as measured"):
            sensitivity.of_block(0, block, "block", names, dtype)
    assert sensitivity.of_block(0, block, "block", [], F64) == {}  # goes on to the next block


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


def test_a_layer_the_loss_does_not_see_counts_nothing() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    found = sensitivities(model, ["model.layers.1.mlp.up_proj"])
    assert found["model.layers.1.mlp.up_proj"].abs().max() == 0


def test_broken_gradients_are_refused_by_name() -> None:
    """Inputs may be finite where gradients are not: behind the layer something overflows."""
    model = tiny_model("llama")

    def explode(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0 * torch.sqrt(output - output.detach())  # zero, with an infinite slope

    model.model.norm.register_forward_hook(explode)
    plan = plan_of(model)
    with pytest.raises(NumericsError, match=r"gradients of the loss behind model\.layers\.1 .*--no-fisher"):
        run_joint(model, plan, sensitivity=Sensitivity.measure(model, BATCHES))


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_are_the_gradients_that_training_would_follow(family: str) -> None:
    model = tiny_model(family)
    names = FAMILIES[family]
    found = slopes(model, names)
    assert list(found) == names
    model.requires_grad_(True)
    count = sum(len(batch) * (batch.shape[1] - 1) for batch in BATCHES)
    for batch in BATCHES:
        logits = model(input_ids=batch).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        (loss / count).backward()
    for name, steepness in found.items():
        layer = model.get_submodule(name)
        expected = layer.weight.grad if isinstance(layer, nn.Linear) else layer.weight.grad.T
        # logits pass through float32 on their way to the loss
        torch.testing.assert_close(steepness.weight, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        if layer.bias is not None:
            expected = layer.bias.grad
            torch.testing.assert_close(steepness.bias, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_an_expansion_is_sensitivities_and_slopes_wherever_its_sums_wait() -> None:
    model, names = tiny_model("llama"), FAMILIES["llama"]
    inside = [[name.split(f".{index}.")[1] for name in names if f".{index}." in name] for index in range(2)]
    wanted, falls = sensitivities(model, names, seed=5), slopes(model, names)
    room = 8 * sum(part.numel() for name in names for part in (wanted[name], *falls[name]))
    for spare, runs in ((2 * room - 1, 2 * len(BATCHES)), (2 * room, 0)):  # two may wait, one of each half
        residency, seen = Residency(), Counter[bool]()
        residency.spare_bytes = spare
        expansion = Expansion.measure(model, BATCHES, seed=5, names=inside, dtype=F64, residency=residency)
        handles = [
            block.register_forward_pre_hook(lambda *_, seen=seen: seen.update([True])) for block in model.model.layers
        ]
        found = block_by_block(model, names, expansion)
        for handle in handles:
            handle.remove()
        assert seen.total() == runs and list(found) == names
        for name, (sensitivity, slope) in found.items():
            assert torch.equal(sensitivity, wanted[name])
            assert all(torch.equal(ours, other) for ours, other in zip(slope, falls[name], strict=True))
        tokens = sum(batch.numel() for batch in BATCHES)
        assert (expansion.num_labels, expansion.num_following) == (tokens, tokens - sum(map(len, BATCHES)))


def test_batches_change_no_slope() -> None:
    model, names = tiny_model("llama"), FAMILIES["llama"]
    one, many = slopes(model, names, [TOKENS]), slopes(model, names, list(TOKENS.split(1)))
    for name in names:
        for all_at_once, one_by_one in zip(one[name], many[name], strict=True):
            torch.testing.assert_close(all_at_once, one_by_one, rtol=1e-5, atol=1e-6 * float(all_at_once.abs().max()))
