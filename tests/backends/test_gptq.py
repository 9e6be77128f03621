# SPDX-License-Identifier: Apache-2.0
"""The host's solver as a function, and its packer on given codes."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import nn

from lord_quant.backends.gptq import PACK_VARIABLE, make_quantizer, make_solver, pack_model
from lord_quant.config import GptqConfig
from lord_quant.errors import NumericsError
from lord_quant.refine import Quantized


GROUP = 32


def layer_of(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs of uneven loudness."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6 * n, n, generator=generator) @ torch.randn(n, n, generator=generator) / n**0.5
    x *= torch.logspace(-0.5, 0.5, n)[torch.randperm(n, generator=generator)]
    return torch.randn(m, n, generator=generator), x.T @ x / len(x)


def lost(found: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (found - weight).double()
    return float(((error @ hessian.double()) * error).sum())


def to_nearest(weight: torch.Tensor, solved: Quantized) -> torch.Tensor:
    """Round to nearest on the solver's own grid."""
    groups = solved.g_idx.long()
    scales, zeros = solved.scales[:, groups], solved.zeros[:, groups]
    return scales * ((weight / scales + zeros).round().clamp(0, 2**solved.bits - 1) - zeros)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_solver_beats_rounding_and_stays_on_its_grid(bits: int, desc_act: bool, sym: bool) -> None:
    gptq = GptqConfig(bits=bits, sym=sym, desc_act=desc_act)
    weight, hessian = layer_of(64, 96)
    before = weight.clone(), hessian.clone()
    solved = make_solver(gptq, GROUP, 576)(weight, hessian)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    assert solved.codes.shape == (64, 96) and solved.scales.shape == solved.zeros.shape == (64, 3)
    assert solved.g_idx.shape == (96,) and torch.equal(solved.g_idx.long().bincount(), torch.full((3,), 32))
    assert torch.equal(solved.g_idx.sort().values, solved.g_idx) == (not desc_act)
    assert solved.bits == bits and solved.loss is not None and solved.loss >= 0 and solved.seconds > 0
    assert solved.damp_percent == gptq.damp_percent
    for tensor in (solved.codes, solved.zeros):
        assert torch.equal(tensor, tensor.round()) and tensor.min() >= 0 and tensor.max() <= 2**bits - 1
    assert not sym or (solved.zeros == 2 ** (bits - 1)).all()
    assert torch.equal(solved.scales, solved.scales.half().float()) and (solved.scales > 0).all()
    reached = lost(solved.weight(), weight, hessian)
    assert reached < 0.9 * lost(to_nearest(weight, solved), weight, hessian)
    assert reached < lost(torch.zeros_like(weight), weight, hessian)


def test_asymmetric_grids_and_searched_scales_are_better() -> None:
    """With a Hessian that asks for nothing but small errors, which is all that the search for scales minimises."""
    weight, identity = layer_of(64, 64)[0], torch.eye(64)

    def error(**settings: Any) -> float:
        return lost(make_solver(GptqConfig(bits=3, **settings), GROUP, 576)(weight, identity).weight(), weight, identity)

    assert error(sym=False) < 0.95 * error(sym=True)
    assert error(mse=2.0) < 0.95 * error(mse=0.0)


def test_a_factor_in_the_hessian_and_the_count_of_tokens_change_nothing_but_the_loss() -> None:
    weight, hessian = layer_of(32, 64)
    one = make_solver(GptqConfig(), GROUP, 100)(weight, hessian)
    other = make_solver(GptqConfig(), GROUP, 7)(weight, 4 * hessian)
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("kind", ["zero", "dead channels", "singular"])
def test_the_solver_survives_singular_hessians(kind: str) -> None:
    weight, hessian = layer_of(32, 64)
    if kind == "zero":
        hessian.zero_()
    elif kind == "dead channels":
        hessian[::3] = 0
        hessian[:, ::3] = 0
    else:
        hessian = hessian[:, :4] @ torch.linalg.inv(hessian[:4, :4]) @ hessian[:4]
    solved = make_solver(GptqConfig(), GROUP, 100)(weight, hessian)
    assert torch.isfinite(solved.weight()).all()
    assert lost(solved.weight(), weight, hessian) <= 0.05 * lost(torch.zeros_like(weight), weight, hessian)


def test_groups_of_zeros_and_of_next_to_nothing_stay_finite() -> None:
    weight, hessian = layer_of(32, 64)
    hessian = torch.block_diag(hessian[:32, :32], hessian[32:, 32:])  # no errors come over from the other group
    weight[:, :32], weight[3, 32:] = 0, 1e-12
    solved = make_solver(GptqConfig(), GROUP, 100)(weight, hessian)
    assert (solved.scales > 0).all() and torch.isfinite(solved.weight()).all()
    assert not solved.weight()[:, :32].any() and solved.weight()[3].abs().max() < 1e-3


def test_weights_beyond_float16_scales_are_an_error() -> None:
    weight, hessian = layer_of(32, 64)
    with pytest.raises(NumericsError, match="scales stored as float16"):
        make_solver(GptqConfig(), GROUP, 100)(weight * 1e7, hessian)


class Model(nn.Module):
    """Two layers to be packed, with and without bias, and one to be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 32)
        self.config = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


def solved_model(bits: int, desc_act: bool = False) -> tuple[Model, dict[str, Quantized]]:
    torch.manual_seed(0)
    model, gptq = Model().eval(), GptqConfig(bits=bits, desc_act=desc_act)
    quantized = {}
    for seed, name in enumerate(("first", "second")):
        layer = getattr(model, name)
        hessian = layer_of(4, layer.in_features, seed)[1]
        quantized[name] = make_solver(gptq, GROUP, 100)(layer.weight.detach(), hessian)
    return model, quantized


def pack(model: Model, quantized: dict[str, Quantized], bits: int) -> Any:
    quantizer = make_quantizer(bits=bits, dataset=None, group_size=GROUP, sym=False)
    return pack_model(model, quantizer, quantized)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [False, True])
def test_a_packed_layer_computes_with_the_given_codes(bits: int, desc_act: bool) -> None:
    model, quantized = solved_model(bits, desc_act)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, item in quantized.items():
            getattr(reference, name).weight.copy_(item.weight())
    before = os.environ.get(PACK_VARIABLE)
    records = pack(model, quantized, bits)
    assert os.environ.get(PACK_VARIABLE) == before
    assert [record.name for record in records] == list(quantized)
    assert [(record.loss, record.damp_percent) for record in records] == [
        (item.loss, item.damp_percent) for item in quantized.values()
    ]
    assert type(model.head) is nn.Linear and not model.training
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, inputs in (("first", x), ("second", reference.first(x))):
            layer, item = getattr(model, name), quantized[name]
            assert torch.equal(layer.g_idx.cpu(), item.g_idx)
            assert layer.scales.dtype == torch.float16 and torch.equal(layer.scales.float().T, item.scales)
            expected = getattr(reference, name)(inputs)
            # The kernel of some widths works in bfloat16.
            torch.testing.assert_close(layer(inputs).float(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_the_packers_codes_are_the_given_ones() -> None:
    """Unpacked by hand from the words of the checkpoint format: 8 codes of 4 bits in an int32, along the inputs."""
    model, quantized = solved_model(4)
    pack(model, quantized, 4)
    for name, item in quantized.items():
        state = getattr(model, name).state_dict()
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        codes = (state["qweight"][:, None] >> shifts[:, None]) & 15
        assert torch.equal(codes.reshape(-1, codes.shape[-1]).T.float(), item.codes)
        zeros = (state["qzeros"][..., None] >> shifts) & 15
        assert torch.equal(zeros.reshape(len(zeros), -1).T.float(), item.zeros)
        assert ("bias" in state) == (name == "first")


def test_a_bias_beyond_float16_is_named() -> None:
    model, quantized = solved_model(4)
    with torch.no_grad():
        model.first.bias.fill_(1e6)
    with pytest.raises(NumericsError, match="bias of layer 'first' after quantization"):
        pack(model, quantized, 4)
