# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not needed for a while: in memory, or in files."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lord_quant.errors import OutputError


KEPT = ".kept.partial-"
"""What the names of files begin with in which tensors wait; the next run in that folder removes what a killed one left."""


class Kept:
    """Tensors that wait until they are needed again."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)

    def get(self) -> list[torch.Tensor]:
        """Returns the tensors, perhaps the very ones that are kept: not to be written into."""
        return list(self._tensors)

    def take(self) -> list[torch.Tensor]:
        """Returns the tensors; they are not kept any longer."""
        tensors, self._tensors = self._tensors, []
        return tensors


Keep = Callable[[Sequence[torch.Tensor]], Kept]
"""Keeps tensors."""


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

    def get(self) -> list[torch.Tensor]:
        """Returns the tensors on their devices."""
        found = read_tensors(self._path)
        return [found[str(number)].to(device) for number, device in enumerate(self._devices)]

    def take(self) -> list[torch.Tensor]:
        """Returns the tensors on their devices, and removes the file."""
        tensors = self.get()
        self._finalizer()
        return tensors


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file into memory of its own, aligned as that of any tensor.

    safetensors returns the file mapped into memory, where a tensor may begin at any multiple of 8 bytes. On some processors
    products of such tensors are rounded in another order, and a run would not make the same bytes wherever tensors waited.
    """
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


class Batches(Sequence[torch.Tensor]):
    """A tensor per batch, of which one is at work and the others wait.

    Args:
        keep: Keeps them.
        tensors: The first ones.
    """

    def __init__(self, keep: Keep, tensors: Iterable[torch.Tensor] = ()) -> None:
        self._keep = keep
        self._kept = [keep([tensor]) for tensor in tensors]

    def append(self, tensor: torch.Tensor) -> None:
        """Adds the tensor of another batch."""
        self._kept.append(self._keep([tensor]))

    def __setitem__(self, position: int, tensor: torch.Tensor) -> None:
        self._kept[position] = self._keep([tensor])

    def __getitem__(self, position: Any) -> Any:
        return self._kept[position].get()[0]

    def __len__(self) -> int:
        return len(self._kept)
