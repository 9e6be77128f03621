# SPDX-License-Identifier: Apache-2.0
"""Which models are read, from which folders, and which are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch

from lord_quant.blocks.source import build_skeleton, inspect_source, load_model, refuse_unfit, refuse_unready, stream_source
from lord_quant.errors import ModelError


def edit_config(folder: Path, **values: object) -> None:
    """Writes configuration values; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_home_folder_is_expanded_once_and_loads(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder("gpt2"), tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    source = inspect_source("~/model")
    assert source.path == str(tmp_path / "model")
    assert load_model(source, torch.device("cpu")).config.model_type == "gpt2"


@pytest.mark.parametrize("name", ["~/absent", "~nobody-here/model"])
def test_a_missing_home_folder_is_named_as_given(name: str) -> None:
    with pytest.raises(ModelError, match=f"model '{name}': no such folder"):
        inspect_source(name)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_config_without_architectures_is_read_by_its_type(
    family: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder(family), tmp_path / "model")
    edit_config(folder, architectures=None)
    assert inspect_source(str(folder)).config.architectures is None


def config_of(model_type: str, **values: object) -> object:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **values)


ENCODERS = [
    ("bert", {"architectures": ["BertLMHeadModel"]}, "BertLMHeadModel"),
    ("bert", {"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
    ("bert", {}, "BertLMHeadModel"),
    ("roberta", {"architectures": ["RobertaForCausalLM"]}, "RobertaForCausalLM"),
    ("distilbert", {}, "DistilBertConfig"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
]


@pytest.mark.parametrize(("model_type", "values", "name"), ENCODERS)
def test_encoders_and_classifiers_are_refused(model_type: str, values: dict[str, object], name: str) -> None:
    with pytest.raises(ModelError, match=f"model 'm' is {name}; wanted a causal language model.*encoder-only"):
        refuse_unfit("m", config_of(model_type, **values))


@pytest.mark.parametrize("values", [{}, {"architectures": ["BertLMHeadModel"]}])
def test_a_bert_that_decodes_is_a_causal_language_model(values: dict[str, object]) -> None:
    refuse_unfit("m", config_of("bert", is_decoder=True, **values))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_bigcode", "codegen", "qwen3", "starcoder2", "mistral"])
def test_causal_language_models_pass(model_type: str) -> None:
    refuse_unfit("m", config_of(model_type))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_config_without_dtype_has_that_of_the_files(dtype: str, tmp_path: Path) -> None:
    folder = families.save(families.build("llama").to(getattr(torch, dtype)), tmp_path / "model")
    edit_config(folder, dtype=None)
    assert inspect_source(str(folder)).dtype == getattr(torch, dtype)
    assert inspect_source(str(folder), "float16").dtype == torch.float16
    (folder / "model.safetensors").unlink()
    assert inspect_source(str(folder)).dtype == torch.float32  # enough for a plan


def test_models_with_weights_elsewhere_or_adapters_are_refused() -> None:
    import peft

    model = families.build("llama")
    refuse_unready("m", model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(
        ModelError, match=r"model 'm' has adapters, such as at '.*layers\.0\.self_attn\.q_proj'; wanted it after"
    ):
        refuse_unready("m", adapted)
    refuse_unready("m", adapted.merge_and_unload())
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ModelError, match=r"3 weights are offloaded, such as 'model\.layers\.1\.mlp\.gate_proj\.weight'"):
        refuse_unready("m", model)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_generation_settings_that_cannot_be_read_are_refused(text: str, tmp_path: Path) -> None:
    source = inspect_source(str(families.save(families.build("llama"), tmp_path / "model")))
    (tmp_path / "model" / "generation_config.json").write_text(text)
    for read in (load_model, stream_source):
        with pytest.raises(ModelError, match=r"model '.*': generation_config\.json cannot be read"):
            read(source, torch.device("cpu"))


def test_no_code_is_named_beside_what_is_written(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """transformers' own class ran; with `trust_remote_code` the names would be looked for beside the new weights."""
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    source = inspect_source(str(folder))
    for model in (build_skeleton(source), load_model(source, torch.device("cpu"))):
        assert "auto_map" not in model.config.to_dict()
