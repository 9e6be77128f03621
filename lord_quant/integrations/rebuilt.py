# SPDX-License-Identifier: Apache-2.0
"""A model rebuilt on the meta device, before tensors are loaded: what its files must hold, what must not be made up."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from lord_quant.config import BITS, FLOAT_BITS, GROUP_SIZES, PACKED_BITS, choice_problems, pattern_problems
from lord_quant.errors import CheckpointError, ConfigError, LordError
from lord_quant.files.headers import SUFFIX, check_tensors
from lord_quant.sizes.layer_bytes import Packing
from lord_quant.surgery import is_compressed, is_low_rank
from lord_quant.targets import find_linears


PACKING_PATTERNS = ("bits_pattern", "group_size_pattern")
FORMATS = ("gptq", "gptq_v2")
"""How packed tensors are stored: with zeros less one, or as they are."""


@contextmanager
def told_by_host() -> Iterator[None]:
    """Turns what the host says of a configuration, or stumbles over, into an error of ours.

    Raises:
        ConfigError: The body raised an error of the host's.
    """
    try:
        yield
    except LordError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        raise ConfigError(f"quantization_config holds a value that GPTQ cannot have: {error}") from error


def packed(bits: Any) -> Any:
    """Returns the bits of packed weights.

    Raises:
        ConfigError: They are those of floats, which GPTQ does not make.
    """
    if bits == FLOAT_BITS:
        raise ConfigError(
            f"bits is {bits}, and GPTQ makes 8, 4, 3 or 2; for float factors `optimum-cli lord quantize --bits {bits}`, or "
            f"execute(prepare(LordConfig(..., gptq=GptqConfig(bits={bits}))))"
        )
    return bits


def refuse_two_formats(values: Mapping[str, Any]) -> None:
    """Refuses a configuration that names its format twice, and not the same: zeros would be read as one less or more.

    Raises:
        ConfigError: It does.
    """
    names = {key: values[key] for key in ("format", "checkpoint_format") if values.get(key) is not None}
    if len(set(names.values())) > 1:
        found = " and ".join(f"{key} is {value!r}" for key, value in names.items())
        raise ConfigError(f"{found}: the weights are in one of them; wanted the same, or format alone")


def packings_of(model: torch.nn.Module, wanted: Any) -> dict[str, Packing]:
    """Returns how a checkpoint packs every linear layer of the rebuilt skeleton, factors included, by full path.

    Layers of 16 bits are not packed, and missing.

    Args:
        model: The skeleton.
        wanted: The checkpoint's `LordGPTQConfig`.

    Raises:
        CheckpointError: The group size is missing, a pattern names a layer the model does not have, or a value is illegal
            (all are named).
    """
    bits, sizes = wanted.bits_pattern or {}, wanted.group_size_pattern or {}
    owners = {}  # of a linear layer: itself, or the low-rank layer it is a factor of
    for site in find_linears(model):
        parent = site.name.rpartition(".")[0]
        owners[site.name] = parent if is_low_rank(model.get_submodule(parent)) else site.name
    known = {*owners, *owners.values()}
    problems = choice_problems("bits", wanted.bits, PACKED_BITS) + choice_problems("format", wanted.format, FORMATS)
    problems += choice_problems("group_size", wanted.group_size, GROUP_SIZES)
    problems += pattern_problems("bits_pattern", bits, BITS)
    problems += pattern_problems("group_size_pattern", sizes, GROUP_SIZES)
    for name, pattern in zip(PACKING_PATTERNS, (bits, sizes), strict=True):
        unknown = [key for key in pattern if key not in known]
        problems += [f"{name} names {key!r}, which {type(model).__name__} does not have" for key in unknown]
    if problems:
        raise CheckpointError(
            "\n  ".join(["quantization_config does not fit the model (was it edited, or is it another's?):", *problems])
        )
    own_bits, own_sizes = (
        {name: pattern.get(name, pattern.get(own, usual)) for name, own in owners.items()}
        for pattern, usual in ((bits, wanted.bits), (sizes, wanted.group_size))
    )
    packed = [name for name in owners if own_bits[name] != FLOAT_BITS]
    return {name: Packing(own_bits[name], own_sizes[name]) for name in packed}


def home_of(model: Any, files: Sequence[str]) -> tuple[str, str | None]:
    """Returns the folder or hub name that a model was loaded from, and of a hub name the commit.

    The model itself names neither the revision nor the subfolder that was asked for.
    """
    folder = Path(files[0]).parent if files else None
    if folder is None:
        return str(model.name_or_path), None
    if folder.parent.name == "snapshots":  # of a hub model's cache
        return str(model.name_or_path), folder.name
    return str(folder), None


def check_files(model: torch.nn.Module, block_path: str, files: list[str] | None) -> None:
    """Holds the checkpoint's headers against the tensors that the rebuilt model calls for.

    Raises:
        CheckpointError: They do not fit; or the files are pickled, or do not all lie where the checkpoint does.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if not files:
        return
    names = [str(file) for file in files]
    pickled = [name for name in names if not name.endswith(SUFFIX)]
    if pickled:
        raise CheckpointError(f"{pickled[0]!r} is no safetensors file: pickled weights are not read")
    home = os.path.abspath(str(getattr(model, "name_or_path", "")))
    elsewhere = [name for name in names if os.path.isdir(home) and not Path(os.path.abspath(name)).is_relative_to(home)]
    if elsewhere:
        raise CheckpointError(f"the index of {home!r} names {elsewhere[0]!r}; wanted files in that folder")
    ours = _stored_names(model, block_path)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name in ours}
    # What transformers merges or renames when it loads a model is stored as it was before.
    check_tensors(revert_weight_conversion(cast(Any, model), expected), names, block_path)


def _stored_names(model: Any, block_path: str) -> set[str]:
    """Names the tensors a checkpoint must hold: the blocks', what is around them, and the head unless it is tied.

    A classification head is none of these: the host may make up a new one, as it does for dense models.
    """
    body, head = getattr(model, "base_model", model), model.get_output_embeddings()
    names = set()
    for path, module in model.named_modules():
        if module is body or path == block_path:
            names |= {f"{path}.{name}".lstrip(".") for name in module.state_dict()}
        elif head is not None and module is head:
            tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
            names |= {f"{path}.{name}" for name in module.state_dict() if not (tied and name == "weight")}
    return names


def protect_from_initialization(model: torch.nn.Module) -> None:
    """Keeps GPT-2, GPTBigCode and Mamba-2 from initialising weights that packed layers do not have.

    Their `_init_weights` draws `c_proj.weight` anew on modules that were not marked as loaded; Mamba-2's does so with
    `out_proj.weight`. Modules with computed buffers (CodeGen's position table) are not marked, so that these are filled;
    all other tensors are the checkpoint's, as `check_files` made sure.
    """
    for module in model.modules():
        if module._non_persistent_buffers_set:
            continue
        if any(is_compressed(child) for child in module.children()):
            vars(module)["_is_hf_initialized"] = True
