# SPDX-License-Identifier: Apache-2.0
"""The processes of a run, as torchrun starts them, and what they tell each other.

Every process holds the same model and its own share of the calibration windows. Whatever is summed over windows is summed
over processes; what is computed once is computed by one of them and sent to the others. A world of one does none of this.

Errors. One that befalls a single process must end all of them, be told once, and leave none waiting for a message that will
not come. So whenever processes are to exchange something they first meet: each says whether it has failed (`World.together`
sees to it that one that has comes to the others' next meeting). Where somebody has, the first such process goes on with its
own error and all others end with an `ElsewhereError`. A process that is killed is noticed by its closed connections, and by
torchrun.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lord_quant.errors import ConfigError, ElsewhereError


if TYPE_CHECKING:  # commands import this before they know whether they need torch
    import torch

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long one process may compute while others wait for it; those that are gone are noticed at once."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen by one of them.

    Attributes:
        rank: This one's number, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def quiet(self) -> bool | None:
        """What `tqdm` is told: no bar in other processes than the first; None leaves it to the terminal."""
        return None if self.first else True

    def share(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns every `size`-th row of all batches, from the `rank`-th on, in batches of the size of the first.

        Args:
            batches: With shape (batch, seq_len), all of one seq_len.
        """
        if self.size == 1:
            return list(batches)
        import torch

        rows = torch.cat(list(batches))[self.rank :: self.size]
        return list(rows.split(len(batches[0]))) if len(rows) else []

    def deal(self, costs: Sequence[float], turn: int = 0) -> list[int]:
        """Deals out work that can be done at the same time; every process comes to the same answer.

        The most expensive piece first, each goes to the process with the least to do; among equals to the next in turn.

        Args:
            costs: Of every piece, in any unit.
            turn: Process whose turn it is, modulo `size`.

        Returns:
            The rank that does each piece.
        """
        load, owners = [0.0] * self.size, [0] * len(costs)
        for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
            owner = min(range(self.size), key=lambda rank: (load[rank], (rank - turn) % self.size))
            owners[piece] = owner
            load[owner] += costs[piece]
        return owners

    def share_out(
        self, tasks: Sequence[Callable[[], T]], costs: Sequence[float], turn: int, device: torch.device | str
    ) -> Iterator[T]:
        """Yields what tasks return, in order; each is done by one process, see `deal`, and its result sent to the others.

        Args:
            tasks: What is to be done; alone, each is done when its result is asked for.
            costs: Of every task.
            turn: Process whose turn it is, modulo `size`.
            device: Where tensors of results are to be.
        """
        if self.size == 1:
            yield from (task() for task in tasks)
            return
        owners = self.deal(costs, turn)
        own = {piece: tasks[piece]() for piece, owner in enumerate(owners) if owner == self.rank}
        for piece, owner in enumerate(owners):
            yield self.broadcast(own.pop(piece) if owner == self.rank else None, owner, device)

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        self._meet()
        return _gathered(value, self.size)

    def broadcast(self, value: T | None, source: int = 0, device: torch.device | str = "cpu") -> T:
        """Returns the value of process `source`; those of others are not looked at.

        Args:
            value: Plain values, and tensors in named tuples, lists and dictionaries; None where there is none to tell.
            source: Whose value counts.
            device: Where its tensors are to be.
        """
        if self.size == 1:
            return cast(T, value)
        self._meet()
        box = [_moved(value, "cpu") if self.rank == source else None]
        _exchange(lambda dist: dist.broadcast_object_list(box, src=source))
        return cast(T, value if self.rank == source else _moved(box[0], device))

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum of a tensor over processes."""
        return self.totals({"": tensor}, tensor.device)[""]

    def totals(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """Returns the sums of tensors over processes, by name; one that a process does not have is zero there."""
        if self.size == 1:
            return dict(tensors)
        import torch

        known: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for each in self.gather({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}):
            known |= each
        sums = {}
        for name in sorted(known):
            shape, dtype = known[name]
            own = tensors.get(name)
            addend = torch.zeros(shape, dtype=dtype, device=device) if own is None else own.clone().contiguous()
            _add_up(addend)
            sums[name] = addend
        return sums

    def wait(self) -> None:
        """Returns when every process has come this far.

        Raises:
            ElsewhereError: One of them has failed.
        """
        if self.size > 1:
            self._meet()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Lets an error of one process end the body in all of them; all leave it at the same time. Not to be nested.

        Raises:
            ElsewhereError: Another process failed, or failed first.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
            self._meet()
        except ElsewhereError:
            raise
        except Exception as error:
            self._meet(error)
            raise

    def _meet(self, error: Exception | None = None) -> None:
        """Hears whether all are well, `error` being what has befallen this process."""
        told = _gathered(None if error is None else f"{type(error).__name__}: {error}", self.size)
        failed = [rank for rank, message in enumerate(told) if message is not None]
        if failed and failed[0] != self.rank:
            raise ElsewhereError(f"process {failed[0]} failed: {told[failed[0]]}")


ALONE = World()


def launched() -> World:
    """Returns the processes that torchrun started, whether they have joined or not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # schedulers set some of the others
        return ALONE
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def refuse_torchrun(what: str) -> None:
    """Refuses to do in several processes what one can do alone.

    Raises:
        ConfigError: torchrun started more than one.
    """
    if launched().size > 1:
        raise ConfigError(f"{what} takes one process, torchrun started {launched().size}; wanted a start without torchrun")


@contextmanager
def joined() -> Iterator[World]:
    """Joins the processes that torchrun started this one among, for as long as the body runs; without torchrun, alone.

    Raises:
        ConfigError: There are more processes on this machine than GPUs.
    """
    world = launched()
    if world.size == 1:
        yield world
        return
    import torch
    import torch.distributed as dist
    import torch.distributed.nn.functional  # its default arguments keep the group alive that stands when it is imported

    cuda = torch.cuda.is_available()
    if cuda:
        own, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= count:
            raise ConfigError(
                f"torchrun started process {own} on a machine of {count} GPUs; wanted --nproc_per_node {count} at most, or "
                "CUDA_VISIBLE_DEVICES= for the CPU"
            )
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield world
    except ElsewhereError:
        with suppress(RuntimeError):  # torchrun ends all processes once one has ended: let the one with something to tell
            dist.barrier()
        raise
    # Nobody else holds the group, so this ends its threads: one that lets go of a tensor while the interpreter ends aborts.
    dist.destroy_process_group()


def _gathered(value: T, size: int) -> list[T]:
    found: list[Any] = [None] * size
    _exchange(lambda dist: dist.all_gather_object(found, value))
    return found


def _add_up(tensor: torch.Tensor) -> None:
    """Replaces a tensor by its sum over processes."""
    _exchange(lambda dist: dist.all_reduce(tensor))


def _exchange(call: Callable[[Any], Any]) -> None:
    import torch.distributed

    try:
        call(torch.distributed)
    except RuntimeError as error:
        raise ElsewhereError(f"another process of the run is gone ({error})") from error


def _moved(value: Any, device: torch.device | str) -> Any:
    """Returns a value with copies of its tensors on a device; what they are parts of does not go with them."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(each, device) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(each, device) for each in value)
    return value
