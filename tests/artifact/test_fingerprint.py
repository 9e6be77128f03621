# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: the streamed one is the whole model's, differences have their closed form, what is written reads back."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model

from lord_quant.artifact.fingerprint import Fingerprint, Passenger, fingerprint_of
from lord_quant.errors import CheckpointError, NumericsError
from lord_quant.targets import find_blocks


@pytest.mark.parametrize("family", ["llama", "gpt2", "codegen", "gemma2"])
def test_tokens_that_go_block_by_block_say_what_the_whole_model_says(family: str) -> None:
    model = tiny_model(family, torch.float32)
    first, second = Passenger(model), Passenger(model)
    count = len(find_blocks(model).modules)
    first.through(0)
    second.restore(first.state())  # another run goes on from there
    for index in range(1, count):
        second.through(index)
    whole, streamed = fingerprint_of(model), second.arrive()
    assert whole.tokens == streamed.tokens and len(whole.tokens) == 16 and len(whole.places) == 64
    torch.testing.assert_close(streamed.logits, whole.logits, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole.tokens])).logits[0]
    assert torch.equal(whole.logits, logits[:, whole.places])
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_another_model_has_another_fingerprint_and_one_that_is_not_finite_has_none() -> None:
    model = tiny_model("llama", torch.float32)
    before = fingerprint_of(model)
    assert before.difference(fingerprint_of(model)) == 0
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    assert before.difference(fingerprint_of(model)) > 0.3
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(NumericsError, match=r"logits of the compressed model on fixed tokens: 1552 of 1552 values"):
        fingerprint_of(model)


def test_differences_are_shares_of_the_spread() -> None:
    one = Fingerprint([1], [0, 1], torch.tensor([[3.0, -3.0]]))
    assert one.difference(one._replace(logits=torch.tensor([[3.0, 0.0]]))) == pytest.approx(3 / 18**0.5)
    assert one.difference(one._replace(tokens=[2])) == float("inf")
    flat = one._replace(logits=torch.tensor([[7.0, 7.0]]))
    assert flat.difference(flat) == 0 and flat.difference(one) == float("inf")


def test_what_is_written_reads_back_to_seven_digits() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 1e4
    whole = Fingerprint([1, 2, 3], [0, 1, 2, 3, 4], logits)
    again = Fingerprint.from_dict(whole.to_dict())
    assert again[:2] == whole[:2]
    torch.testing.assert_close(again.logits, logits, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "changes", [{"logits": ["1 2"]}, {"logits": "1 2"}, {"logits": ["a b", "c d"]}, {"tokens": None}, {"places": ["x"]}]
)
def test_what_is_no_fingerprint_is_refused(changes: dict[str, object]) -> None:
    values = {"tokens": [1, 2], "places": [0, 1], "logits": ["1 2", "3 4"]}
    assert Fingerprint.from_dict(values).logits.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(CheckpointError, match="a fingerprint of logits"):
        Fingerprint.from_dict(values | changes)
