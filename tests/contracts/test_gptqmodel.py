# SPDX-License-Identifier: Apache-2.0
"""What the product takes for granted about GPTQModel, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_layers import LAYERS, packed_model, random_codes, stored, wanted
from torch import nn

from lord_quant.backends.gptq import host
from lord_quant.config import PACKED_BITS


BITS_AND_SIZES = [(bits, size) for bits in PACKED_BITS for size in (32, 64, 128)]


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_a_packed_layer_holds_four_tensors_of_known_shapes_and_dtypes(bits: int) -> None:
    """lord_quant/backends/gptq.py fills them, lord_quant/artifact/stored.py reads bits and group size off their shapes."""
    model, _, drawn = packed_model(bits)
    for name in LAYERS:
        layer = model.get_submodule(name)
        wanted_tensors = stored(drawn[name], bits)
        state = layer.state_dict()
        assert state.keys() - {"bias"} == wanted_tensors.keys() and ("bias" in state) == name.endswith("wide")
        for part, tensor in wanted_tensors.items():
            assert (state[part].shape, state[part].dtype) == (tensor.shape, tensor.dtype), part
            assert torch.equal(state[part], tensor), part
        assert (layer.bits, layer.group_size) == (bits, 32)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("first_format", [False, True])
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_words_are_streams_of_codes_and_zeros_as_they_are_or_less_one(
    bits: int, first_format: bool, desc_act: bool
) -> None:
    """lord_quant/files/packing.py writes words; lord_quant/artifact/gptq_v1.py stores zeros less one."""
    model, quantizer, drawn = packed_model(bits, backend="gptq_torch", desc_act=desc_act, first_format=first_format)
    quantizer.post_init_model(model)
    for name in LAYERS:
        layer = model.get_submodule(name)
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
        expected = wanted(drawn[name], layer, x)
        difference = (layer(x).double() - expected).abs().max() / expected.abs().max()
        assert difference < 1e-3, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("bits,group_size", BITS_AND_SIZES)
def test_the_chosen_kernel_computes_with_every_legal_group_size(bits: int, group_size: int) -> None:
    """lord_quant/config.py allows these sizes, lord_quant/sizes/ranks.py snaps ranks to multiples of them."""
    quantizer = host().GPTQQuantizer(bits=bits, group_size=group_size, sym=False, format="gptq_v2", act_group_aware=False)
    quantizer.block_name_to_quantize = "block"
    model = nn.ModuleDict({"block": nn.ModuleDict({"layer": nn.Linear(2 * group_size, 96, bias=False)})})
    quantizer.convert_model(model, device_map={"": "cpu"})
    layer: Any = model.get_submodule("block.layer")
    codes = random_codes(96, 2 * group_size, bits, group_size)
    for part, tensor in stored(codes, bits).items():
        setattr(layer, part, tensor)
    layer.optimized = True
    quantizer.post_init_model(model.eval())
    x = torch.randn(3, 2 * group_size, generator=torch.Generator().manual_seed(1))
    expected = wanted(codes, layer, x)
    difference = (layer(x).double() - expected).abs().max() / expected.abs().max()
    assert difference < 0.02, f"{type(layer).__name__}: {difference:.1e}"  # one of them works in bfloat16


def test_a_layer_said_to_be_optimized_is_not_compiled() -> None:
    """lord_quant/backends/gptq.py says so: compiling wants a C++ compiler on the user's machine."""
    import torch._dynamo

    for bits in (4, 8):
        model, quantizer, _ = packed_model(bits)
        quantizer.post_init_model(model)
        before = dict(torch._dynamo.utils.counters["frames"])
        model(torch.ones(1, 64))
        assert dict(torch._dynamo.utils.counters["frames"]) == before


def test_the_torch_kernel_leaves_stored_tensors_alone() -> None:
    """README.md names `gptq_torch` for saving after a forward pass and for training."""
    model, quantizer, _ = packed_model(4, backend="gptq_torch")
    quantizer.post_init_model(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.ones(1, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_packing_without_its_extension_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lord_quant/backends/gptq.py sets the variable in the naive stack."""
    from lord_quant.backends.gptq import PACK_VARIABLE

    for variable in ("TORCH_EXTENSIONS_DIR", "GPTQMODEL_EXT_BUILD_BASE"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv(PACK_VARIABLE, "1")
    model, _, drawn = packed_model(4)
    layer, codes = model.get_submodule(LAYERS[1]), drawn[LAYERS[1]]
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
    linear.weight.copy_(codes.weight())
    layer.pack(linear, codes.scales.float(), codes.zeros.float(), codes.g_idx)
    assert all(torch.equal(layer.state_dict()[part], tensor) for part, tensor in stored(codes, 4).items())
    assert not list(tmp_path.iterdir())
