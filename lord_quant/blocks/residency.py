# SPDX-License-Identifier: Apache-2.0
"""Which parts of a model are in memory.

A model that fits is there as a whole. One that does not is a skeleton on the meta device, whose blocks get their weights
from the checkpoint's files when their turn comes and lose them again: `Streamed`. Whoever walks through the blocks asks for
each before running it, and says which one comes then, so that it can be read meanwhile; what stands outside the blocks
(embeddings, last norm, head) is always there.

What waits until it is needed again (hidden states of all batches, gradients of all blocks) would grow with the text and
the model as well: beside a skeleton only a little of it stays in memory, the rest waits in a file. Beside a GPU the host's
memory comes before files.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

import torch
from torch import nn

from lord_quant.errors import ModelError
from lord_quant.files.kept import Kept, KeptInFile, KeptOnHost
from lord_quant.files.places import places_of
from lord_quant.files.reading import open_tensors
from lord_quant.files.scratch import Scratch
from lord_quant.linalg import require_finite
from lord_quant.targets import find_blocks, find_linears


WAITING_BYTES = 2**27
"""How much of what waits stays in memory beside a skeleton with large blocks."""

CONTROL_GROUP = Path("/sys/fs/cgroup")
CONTAINER_MEMORY = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Where Linux says how much memory a container may have and has, by version of its control groups."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
PAGED_BYTES = 2**24
"""From which size on pieces of memory get pages of their own; for smaller ones that would take time."""
FREE_BYTES = 2**26
"""How much may be free at the heap's end while a block is at work."""


def waiting_bytes(block: int) -> int:
    """Returns how much of what waits stays in memory beside a skeleton whose largest block takes `block` bytes.

    A block at work takes about eight times its size, weights, statistics and factors together. Where that is little, twice
    as much may wait beside it: writing files would be a tenth of so small a run.
    """
    return max(WAITING_BYTES, 2 * WAITING_BYTES - 8 * block)


def host_bytes(device: torch.device) -> int:
    """Returns how much of what waits may do so in the host's memory: half of what is free now, shared by its processes.

    Nothing where the host's memory is the device's own.
    """
    if device.type != "cuda":
        return 0
    return _free_bytes() // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _free_bytes() -> int:
    """Returns how much memory is free, in a container of what that may have."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in CONTAINER_MEMORY:
        with suppress(OSError, ValueError):  # there is no such file, or no limit
            free = min(free, int((CONTROL_GROUP / limit).read_text()) - int((CONTROL_GROUP / used).read_text()))
    return max(free, 0)


class Residency:
    """All blocks have their weights, always.

    Attributes:
        spare_bytes: How much more than otherwise may wait at once where that saves running blocks again.
    """

    spare_bytes = 2**28

    def keep(self, tensors: Sequence[torch.Tensor]) -> Kept:
        """Keeps tensors until they are needed again."""
        return Kept(tensors)

    @contextmanager
    def of(self, *blocks: int, then: int | None = None) -> Iterator[None]:
        """Sees to it that blocks have their weights while the body runs.

        Args:
            *blocks: Which ones.
            then: Which block will probably be asked for next; None, or one that does not exist, if none will.
        """
        yield


RESIDENT = Residency()


class Streamed(Residency):
    """Blocks get their weights from safetensors files and lose them again.

    Args:
        model: A skeleton whose parameters are on the meta device. What stands outside its blocks is filled at once.
        files: The checkpoint's safetensors files.
        dtype: dtype of float weights in memory.
        device: Where they will be.
        stored: dtype in which floats will be stored that are no linear layer's, such as norms: they have to fit. None for
            any.
        read_ahead: Whether the block that comes next is read while one is at work, which takes the memory of a block on the
            host; None does so unless the device is the CPU, where that memory is dear and the gain is small.

    Attributes:
        scratch: An existing folder for the file in which tensors wait; None, at first, takes the one for temporary files.

    Raises:
        LayoutError: The files do not hold every tensor of the model by its name, or hold one in another shape.
        ModelError: A file cannot be read.
        NumericsError: A weight holds NaN or inf, or would where it is stored.
    """

    spare_bytes = 2**31  # in a file

    def __init__(
        self,
        model: nn.Module,
        files: Sequence[str],
        dtype: torch.dtype,
        device: torch.device,
        *,
        read_ahead: bool | None = None,
        stored: torch.dtype | None = None,
    ) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.scratch: Path | None = None
        self._file: Scratch | None = None
        self.blocks, self.places = find_blocks(model), places_of(model, files)
        self._stored, self._layers = stored, {site.name for site in find_linears(model)}
        self.read_ahead = device.type != "cpu" if read_ahead is None else read_ahead
        self._ahead: dict[int, Future[dict[str, torch.Tensor]]] = {}
        self._waiting, self._on_host = 0, 0
        self._host_bytes = host_bytes(device)
        _settle_heap()
        sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in self.blocks.modules]
        self._largest = max(sizes) * dtype.itemsize
        self._fill(self._read([name for name in self.places if not name.startswith(f"{self.blocks.path}.")]))
        for module in model.modules():  # what is computed, not stored
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device.type != "meta":
                    setattr(module, name, buffer.to(device))
        tie = getattr(model, "tie_weights", None)
        if tie is not None:
            tie()

    @contextmanager
    def of(self, *blocks: int, then: int | None = None) -> Iterator[None]:
        """Fills blocks, and empties them afterwards, whatever has become of their layers meanwhile.

        Raises:
            ModelError: A file cannot be read.
            NumericsError: A weight holds NaN or inf. Both are raised when the block's turn comes, read ahead or not.
        """
        try:
            for block in blocks:
                self._fill(self._take(block))
            self._ahead.clear()  # of a block that was not asked for after all
            with self._reading(then):
                yield
        finally:
            for block in blocks:
                _empty(self.blocks.modules[block])
            _give_back()

    def look_through(self) -> None:
        """Reads every block once, so that a run does not come upon a bad weight after hours.

        Raises:
            ModelError: A file cannot be read.
            NumericsError: A weight holds NaN or inf.
        """
        for block in range(len(self.blocks.modules)):
            self._read(self._names(block))

    def keep(self, tensors: Sequence[torch.Tensor]) -> Kept:
        """Keeps tensors where they are if not much waits there already, else on the host of a GPU, else in a file.

        Raises:
            OutputError: It cannot be written.
        """
        size = sum(tensor.nbytes for tensor in tensors)
        if self._waiting + size <= waiting_bytes(self._largest):
            kept = Kept(tensors)
            self._waiting += size
            weakref.finalize(kept, self._let_go, size)
            return kept
        size = KeptOnHost.nbytes(tensors)
        if self._on_host + size <= self._host_bytes:
            kept = KeptOnHost(tensors)
            self._on_host += size
            weakref.finalize(kept, self._let_go_of_host, size)
            return kept
        if self._file is None:
            self._file = Scratch(self.scratch)
        return KeptInFile(tensors, self._file)

    def _let_go(self, size: int) -> None:
        self._waiting -= size

    def _let_go_of_host(self, size: int) -> None:
        self._on_host -= size

    @contextmanager
    def _reading(self, block: int | None) -> Iterator[None]:
        """Reads a block in the background while the body runs; the thread ends with the body, at once if that fails."""
        if not self.read_ahead or block is None or block >= len(self.blocks.modules):
            yield
            return
        given_up = Event()
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
            ahead = pool.submit(self._read, self._names(block), given_up)
            try:
                yield
            except BaseException:
                given_up.set()
                raise
        self._ahead[block] = ahead

    def _take(self, block: int) -> dict[str, torch.Tensor]:
        ahead = self._ahead.pop(block, None)
        return self._read(self._names(block)) if ahead is None else ahead.result()

    def _names(self, block: int) -> list[str]:
        return [name for name in self.places if name.startswith(f"{self.blocks.path}.{block}.")]

    def _read(self, names: Sequence[str], given_up: Event | None = None) -> dict[str, torch.Tensor]:
        """Reads tensors into host memory of their own, pinned if a GPU will fetch them; stops early when given up."""
        from safetensors import SafetensorError

        found: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(self.places[name].file for name in names):
            try:
                with open_tensors(file) as handle:
                    for name in names:
                        if given_up is not None and given_up.is_set():
                            return found
                        if self.places[name].file == file:
                            value = handle.get_tensor(self.places[name].key)
                            dtype = self.dtype if value.is_floating_point() else value.dtype
                            # A copy: safetensors returns the file mapped into memory, and it may change.
                            own = torch.empty(value.shape, dtype=dtype, pin_memory=self.device.type == "cuda")
                            found[name] = own.copy_(value)
                            require_finite(own, f"weight {name!r}")
                            if self._stored is not None and name.rpartition(".")[0] not in self._layers:
                                require_finite(own.to(self._stored), f"{name!r} stored as {self._stored}")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"the model's file {file!r} cannot be read: {error}") from error
        return found

    def _fill(self, values: Mapping[str, torch.Tensor]) -> None:
        from accelerate.utils import set_module_tensor_to_device

        for name, value in values.items():
            set_module_tensor_to_device(self.model, name, self.device, value, dtype=value.dtype)


def _empty(block: nn.Module) -> None:
    """Takes away all that is stored; what is computed once, when a model is built, stays."""
    from accelerate.utils import set_module_tensor_to_device

    for name in block.state_dict(keep_vars=True):
        set_module_tensor_to_device(block, name, "meta")


def _settle_heap() -> None:
    """Lets large pieces of memory have pages of their own from now on, in all of this process; glibc alone.

    By itself glibc puts pieces of up to 32 MiB on its heap, hidden states among them. What waits for its turn fills the
    holes that a block at work leaves there, so that the next block finds none large enough, and the heap grows. Told not
    to, it would give back whatever is free at the heap's end, layer by layer, only to ask for it again.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.mallopt(M_MMAP_THRESHOLD, PAGED_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, FREE_BYTES)


def _give_back() -> None:
    """Gives the free pages of the heap back to the system; glibc would keep those below its end."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
