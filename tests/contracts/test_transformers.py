# SPDX-License-Identifier: Apache-2.0
"""What the product takes for granted about transformers."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from models import random_tokens, tiny_model
from torch import nn


FAMILIES = ("gpt2", "bigcode", "codegen", "llama", "qwen2")
METHOD = "lord_contract"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose head is tied, saved in float32."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    tiny_model("llama", torch.float32, tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def calls() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Registers a quantization method, for as long as the test lasts, that notes what its hooks are called with."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    noted: list[tuple[str, dict[str, Any]]] = []

    @auto.register_quantization_config(METHOD)
    class Config(QuantizationConfigMixin):
        def __init__(self, number: int = 0, **kwargs: Any) -> None:
            self.quant_method, self.number = METHOD, number

    @auto.register_quantizer(METHOD)
    class Quantizer(HfQuantizer):
        requires_calibration = False

        def _note(self, hook: str, model: nn.Module, others: dict[str, Any]) -> None:
            devices = {parameter.device.type for parameter in model.parameters()}
            known = {"devices": devices, "pre_quantized": self.pre_quantized, "number": self.quantization_config.number}
            noted.append((hook, others | known))

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            model.model.layers[0].mlp.down_proj = nn.Linear(128, 64, bias=True, device="meta")
            self._note("before", model, kwargs)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            self._note("after", model, kwargs)

        def is_serializable(self, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_qat_trainable(self) -> bool:
            return True

    yield noted
    del auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], auto.AUTO_QUANTIZER_MAPPING[METHOD]


def load(folder: Path, **arguments: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def label(folder: Path, **values: Any) -> None:
    """Writes a quantization method into a folder's configuration."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": METHOD, **values}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_registered_method_rebuilds_the_model_on_meta_before_its_tensors_are_loaded(
    folder: Path, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    """lord_quant/integrations/transformers.py puts low-rank layers in between, and is told files and devices."""
    label(folder, number=7)
    families.edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.down_proj.bias": torch.ones(64)}))
    model = load(folder)
    (first, before), (second, after) = calls
    assert (first, second) == ("before", "after")
    assert before["devices"] == {"meta"} and after["devices"] == {"cpu"}
    assert before["pre_quantized"] and before["number"] == 7
    assert [Path(file).name for file in before["checkpoint_files"]] == ["model.safetensors"] and "device_map" in before
    assert torch.equal(model.model.layers[0].mlp.down_proj.bias, torch.ones(64))


def test_a_configuration_passed_for_a_dense_model_leads_to_the_same_hooks(
    folder: Path, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    """lord_quant/integrations/transformers.py compresses in the second, where the float weights are."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.base import HfQuantizer

    quantizer: Any = AutoHfQuantizer.from_config(known[METHOD](number=3), pre_quantized=False)
    assert isinstance(quantizer, HfQuantizer)
    model = tiny_model("llama", torch.float32)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    quantizer.preprocess_model(model=skeleton, device_map=None, checkpoint_files=None)
    quantizer.postprocess_model(model)
    assert [(hook, seen["pre_quantized"], seen["number"]) for hook, seen in calls] == [
        ("before", False, 3),
        ("after", False, 3),
    ]
    assert model.config.quantization_config.number == 3


def test_a_name_is_registered_once(calls: list[tuple[str, dict[str, Any]]]) -> None:
    """lord_quant/integrations/transformers.py registers when it is imported, which must happen once."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer

    with pytest.raises(ValueError, match="already registered"):
        register_quantizer(METHOD)(AUTO_QUANTIZER_MAPPING[METHOD])


def test_a_configuration_is_saved_with_the_model(folder: Path, calls: list[Any], tmp_path: Path) -> None:
    """lord_quant/checkpoint.py writes a mapping into `model.config.quantization_config` and saves."""
    model = tiny_model("llama", torch.float32)
    model.config.quantization_config = {"quant_method": METHOD, "number": 5, "rank_pattern": {"a.b": 32}}
    model.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == METHOD and written["number"] == 5 and written["rank_pattern"] == {"a.b": 32}
    label(folder, number=5)
    again = load(folder)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["number"] == 5


def test_only_the_mark_of_being_quantized_keeps_a_model_from_being_cast(folder: Path, calls: list[Any]) -> None:
    """lord_quant/integrations/transformers.py takes it off float low-rank models."""
    label(folder)
    model = load(folder)
    with pytest.raises(ValueError, match="half"):
        model.half()
    model.is_quantized = False
    assert model.half().dtype == torch.float16


def test_the_trainer_asks_the_quantizer_whether_all_weights_may_be_trained(folder: Path, calls: list[Any]) -> None:
    """lord_quant/integrations/transformers.py says so in `is_qat_trainable` and `is_trainable`."""
    from transformers.trainer_utils import validate_quantization_for_training

    label(folder)
    model = load(folder)
    validate_quantization_for_training(model)


def test_gptq_classes_hold_what_subclasses_need() -> None:
    """lord_quant/integrations/transformers.py derives from `GPTQConfig` and `GptqHfQuantizer`."""
    from transformers.quantizers.quantizer_gptq import GptqHfQuantizer
    from transformers.utils.quantization_config import GPTQConfig, QuantizationMethod

    from lord_quant.backends.gptq import host

    host()  # quietly, before the quantizer imports it
    values = {"bits": 3, "group_size": 32, "sym": False, "desc_act": True, "damp_percent": 0.02, "true_sequential": False}
    config = GPTQConfig(**values, block_name_to_quantize="h", format="gptq_v2")
    assert {key: config.to_dict()[key] for key in values} == values
    assert config.to_dict_optimum().keys() >= values.keys()
    assert config.get_loading_attributes().keys() >= {"backend"}
    quantizer = GptqHfQuantizer(config, pre_quantized=True)
    inner = quantizer.optimum_quantizer
    assert (inner.bits, inner.group_size, inner.block_name_to_quantize, inner.format) == (3, 32, "h", "gptq_v2")
    assert QuantizationMethod.GPTQ == "gptq"


def test_a_checkpoint_keeps_its_configuration_but_takes_the_callers_kernel(calls: list[Any]) -> None:
    """README.md tells to load with `quantization_config=LordGPTQConfig(bits=4, backend="gptq_torch")`."""
    from transformers.quantizers.auto import AutoHfQuantizer

    from lord_quant import LordGPTQConfig

    stored = {"quant_method": "lord_gptq", "bits": 8, "group_size": 64, "rank_pattern": {}}
    with pytest.warns(UserWarning, match="^You passed `quantization_config`"):  # what lord_quant/silence.py leaves out
        merged = AutoHfQuantizer.merge_quantization_configs(stored, LordGPTQConfig(bits=4, backend="gptq_torch"))
    assert isinstance(merged, LordGPTQConfig)
    assert (merged.bits, merged.group_size, merged.backend) == (8, 64, "gptq_torch")


@pytest.mark.parametrize("family", ["gpt2", "bigcode"])
def test_a_module_marked_as_loaded_is_not_initialised_again(family: str) -> None:
    """lord_quant/integrations/rebuilt.py marks those that hold packed layers, whose weights cannot be drawn."""
    model = tiny_model(family, torch.float32)
    attention = model.transformer.h[0].attn
    before = attention.c_proj.weight.detach().clone()
    attention._is_hf_initialized = True
    model.initialize_weights()
    assert torch.equal(attention.c_proj.weight, before)
    assert not torch.equal(model.transformer.h[1].attn.c_proj.weight, before)


def test_loading_tells_missing_and_mismatched_tensors(folder: Path) -> None:
    """lord_quant/blocks/source.py refuses incomplete models by `output_loading_info`, or it would use random weights."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)

    families.edit_tensors(folder, change)
    _, info = load(folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
    assert set(info["missing_keys"]) == {"model.layers.0.mlp.up_proj.weight"}
    ((name, found, wanted),) = info["mismatched_keys"]
    assert (name, tuple(found), tuple(wanted)) == ("model.layers.1.mlp.up_proj.weight", (3, 5), (128, 64))


def test_pickled_weights_are_not_read_when_safetensors_are_asked_for(folder: Path) -> None:
    """lord_quant/blocks/source.py loads with `use_safetensors=True`."""
    torch.save(families.stored_tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises((OSError, ValueError)):
        load(folder, use_safetensors=True)


def test_one_file_is_preferred_to_an_index(folder: Path) -> None:
    """lord_quant/checkpoint.py reads headers of the files that will be loaded."""
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "none.safetensors"}}')
    load(folder)


def test_the_index_of_several_files_names_every_tensor(saved: Path, tmp_path: Path) -> None:
    """lord_quant/runs/shards.py writes the same, lord_quant/checkpoint.py reads it."""
    model = load(saved)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == families.stored_tensors(saved).keys()
    files = {path.name for path in tmp_path.glob("model-*-of-*.safetensors")}
    assert len(files) > 1 and files == set(index["weight_map"].values())


@pytest.mark.parametrize("config", ['{"model_type": "no such type"}', "{}", "no json"])
def test_an_unreadable_configuration_is_one_of_three_errors(config: str, tmp_path: Path) -> None:
    """lord_quant/blocks/source.py catches OSError, ValueError and KeyError of `AutoConfig`."""
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(config)
    with pytest.raises((OSError, ValueError, KeyError)):
        AutoConfig.from_pretrained(tmp_path)


def test_tied_weights_are_one_tensor_once_tied_and_stored_once(saved: Path) -> None:
    """lord_quant/blocks/residency.py and lord_quant/blocks/source.py know tied tensors by identity."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(saved), dtype=torch.bfloat16)
    skeleton.tie_weights()
    for model in (skeleton, load(saved)):
        state = model.state_dict(keep_vars=True)
        assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
        assert model.config.get_text_config().tie_word_embeddings and model.get_output_embeddings() is model.lm_head
        assert model.base_model is model.model and model.base_model_prefix == "model"
    assert next(skeleton.parameters()).dtype == torch.bfloat16
    assert "lm_head.weight" not in families.stored_tensors(saved)


def test_names_of_causal_and_masked_models_are_known_by_type() -> None:
    """lord_quant/blocks/source.py tells decoders from encoders by the two mappings."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    for model_type, name in {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}.items():
        assert CAUSAL[model_type] == name and model_type not in MASKED
    assert CAUSAL["bert"] == "BertLMHeadModel" and "bert" in MASKED


def test_conv1d_is_where_it_was_and_holds_its_weight_transposed() -> None:
    """lord_quant/targets.py knows it by module and name."""
    from transformers.pytorch_utils import Conv1D

    from lord_quant.targets import dense_weight, is_linear

    layer = Conv1D(5, 3)
    nn.init.normal_(layer.bias)
    assert is_linear(layer) and dense_weight(layer).shape == (5, 3)
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), x @ dense_weight(layer).T + layer.bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_called_as_the_model_calls_them_give_the_models_hidden_states(family: str) -> None:
    """lord_quant/blocks/stream.py captures what the blocks of a list are called with, and runs them one after another."""
    from lord_quant.blocks.stream import block_kinds, capture
    from lord_quant.targets import find_blocks

    model, tokens = tiny_model(family), random_tokens(2, 9)
    blocks = find_blocks(model).modules
    assert len(blocks) == 2
    outputs: list[torch.Tensor] = []
    handle = blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
        handle.remove()
        kinds = block_kinds(model, 2)
        (batch,) = capture(model, blocks, kinds, [tokens])
        for block, kind in zip(blocks, kinds, strict=True):
            batch.hidden = batch.run(block, kind)
    wanted = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    assert torch.equal(batch.hidden, wanted)


def test_kinds_of_blocks_are_listed_by_the_configuration() -> None:
    """lord_quant/blocks/stream.py labels blocks by `layer_types`: blocks of a kind are called with the same mask."""
    assert list(tiny_model("qwen2").config.layer_types) == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_is_not_stored(family: str) -> None:
    """lord_quant/blocks/residency.py fills a skeleton from files that hold its `state_dict`, and keeps what it computed."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    model = tiny_model(family, torch.float32)
    with init_empty_weights():
        skeleton: Any = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, attn_implementation="eager")
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert not [name for name, tensor in skeleton.named_buffers() if tensor.device.type == "meta"]
    with torch.no_grad():
        logits = [each(input_ids=random_tokens(1, 5)).logits for each in (model, skeleton.eval())]
    assert torch.equal(*logits)


def test_a_key_value_cache_goes_on_from_where_it_was() -> None:
    """lord_quant/evaluation/speed.py decodes token by token with `past_key_values`."""
    model, tokens = tiny_model("bigcode"), random_tokens(1, 6)
    with torch.no_grad():
        whole = model(input_ids=tokens).logits[:, -1]
        prompt = model(input_ids=tokens[:, :-1], use_cache=True)
        step = model(input_ids=tokens[:, -1:], past_key_values=prompt.past_key_values, use_cache=True)
    torch.testing.assert_close(step.logits[:, -1], whole)


def test_a_tokenizer_is_read_from_a_folder_and_written_to_one(tmp_path: Path) -> None:
    """lord_quant/blocks/source.py reads it beside the weights, lord_quant/runs/execution.py writes it likewise."""
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(families.TOKENIZER)
    tokenizer.save_pretrained(tmp_path)
    text = "def f(x):\n    return x\n"
    ids = AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"] and tokenizer.decode(ids) == text
    assert len(tokenizer) == families.VOCABULARY
