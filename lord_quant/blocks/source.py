# SPDX-License-Identifier: Apache-2.0
"""The dense model a run starts from: what it is, whether it can be compressed, its skeleton, its weights.

Everything but `load_model` reads only JSON and safetensors headers, so a bad model is refused in seconds.
"""

from __future__ import annotations

import copy
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lord_quant.blocks.residency import Streamed
from lord_quant.errors import CheckpointError, ConfigError, LayoutError, ModelError
from lord_quant.files.headers import FLOATS, read_headers, weight_files
from lord_quant.files.places import stored_apart
from lord_quant.files.reading import denied
from lord_quant.linalg import require_finite
from lord_quant.silence import hush


if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")
MULTIMODAL_KEYS = ("vision_config", "audio_config", "text_config", "speech_config")
logger = logging.getLogger(__name__)

ALIGNMENT = 64
"""Bytes to a multiple of which torch aligns what it allocates."""
MOST_BLOCKS = 2**12
"""Ten times those of the deepest models; a skeleton of millions would take hours to build."""


class Source(NamedTuple):
    """A model that may be compressed.

    Attributes:
        path: Folder, with ``~`` expanded, or hub name.
        config: Its configuration.
        tokenizer: Its tokenizer.
        dtype: dtype in which float tensors will be stored.
        context: Longest input in tokens.
    """

    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    context: int


def inspect_source(path: str, dtype: str = "auto") -> Source:
    """Reads configuration and tokenizer, and refuses what cannot be compressed.

    Args:
        path: Folder or hub name of a dense causal language model.
        dtype: Stored dtype, or `auto` for the model's own.

    Raises:
        ModelError: Unknown path, not a causal language model, already quantized or decomposed, or no tokenizer.
    """
    path, config = read_config(path)
    refuse_unfit(path, config)
    folder = Path(path)
    if folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise ModelError(f"model {path!r} holds *.bin weights only; wanted *.safetensors: pickled weights are not read")
    stored = getattr(config, "dtype", None) or _stored_dtype(path)
    chosen = stored if dtype == "auto" else getattr(torch, dtype)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ModelError(f"model {path!r}: config.json says dtype {chosen}; wanted floats")
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048
    if not isinstance(context, int) or context < 1:
        raise ModelError(f"model {path!r}: config.json says a context of {context!r}; wanted a number of tokens")
    return Source(path, config, _load_tokenizer(path), chosen, context)


def _stored_dtype(path: str) -> torch.dtype:
    """Returns the dtype of a model whose configuration names none: that of the first floats in its files, as transformers.

    Where there are no files, which a plan does not need, it is float32.
    """
    with suppress(ModelError, CheckpointError):
        for file in local_files(path):
            for _, dtype, _ in read_headers([file]).values():
                if dtype in FLOATS:
                    return FLOATS[dtype]
    return torch.float32


def read_config(path: str, revision: str | None = None) -> tuple[str, PretrainedConfig]:
    """Reads a model's configuration, of a hub model perhaps at a commit; returns it behind the path with ``~`` expanded.

    Raises:
        ModelError: There is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    expanded = os.path.expanduser(path)
    if looks_like_path(path) and not os.path.isfile(os.path.join(expanded, "config.json")):
        found = "no such folder"
        if os.path.isdir(expanded):
            found = denied(os.path.join(expanded, "config.json")) or "holds no config.json"
        raise ModelError(f"model {path!r}: {found}; wanted a folder with config.json, or a hub name")
    if os.path.exists(expanded):
        path = expanded
    try:
        return path, AutoConfig.from_pretrained(path, revision=revision)
    except Exception as error:  # configurations check themselves, or stumble over values nobody thought of
        what = "config.json " if os.path.isdir(path) else "there is no such folder, and as a hub name it "
        raise ModelError(f"model {path!r}: {what}cannot be read: {_first_line(error)}") from error


def looks_like_path(name: str) -> bool:
    """Tells whether a model name is meant as a local folder: it exists, or no hub name is written like that."""
    return os.path.exists(os.path.expanduser(name)) or name.startswith((".", "/", "~")) or name.count("/") > 1


def build_skeleton(source: Source) -> PreTrainedModel:
    """Builds the model on the meta device: shapes and names without weights.

    Embedding and head are not tied where the files hold different ones, as in transformers: the configuration is wrong
    then, and the skeleton's says so.

    Raises:
        ModelError: The configuration makes no model, or other tensors are tied than the files know of.
    """
    model = _tied_skeleton(source, source.config)
    try:
        files = local_files(source.path, fetch=False)
    except ModelError:
        return model  # a plan needs no weights
    if stored_apart(model, files) is None:
        return model
    config = copy.deepcopy(source.config)
    config.get_text_config().tie_word_embeddings = False
    model = _tied_skeleton(source, config)
    apart = stored_apart(model, files)
    if apart is not None:
        raise ModelError(f"model {source.path!r}: its files hold {' and '.join(apart)} apart; the architecture ties them")
    logger.info("config.json of %r ties embedding and head, but its files hold two: they stay two", source.path)
    return model


def _tied_skeleton(source: Source, config: PretrainedConfig) -> PreTrainedModel:
    model = skeleton_of(config, source.path, dtype=source.dtype)
    model.tie_weights()
    return model


def skeleton_of(config: PretrainedConfig, path: str, **settings: Any) -> PreTrainedModel:
    """Builds the model of a configuration on the meta device.

    Raises:
        ModelError: The configuration makes no model, or one without end.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    blocks = getattr(config, "num_hidden_layers", None)
    if isinstance(blocks, int) and blocks > MOST_BLOCKS:
        raise ModelError(f"model {path!r}: config.json says {blocks} layers; wanted at most {MOST_BLOCKS}")
    try:
        with init_empty_weights():
            return without_code(AutoModelForCausalLM.from_config(config, **settings))
    except Exception as error:  # a division by a number of heads that is zero, say
        raise ModelError(f"model {path!r}: config.json makes no model: {_first_line(error)}") from error


def load_model(source: Source, device: torch.device) -> PreTrainedModel:
    """Loads the weights: in float32 on the CPU, in the stored dtype elsewhere; then checks that they are finite.

    Raises:
        ModelError: The weights are missing, incomplete or not safetensors.
        NumericsError: A weight holds NaN or inf (the first is named).
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if device.type == "cpu" else source.dtype
    _generation_config(source.path)
    if os.path.isdir(source.path):
        local_files(source.path)  # what an index may name
    try:
        with hush("transformers"):  # what its load report says is raised below
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.path, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {source.path!r} cannot be loaded: {_first_line(error)}") from error
    model, info = loaded
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise ModelError(
            f"model {source.path!r}: {len(info['mismatched_keys'])} tensors have other shapes than config.json says, such "
            f"as {name!r}: {tuple(found)}, wanted {tuple(wanted)}"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(f"model {source.path!r}: {len(missing)} tensors are missing, such as {missing[0]!r}")
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is not model.get_input_embeddings().weight:  # whatever config.json says
        model.config.get_text_config().tie_word_embeddings = False
    own_memory(without_code(model))
    for name, parameter in model.named_parameters():
        require_finite(parameter.detach(), f"weight {name!r} of {source.path!r}")
    return model.to(device).eval()


def without_code(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a configuration name no code beside it: what ran is transformers' own, and no other is written."""
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map
    return model


def own_memory(model: PreTrainedModel) -> None:
    """Gives parameters that lie in a file mapped into memory some of their own, aligned as that of any tensor.

    Products may be rounded by alignment (`kept.read_tensors`), and compressing must not depend on how a model was loaded.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def stream_source(source: Source, device: torch.device) -> tuple[PreTrainedModel, Streamed] | None:
    """Returns the model without its blocks' weights and what fills them; None where its files name them otherwise.

    Weights will be in float32 on the CPU, in the stored dtype elsewhere.

    Raises:
        ModelError: There are no files, or one cannot be read.
        NumericsError: A weight outside the blocks holds NaN or inf.
    """
    files, model = local_files(source.path), build_skeleton(source).eval()
    own, dtype = _generation_config(source.path), torch.float32 if device.type == "cpu" else source.dtype
    if own is not None:
        model.generation_config = own
    try:
        return model, Streamed(model, files, dtype, device, stored=source.dtype)
    except LayoutError as error:
        logger.info("the whole model will be loaded: %s", error)
        return None


def _generation_config(path: str) -> GenerationConfig | None:
    """Reads how a model generates; None where it does not say, and its configuration implies it.

    Raises:
        ModelError: It says something that cannot be read.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as error:  # a list where names belong, say
        if isinstance(error, OSError) and not os.path.isfile(os.path.join(path, "generation_config.json")):
            return None
        raise ModelError(f"model {path!r}: generation_config.json cannot be read: {_first_line(error)}") from error


def local_files(path: str, *, fetch: bool = True) -> list[str]:
    """Returns the safetensors files of a folder or of a hub name, fetched if they are not there yet and may be.

    Raises:
        ModelError: There is none, or the hub cannot be reached.
    """
    if Path(path).is_dir():
        folder = path
    else:
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                path,
                allow_patterns=["*.safetensors", "*.safetensors.index.json"],
                ignore_patterns=["*/*", "consolidated*"],  # the same weights once more, in another library's names
                local_files_only=not fetch,
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"model {path!r} cannot be loaded: {_first_line(error)}") from error
    try:
        return weight_files(folder)
    except CheckpointError as error:
        raise ModelError(f"model {path!r} cannot be loaded: {error}") from error


def choose_device(name: str) -> torch.device:
    """Resolves `auto` to CUDA when there is one.

    Raises:
        ConfigError: The device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # the meta device has no values
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} is not available: {_first_line(error)}; wanted 'auto' or 'cpu'") from error
    return device


def refuse_unfit(path: str, config: Any) -> None:
    """Refuses a model that cannot be compressed, by its configuration alone.

    Args:
        path: Folder or hub name, for the message.
        config: Its transformers configuration.

    Raises:
        ModelError: Already quantized or decomposed, an encoder, an encoder-decoder, multimodal or a classifier.
    """
    if getattr(config, "quantization_config", None):
        quantization = config.quantization_config
        known = isinstance(quantization, dict)
        method = quantization.get("quant_method") if known else getattr(quantization, "quant_method", quantization)
        raise ModelError(f"model {path!r} is already compressed ({method}); wanted the dense model it was made from")
    architecture = _architecture(config)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {path!r} is an encoder-decoder ({architecture}); wanted a causal language model")
    multimodal = [key for key in MULTIMODAL_KEYS if hasattr(config, key)]
    if multimodal:
        raise ModelError(f"model {path!r} is multimodal ({architecture}, {multimodal[0]}); wanted a text-only model")
    if not architecture.endswith(CAUSAL_SUFFIXES) or _is_encoder(config):
        raise ModelError(
            f"model {path!r} is {architecture}; wanted a causal language model (…ForCausalLM): encoder-only models "
            "and classifiers cannot be compressed"
        )


def refuse_unready(path: str, model: torch.nn.Module) -> None:
    """Refuses a loaded model whose weights are not all in memory, or not its own alone.

    Args:
        path: Folder or hub name, for the message.
        model: The model.

    Raises:
        ModelError: Weights are offloaded, or it has adapters.
    """
    away = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if away:
        raise ModelError(f"model {path!r}: {len(away)} weights are offloaded, such as {away[0]!r}; wanted all in memory")
    adapted = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]  # peft's word for it
    if adapted:
        raise ModelError(f"model {path!r} has adapters, such as at {adapted[0]!r}; wanted it after merge_and_unload()")


def commit_of(name: str, revision: str | None = None) -> str | None:
    """Returns the commit of a hub model whose configuration is cached, at a revision; None if none is."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def _architecture(config: Any) -> str:
    """Names the model's class; a configuration that does not say gets the causal language model of its type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    given = getattr(config, "architectures", None)
    return str(
        given[0] if isinstance(given, list | tuple) and given else CAUSAL.get(config.model_type, type(config).__name__)
    )


def _is_encoder(config: Any) -> bool:
    """Tells a masked language model from a decoder of the same type: BertLMHeadModel looks both ways unless told not to."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)  # `causal` is XLM's word for it
    return config.model_type in MASKED and not decodes


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizer backends raise whatever they like
        raise ModelError(f"model {path!r} has no usable tokenizer: {_first_line(error)}") from error
    if not len(tokenizer):
        raise ModelError(
            f"model {path!r} has no tokenizer: its vocabulary is empty; copy tokenizer.json beside the weights"
        )
    return tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
