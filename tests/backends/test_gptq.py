# SPDX-License-Identifier: Apache-2.0
"""The host's packer on given codes."""

from __future__ import annotations

import copy
import os
import subprocess
import textwrap
from typing import Any

import pytest
import torch
from layer_problems import layer_of
from torch import nn

from lord_quant.backends.gptq import PACK_VARIABLE, make_quantizer, pack_model, replace_by_packed, require_savable
from lord_quant.config import GptqConfig
from lord_quant.errors import CheckpointError, HostError, NumericsError
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.solver import Gptq
from lord_quant.sizes.layer_bytes import Packing


GROUP = 32


class Model(nn.Module):
    """Two layers to be packed, with and without bias, and one to be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 32)
        self.config = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


def solved_model(bits: int, desc_act: bool = False, **packings: Packing) -> tuple[Model, dict[str, Quantized]]:
    """A model and its layers solved alike, but for those of `packings`."""
    torch.manual_seed(0)
    model, quantized = Model().eval(), {}
    for seed, name in enumerate(("first", "second")):
        layer = getattr(model, name)
        own, size = packings.get(name, (bits, GROUP))
        hessian = layer_of(4, layer.in_features, seed)[1]
        solver = Gptq(GptqConfig(bits=own, desc_act=desc_act), size, 100)
        quantized[name] = solver(layer.weight.detach(), hessian)
    return model, quantized


def pack(model: Model, quantized: dict[str, Quantized], bits: int, **packings: Packing) -> Any:
    """Packs all layers alike, but for those of `packings`."""
    quantizer = make_quantizer(bits=bits, dataset=None, group_size=GROUP, sym=False)
    return pack_model(model, quantizer, quantized, dict.fromkeys(quantized, Packing(bits, GROUP)) | packings)


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
    require_computes_like(reference, model, quantized)


PACKINGS = [Packing(bits, size) for bits in (2, 3, 4, 8) for size in (32, 64)]


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("first", PACKINGS)
@pytest.mark.parametrize("second", [Packing(bits, 32) for bits in (2, 3, 4, 8)])  # 64 does not divide its 96 inputs
def test_every_layer_is_packed_with_its_own_bits_and_group_size(first: Packing, second: Packing, desc_act: bool) -> None:
    own = {"first": first, "second": second}
    model, quantized = solved_model(4, desc_act, **own)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, item in quantized.items():
            getattr(reference, name).weight.copy_(item.weight())
    quantizer = make_quantizer(bits=4, dataset=None, group_size=128, sym=False)
    assert [record.name for record in pack_model(model, quantizer, quantized, own)] == ["first", "second"]
    assert (quantizer.bits, quantizer.group_size) == (4, 128)
    for name, (bits, size) in own.items():
        layer = getattr(model, name)
        assert (layer.bits, layer.group_size) == (bits, size)
        assert layer.scales.shape == (layer.in_features // size, layer.out_features)
    assert type(model.head) is nn.Linear
    require_computes_like(reference, model, quantized)


def require_computes_like(reference: Model, model: Any, quantized: dict[str, Quantized]) -> None:
    """Fails unless packed layers compute what layers with their weights in float do, from the same inputs."""
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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [False, True])
def test_packed_tensors_are_those_of_the_hosts_own_packer(
    bits: int, desc_act: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQMODEL_DISABLE_PACK_EXT", "1")  # it would first compile one
    model, quantized = solved_model(bits, desc_act)
    dense = copy.deepcopy(model)
    pack(model, quantized, bits)
    quantizer = make_quantizer(bits=bits, dataset=None, group_size=GROUP, sym=False)
    quantizer.format = "gptq_v2"
    theirs = copy.deepcopy(dense)
    layers = replace_by_packed(theirs, quantizer, dict.fromkeys(quantized, Packing(bits, GROUP)), {"": "cpu"}, pack=True)
    for name, item in quantized.items():
        linear = getattr(dense, name).requires_grad_(False)
        linear.weight.copy_(item.weight())
        layers[name].pack(linear, item.scales, item.zeros, item.g_idx)
        wanted, found = layers[name].state_dict(), getattr(model, name).state_dict()
        assert wanted.keys() == found.keys()
        for part, tensor in wanted.items():
            assert tensor.dtype == found[part].dtype and torch.equal(tensor, found[part]), part


def test_importing_the_host_keeps_nobody_that_asked_for_it(python: list[str]) -> None:
    """The host's modules keep errors of optional imports, whose tracebacks would hold the frames of all callers."""
    program = """
        import gc, weakref
        from lord_quant.backends.gptq import host

        class Model:
            pass

        def called_deep_inside():
            model = Model()
            host()
            return weakref.ref(model)

        alive = called_deep_inside()
        gc.collect()
        assert alive() is None, "the model of whoever imported the host first is still there"
    """
    subprocess.run([*python, "-c", textwrap.dedent(program)], check=True)


@pytest.mark.parametrize("rewritten", ["class", "parameter", "shape"])
def test_layers_of_kernels_that_rewrite_their_weights_are_not_saved(rewritten: str) -> None:
    """Those of GPUs do it as they are loaded, some in place: neither dtype nor shape tells."""
    from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear

    model, quantized = solved_model(4)
    pack(model, quantized, 4)
    require_savable(model)
    layer: Any = model.second
    if rewritten == "class":
        layer.__class__ = ExllamaV2Linear
    else:
        codes = layer._buffers.pop("qweight")
        own = nn.Parameter(codes, requires_grad=False) if rewritten == "parameter" else codes.T.contiguous()
        (layer.register_parameter if rewritten == "parameter" else layer.register_buffer)("qweight", own)
    with pytest.raises(CheckpointError, match=r"1 packed layers, such as 'second', hold weights as their kernel rewrote"):
        require_savable(model)


def test_layers_that_the_host_does_not_replace_are_noticed() -> None:
    wanted = {"first": Packing(4, 32), "second": Packing(8, 32), "nowhere": Packing(8, 32)}
    quantizer = make_quantizer(bits=4, dataset=None, group_size=GROUP, sym=False)
    with pytest.raises(HostError, match="made 2 packed layers; wanted 3"):
        replace_by_packed(Model(), quantizer, wanted, {"": "cpu"})


def test_layers_of_a_sequential_are_replaced() -> None:
    model = nn.Module()
    model.inner = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Sequential(nn.Linear(96, 64, bias=False)))
    wanted = {"inner.0": Packing(4, 32), "inner.2.0": Packing(8, 32)}
    quantizer = make_quantizer(bits=4, dataset=None, group_size=GROUP, sym=False)
    packed = replace_by_packed(model, quantizer, wanted, {"": "cpu"})
    assert {name: (layer.bits, layer.bias is not None) for name, layer in packed.items()} == {
        "inner.0": (4, True),
        "inner.2.0": (8, False),
    }
    assert model.get_submodule("inner.2.0") is packed["inner.2.0"]


def test_a_bias_beyond_float16_is_named() -> None:
    model, quantized = solved_model(4)
    with torch.no_grad():
        model.first.bias.fill_(1e6)
    with pytest.raises(NumericsError, match="bias of layer 'first' after quantization"):
        pack(model, quantized, 4)
