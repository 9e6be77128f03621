# SPDX-License-Identifier: Apache-2.0
"""Gradients taken block by block: in what order, of what, and what they leave behind."""

from __future__ import annotations

import pytest
import torch
from model_runs import BATCHES, require_hooks_to_survive
from models import tiny_model
from torch import nn

from lord_quant.blocks import gradients
from lord_quant.blocks.gradients import UNLABELLED, BlockGradients, Labels, Rows, Visit, _calls, visit
from lord_quant.blocks.stream import block_kinds
from lord_quant.targets import find_blocks


def nothing(number: int, logits: torch.Tensor) -> torch.Tensor:
    """No token has a label."""
    return torch.full((len(logits),), UNLABELLED)


def zeroes(number: int, logits: torch.Tensor) -> torch.Tensor:
    """The first word of the vocabulary, but for the first token of each batch."""
    labels = torch.zeros(len(logits), dtype=torch.long)
    labels[0] = UNLABELLED
    return labels


def went_through(model: nn.Module) -> BlockGradients:
    """Goes through all blocks of a llama, the queries and the last layer of each being looked at."""
    measured = BlockGradients.measure(model, BATCHES, [zeroes], "test")
    blocks = model.model.layers
    for index, (block, kind) in enumerate(zip(blocks, block_kinds(model, len(blocks)), strict=True)):
        assert all(list(batch) == ["self_attn.q_proj", "mlp.down_proj"] for batch in measured.through(
            index, block, kind, ["self_attn.q_proj", "mlp.down_proj"]
        ))  # fmt: skip
    return measured


@pytest.mark.parametrize("failure", [None, "first block"])
def test_the_model_is_left_as_it_was(failure: str | None) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    require_hooks_to_survive(model, failure, lambda: went_through(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
        assert parameter.requires_grad == (name != "model.norm.weight")


def test_a_block_that_changes_an_output_in_place_is_seen_before_that() -> None:
    """As OLMo clamps its queries: what is clamped does not matter to the loss."""
    block = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with _calls(block, ["q_proj"]) as calls:
        y = block["q_proj"](x).clamp_(-1e-9, 1e-9)
    (gradient,) = torch.autograd.grad(y.sum(), calls["q_proj"][1])
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("family", ["llama", "bigcode", "qwen2"])
@pytest.mark.parametrize("at_once", [False, True])
def test_two_losses_that_share_the_way_are_each_what_it_is_alone(family: str, at_once: bool) -> None:
    model = tiny_model(family)
    blocks = find_blocks(model).modules
    kinds, names = block_kinds(model, len(blocks)), ["mlp.down_proj", "mlp.c_fc", "attn.c_attn", "self_attn.q_proj"]
    own = [[name for name in names if name in dict(block.named_modules())] for block in blocks]

    def words(number: int, logits: torch.Tensor) -> torch.Tensor:
        return (torch.arange(len(logits)) + number) % logits.shape[-1]

    def gone_through(losses: list[Labels]) -> tuple[dict[int, list[dict[str, Rows]]], tuple[int, ...]]:
        if at_once:
            seen: dict[int, list[dict[str, Rows]]] = {}
            counts = visit(model, BATCHES, losses, "test", Visit(own, lambda at, rows: seen.update({at: list(rows)})))
            return seen, counts
        measured = BlockGradients.measure(model, BATCHES, losses, "test")
        turns = enumerate(zip(blocks, kinds, own, strict=True))
        return {at: list(measured.through(at, *each)) for at, each in turns}, measured.num_labels

    both, counts = gone_through([zeroes, words])
    for place, loss in enumerate((zeroes, words)):
        alone, (count,) = gone_through([loss])
        assert counts[place] == count > 0
        for index in range(len(blocks)):
            for together, apart in zip(both[index], alone[index], strict=True):
                assert set(together) == set(apart) == set(own[index]) != set()
                for name, rows in apart.items():
                    assert torch.equal(together[name].inputs, rows.inputs)
                    assert torch.equal(together[name].gradients[place], rows.gradients[0]) and rows.gradients[0].any()


def test_blocks_are_asked_for_in_order_and_once() -> None:
    model = tiny_model("llama")
    measured = BlockGradients.measure(model, BATCHES, [nothing], "test")
    blocks = model.model.layers
    with pytest.raises(ValueError, match="block 1; wanted block 0"):
        list(measured.through(1, blocks[1], "block", []))
    list(measured.through(0, blocks[0], "block", []))
    with pytest.raises(ValueError, match="block 0; wanted block 1"):
        list(measured.through(0, blocks[0], "block", []))


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_gradient_of_the_loss_is_the_one_autograd_finds(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "ROWS", rows)
    logits = torch.randn(20, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.randint(0, 11, (20,), generator=torch.Generator().manual_seed(1))
    labels[[3, 19]] = UNLABELLED
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=UNLABELLED)
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradients.loss_gradient(logits.detach(), labels), expected)


def test_labels_are_counted_and_those_that_are_missing_move_nothing() -> None:
    model = tiny_model("llama")
    assert went_through(model).num_labels == (sum(batch.numel() - 1 for batch in BATCHES),)
    silent = BlockGradients.measure(model, BATCHES, [nothing], "test")
    found = next(silent.through(0, model.model.layers[0], "block", ["mlp.down_proj"]))["mlp.down_proj"]
    assert silent.num_labels == (0,) and not found.gradients[0].any() and found.inputs.any()
