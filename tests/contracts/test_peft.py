# SPDX-License-Identifier: Apache-2.0
"""What the product takes for granted about peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import random_tokens, tiny_model
from packed_layers import packed_model

from lord_quant.surgery import apply_rank_pattern


@pytest.fixture
def low_rank() -> Any:
    """A tiny Llama with one low-rank layer."""
    model = tiny_model("llama", torch.float32)
    apply_rank_pattern(model, {"model.layers.0.mlp.up_proj": 32}, mean_correction=True)
    return model


def adapted(model: Any, targets: str) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def test_factors_take_adapters_by_name_and_merge_them(low_rank: Any) -> None:
    """lord_quant/modules.py makes factors plain `nn.Linear`, which trains like any other."""
    from peft.tuners.lora import Linear

    tokens = random_tokens(2, 8)
    model = adapted(low_rank, r".*\.(down|up)$")
    assert sum(type(module) is Linear for module in model.modules()) == 2
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_" in name]
    assert len(gradients) == 4 and all(gradient.abs().max() > 0 for gradient in gradients)
    with torch.no_grad():
        adapted_logits = model(input_ids=tokens).logits
        merged = model.merge_and_unload()(input_ids=tokens).logits
    torch.testing.assert_close(merged, adapted_logits, rtol=0, atol=1e-5)


def test_packed_layers_take_adapters_and_refuse_to_merge_them() -> None:
    """lord_quant/integrations/transformers.py and lord_quant/backends/gptq.py call packed models `gptq`."""
    from transformers.utils.quantization_config import QuantizationMethod

    packed, quantizer, _ = packed_model(8, backend="gptq_torch")
    quantizer.post_init_model(packed)
    packed.quantization_method = QuantizationMethod.GPTQ
    x = torch.ones(3, 64)
    plain = packed(x)
    model = adapted(packed, r".*\.(wide|narrow)$")
    outputs = model(x)
    assert not torch.equal(outputs, plain)
    outputs.square().sum().backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_" in name]
    assert len(gradients) == 4 and all(gradient.abs().max() > 0 for gradient in gradients)
    with pytest.raises(ValueError, match="gptq quantized"):
        model.merge_and_unload()
