# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not needed for a while: where they are, in the memory of a GPU's host, or in a file."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lord_quant.files.scratch import Piece, Scratch


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


class KeptOnHost(Kept):
    """Tensors of a GPU that wait in the host's memory, in pages that cannot be moved: copies go at the speed of the bus.

    Copies are not waited for. Both directions run in the order in which the GPU computes, so what comes back is whole.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._devices = [tensor.device for tensor in tensors]
        super().__init__([_to_host(tensor) for tensor in tensors])

    @staticmethod
    def nbytes(tensors: Sequence[torch.Tensor]) -> int:
        """Returns how much host memory tensors would take: torch rounds pieces of it up to powers of two."""
        return sum(1 << (tensor.nbytes - 1).bit_length() for tensor in tensors if tensor.nbytes)

    def get(self) -> list[torch.Tensor]:
        """Returns the tensors on their devices."""
        return [tensor.to(device, non_blocking=True) for tensor, device in zip(self._tensors, self._devices, strict=True)]

    def take(self) -> list[torch.Tensor]:
        """Returns the tensors on their devices; they are not kept any longer."""
        tensors = self.get()
        self._tensors = []
        return tensors


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return own.copy_(tensor.detach(), non_blocking=True)


class KeptInFile(Kept):
    """Tensors that wait in a file, and leave their room to others once they are taken, or not needed any more.

    Args:
        tensors: The tensors.
        scratch: The file.

    Raises:
        OutputError: It is full.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], scratch: Scratch) -> None:
        self._scratch = scratch
        self._devices = [tensor.device for tensor in tensors]
        self._pieces: list[Piece] = []
        self._finalizer = weakref.finalize(self, scratch.free, self._pieces)
        for tensor in tensors:
            self._pieces.append(scratch.write(tensor))

    def get(self) -> list[torch.Tensor]:
        """Returns the tensors on their devices.

        Raises:
            OutputError: The file cannot be read.
        """
        found = zip(self._pieces, self._devices, strict=True)
        return [self._scratch.read(piece).to(device) for piece, device in found]

    def take(self) -> list[torch.Tensor]:
        """Returns the tensors on their devices; others may have their room."""
        tensors = self.get()
        self._finalizer()
        self._pieces, self._devices = [], []
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
