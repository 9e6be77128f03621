# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not needed for a while: in memory, or in files."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

from lord_quant.errors import OutputError


KEPT = ".kept.partial-"
"""What the names of files begin with in which tensors wait; the next run in that folder removes what a killed one left."""


class Kept:
    """Tensors that wait to be taken back, once."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)

    def take(self) -> list[torch.Tensor]:
        """Returns the tensors; they are not kept any longer."""
        tensors, self._tensors = self._tensors, []
        return tensors


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
