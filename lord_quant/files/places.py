# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a model are stored: in which safetensors file, under which name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lord_quant.errors import LayoutError, ModelError
from lord_quant.files.headers import FLOATS
from lord_quant.files.reading import open_tensors
from lord_quant.targets import find_blocks


COMPUTED = re.compile(r"(inv_freq|embed_positions|cos_cached|sin_cached)$")
"""Names of floats that old checkpoints hold although they are computed."""
ROWS_AT_ONCE = 4096
"""Rows of tensors that are compared; tied ones may be a tenth of a model."""


class Place(NamedTuple):
    """Where a tensor is stored: in which file, under which name."""

    file: str
    key: str


def places_of(model: nn.Module, files: Sequence[str]) -> dict[str, Place]:
    """Finds every tensor of a model in safetensors files, tied ones once, by its name with or without the base model's.

    Args:
        model: The model, possibly on the meta device.
        files: The files.

    Raises:
        LayoutError: Tensors are missing, or have other shapes.
        ModelError: A file cannot be read.
    """
    stored = _stored(files)
    places: dict[str, Place] = {}
    problems: list[str] = []
    for names, tensor in _tied(model):
        found = _found(model, names, stored)
        if not found:
            problems.append(f"missing: {names[0]}")
            continue
        name, key = next(iter(found.items()))
        file, shape, _ = stored[key]
        if shape != tuple(tensor.shape):
            problems.append(f"{key} is {shape}, config.json says {tuple(tensor.shape)}")
        places[name] = Place(file, key)
    if problems:
        more = [f"… and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise LayoutError("\n  ".join(["the files do not hold the model's tensors:", *problems[:10], *more]))
    return places


def tensor_bytes(model: nn.Module, itemsize: int) -> dict[str, int]:
    """Returns the bytes of every tensor a checkpoint of `model` holds, tied weights once.

    Args:
        model: A model, possibly on the meta device.
        itemsize: Bytes of a stored float value; other dtypes keep their own.
    """
    return {
        names[0]: tensor.numel() * (itemsize if tensor.is_floating_point() else tensor.element_size())
        for names, tensor in _tied(model)
    }


def stored_apart(model: nn.Module, files: Sequence[str]) -> tuple[str, str] | None:
    """Returns the names of two tensors that differ in the files though the model has them as one; None if none do.

    transformers does not tie such tensors, whatever the configuration says.

    Args:
        model: The model, possibly on the meta device.
        files: The safetensors files.

    Raises:
        ModelError: A file cannot be read.
    """
    tied = [names for names, _ in _tied(model) if len(names) > 1]
    stored = _stored(files) if tied else {}
    for names in tied:
        found = [(name, (stored[key][0], key)) for name, key in _found(model, names, stored).items()]
        for name, place in found[1:]:
            if not _equal(found[0][1], place):
                return found[0][0], name
    return None


def refuse_unread(model: nn.Module, files: Sequence[str]) -> list[str]:
    """Refuses files that hold weights otherwise than as floats, or more weights of a block than the model has.

    Where transformers renames or merges tensors nothing is known of that.

    Args:
        model: The model, possibly on the meta device.
        files: Its safetensors files.

    Returns:
        Names of other weights that the model does not have, such as those of layers behind its last one.

    Raises:
        ModelError: There are such weights (the first are named), or a file cannot be read.
    """
    stored, taken = _stored(files), dict[str, torch.Tensor]()
    for names, tensor in _tied(model):
        found = _found(model, names, stored)
        if not found:
            return []
        taken |= dict.fromkeys(found.values(), tensor)
    odd = [
        f"{key} is {stored[key][2]}"
        for key, own in taken.items()
        if own.is_floating_point() and stored[key][2] not in FLOATS
    ]
    if odd:
        raise ModelError(_listed("the files hold no dense model, weights are not stored as floats", odd))
    known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    rest = [
        key
        for key, (_, shape, dtype) in stored.items()
        if key not in taken and _is_weight(key, shape, dtype) and not any(re.search(pattern, key) for pattern in known)
    ]
    blocks, base = find_blocks(model), f"{getattr(model, 'base_model_prefix', '')}."
    paths = "|".join(re.escape(path) for path in {blocks.path, blocks.path.removeprefix(base)})
    own_block = re.compile(rf"(?:{paths})\.(\d+)\.")
    inside = [key for key in rest if (hit := own_block.match(key)) and int(hit[1]) < len(blocks.modules)]
    if inside:
        raise ModelError(_listed(f"the files hold weights of blocks that {type(model).__name__} does not have", inside))
    return rest


def _is_weight(key: str, shape: tuple[int, ...], dtype: str) -> bool:
    """Tells weights from masks and the like, which old checkpoints hold as well."""
    return dtype.startswith(("F", "BF")) and len(shape) < 4 and math.prod(shape) > 1 and not COMPUTED.search(key)


def _listed(problem: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{problem}: {', '.join(names[:3])}{more}"


def _stored(files: Sequence[str]) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Returns file, shape and dtype of all that is stored, by the name it has there."""
    from safetensors import SafetensorError

    stored: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for file in files:
        try:
            with open_tensors(file) as handle:
                for key in handle.keys():  # noqa: SIM118 (not a dict)
                    part = handle.get_slice(key)
                    stored[key] = (file, tuple(part.get_shape()), str(part.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the model's file {file!r} cannot be read: {error}") from error
    return stored


def _found(model: nn.Module, names: Sequence[str], stored: Mapping[str, object]) -> dict[str, str]:
    """Returns the keys of the names that are stored: with or without the base model's, or as saving renames them."""
    base = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for name in names:
        keys = [key for key in (name, name.removeprefix(base)) if key in stored]
        keys = keys or [key for key in _renamed(model, name) if key in stored]
        if keys:
            found[name] = keys[0]
    return found


def _renamed(model: nn.Module, name: str) -> list[str]:
    """Returns the name that transformers gives a tensor when it saves the model, if that is all it does to it.

    Of a block's tensors it is not asked: they are written as they are named in memory.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if name.startswith(f"{find_blocks(model).path}."):
        return []
    tensor = model.state_dict(keep_vars=True)[name]
    saved = revert_weight_conversion(cast(Any, model), {name: tensor})
    return [key for key, value in saved.items() if len(saved) == 1 and value.shape == tensor.shape]


def _equal(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Compares two stored tensors by file and key, piece by piece."""
    with open_tensors(one[0]) as left, open_tensors(other[0]) as right:
        a, b = left.get_slice(one[1]), right.get_slice(other[1])
        if a.get_shape() != b.get_shape():
            return False
        if not a.get_shape():  # a number has no rows
            return torch.equal(left.get_tensor(one[1]), right.get_tensor(other[1]))
        starts = range(0, a.get_shape()[0], ROWS_AT_ONCE)
        return all(torch.equal(a[start : start + ROWS_AT_ONCE], b[start : start + ROWS_AT_ONCE]) for start in starts)


def _tied(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """Returns what a checkpoint of the model holds: the names of each tensor, several where it is tied."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())
