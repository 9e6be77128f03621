# SPDX-License-Identifier: Apache-2.0
"""Which parts of a model are in memory.

A model that fits is there as a whole. One that does not is a skeleton on the meta device, whose blocks get their weights
from the checkpoint's files when their turn comes and lose them again: `Streamed`. Whoever walks through the blocks asks for
each before running it; what stands outside the blocks (embeddings, last norm, head) is always there.

What is to be remembered of every block at once (hidden states, gradients) would grow with the model as well: beside a
skeleton it waits in files.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lord_quant.errors import ModelError, OutputError
from lord_quant.linalg import require_finite
from lord_quant.targets import find_blocks


class Kept:
    """Tensors that wait to be taken back, once."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)

    def take(self) -> list[torch.Tensor]:
        """Returns the tensors; they are not kept any longer."""
        tensors, self._tensors = self._tensors, []
        return tensors


class Residency:
    """All blocks have their weights, always."""

    def keep(self, tensors: Sequence[torch.Tensor]) -> Kept:
        """Keeps tensors until they are needed again."""
        return Kept(tensors)

    @contextmanager
    def of(self, *blocks: int) -> Iterator[None]:
        """Sees to it that blocks have their weights while the body runs."""
        yield


RESIDENT = Residency()
KEPT = ".kept.partial-"
"""What the names of files begin with in which tensors wait; the next run in that folder removes what a killed one left."""


class Place(NamedTuple):
    """Where a tensor is stored: in which file, under which name."""

    file: str
    key: str


class KeptInFile(Kept):
    """Tensors that wait in a file, which goes once they are taken, or not needed any more.

    Args:
        tensors: The tensors.
        folder: Where the file is to lie.

    Raises:
        OutputError: It cannot be written.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self._devices = [tensor.device for tensor in tensors]
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=KEPT, suffix=".safetensors", delete=False) as handle:
                self._path = Path(handle.name)
            self._finalizer = weakref.finalize(self, self._path.unlink, missing_ok=True)
            numbered = {str(number): tensor.detach().cpu().contiguous() for number, tensor in enumerate(tensors)}
            save_file(numbered, self._path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"activations cannot be kept in {str(folder)!r}: {error}") from error

    def take(self) -> list[torch.Tensor]:
        """Returns the tensors on their devices, and removes the file."""
        from safetensors.torch import load_file

        found = load_file(self._path)
        tensors = [found[str(number)].to(device) for number, device in enumerate(self._devices)]
        self._finalizer()
        return tensors


class Streamed(Residency):
    """Blocks get their weights from safetensors files and lose them again.

    Args:
        model: A skeleton whose parameters are on the meta device. What stands outside its blocks is filled at once.
        files: The checkpoint's safetensors files.
        dtype: dtype of float weights in memory.
        device: Where they will be.

    Attributes:
        scratch: An existing folder for what is kept; None, at first, makes a temporary one when it is needed.

    Raises:
        ModelError: The files do not hold every tensor of the model by its name, or hold one in another shape.
        NumericsError: A weight holds NaN or inf.
    """

    def __init__(self, model: nn.Module, files: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.scratch: Path | None = None
        self.blocks, self.places = find_blocks(model), places_of(model, files)
        self._fill([name for name in self.places if not name.startswith(f"{self.blocks.path}.")])
        for module in model.modules():  # what is computed, not stored
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device.type != "meta":
                    setattr(module, name, buffer.to(device))
        tie = getattr(model, "tie_weights", None)
        if tie is not None:
            tie()

    @contextmanager
    def of(self, *blocks: int) -> Iterator[None]:
        """Fills blocks, and empties them afterwards, whatever has become of their layers meanwhile."""
        for block in blocks:
            prefix = f"{self.blocks.path}.{block}."
            self._fill([name for name in self.places if name.startswith(prefix)])
        try:
            yield
        finally:
            for block in blocks:
                _empty(self.blocks.modules[block])

    def keep(self, tensors: Sequence[torch.Tensor]) -> Kept:
        """Keeps tensors in a file.

        Raises:
            OutputError: It cannot be written.
        """
        if self.scratch is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="lord-quant-")
            self.scratch = Path(self._temporary.name)
        return KeptInFile(tensors, self.scratch)

    def _fill(self, names: Sequence[str]) -> None:
        from accelerate.utils import set_module_tensor_to_device
        from safetensors import safe_open

        for file in dict.fromkeys(self.places[name].file for name in names):
            with safe_open(file, framework="pt") as handle:
                for name in names:
                    if self.places[name].file == file:
                        value = handle.get_tensor(self.places[name].key)
                        value = value.to(self.dtype) if value.is_floating_point() else value
                        require_finite(value, f"weight {name!r}")
                        set_module_tensor_to_device(self.model, name, self.device, value, dtype=value.dtype)


def places_of(model: nn.Module, files: Sequence[str]) -> dict[str, Place]:
    """Finds every tensor of a model in safetensors files, tied ones once, by its name with or without the base model's.

    Args:
        model: The model, possibly on the meta device.
        files: The files.

    Raises:
        ModelError: Tensors are missing, or have other shapes.
    """
    from safetensors import safe_open

    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            stored |= {key: (file, tuple(handle.get_slice(key).get_shape())) for key in handle.keys()}  # noqa: SIM118
    base = f"{getattr(model, 'base_model_prefix', '')}."
    places: dict[str, Place] = {}
    problems: list[str] = []
    for names, tensor in _tied(model):
        keys = [(name, key) for name in names for key in (name, name.removeprefix(base)) if key in stored]
        if not keys:
            problems.append(f"missing: {names[0]}")
            continue
        name, key = keys[0]
        file, shape = stored[key]
        if shape != tuple(tensor.shape):
            problems.append(f"{key} is {shape}, config.json says {tuple(tensor.shape)}")
        places[name] = Place(file, key)
    if problems:
        more = [f"… and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ModelError("\n  ".join(["the files do not hold the model's tensors:", *problems[:10], *more]))
    return places


def _tied(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """Returns what a checkpoint of the model holds: the names of each tensor, several where it is tied."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _empty(block: nn.Module) -> None:
    """Takes away all that is stored; what is computed once, when a model is built, stays."""
    from accelerate.utils import set_module_tensor_to_device

    for name in block.state_dict(keep_vars=True):
        set_module_tensor_to_device(block, name, "meta")
