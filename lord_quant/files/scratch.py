# SPDX-License-Identifier: Apache-2.0
"""A file for what waits on disk, whose pieces are used again and again.

A file per tensor would cost several times what writing and reading it takes: the system finds pages for each and takes
them back one by one when it goes. Batches of a stream have the same size, so what one leaves free suits another.

The file has no name. Nothing is left of it once the process is gone, however it went.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from lord_quant.errors import OutputError, reason_of


PAGE = 4096
"""Pieces begin and end on pages, so that none is read in order to be written."""


class Piece(NamedTuple):
    """Where a tensor lies in the file.

    Attributes:
        start: Its first byte.
        shape: Shape of the tensor.
        dtype: Its dtype.
    """

    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def room(self) -> int:
        """Bytes of whole pages that it takes."""
        return -(-self.shape.numel() * self.dtype.itemsize // PAGE) * PAGE


class Scratch:
    """The file.

    Args:
        folder: Where it lies; None takes the one for temporary files.

    Attributes:
        num_bytes: How long it is.

    Raises:
        OutputError: It cannot be made.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        with self._named("kept in"):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this object lives
        weakref.finalize(self, self._file.close)
        self._free: dict[int, list[int]] = {}
        self.num_bytes = 0

    def write(self, tensor: torch.Tensor) -> Piece:
        """Writes a tensor, of any shape and dtype.

        Raises:
            OutputError: There is no room for it.
        """
        view = _bytes_of(tensor.detach().cpu().contiguous())
        piece = self._place(tensor)
        start = piece.start
        try:
            with self._named("kept in"):
                while view:
                    written = os.pwrite(self._file.fileno(), view, start)
                    view, start = view[written:], start + written
        except OutputError:
            self.free([piece])
            raise
        return piece

    def read(self, piece: Piece) -> torch.Tensor:
        """Returns a tensor in memory of its own.

        Raises:
            OutputError: It cannot be read.
        """
        tensor = torch.empty(piece.shape, dtype=piece.dtype)
        view, start = _bytes_of(tensor), piece.start
        with self._named("read again from"):
            while view:
                read = os.preadv(self._file.fileno(), [view], start)
                if not read:
                    raise OSError("the file ends too early")
                view, start = view[read:], start + read
        return tensor

    def free(self, pieces: list[Piece]) -> None:
        """Lets other tensors have the room of these."""
        for piece in pieces:
            self._free.setdefault(piece.room, []).append(piece.start)

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Says of an error of the system what cannot be done, and where."""
        try:
            yield
        except OSError as error:
            where = "a temporary folder" if self._folder is None else repr(str(self._folder))
            advice = "; set TMPDIR" if self._folder is None else ""
            raise OutputError(f"activations cannot be {what} {where}: {reason_of(error)}{advice}") from error

    def _place(self, tensor: torch.Tensor) -> Piece:
        """Finds a free piece of the right size, at the end of the file if there is none."""
        piece = Piece(self.num_bytes, tensor.shape, tensor.dtype)
        left = self._free.get(piece.room)
        if left:
            return piece._replace(start=left.pop())
        self.num_bytes += piece.room
        return piece


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
