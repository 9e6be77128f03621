# SPDX-License-Identifier: Apache-2.0
"""How far a run is: bars on a terminal, lines of JSON in a log.

One object per run, handed to whatever has steps to tell of. A run consists of phases, some of which go through blocks.
Bars are shown where standard error is a terminal, a line now and then elsewhere. A log is added to, so that a run that was
cut off and continued tells all of its story in one file; every line stands on disk before the run goes on:

    {"event": "block", "name": "model.layers.3", "phase": "stack", "blocks_done": 4, "blocks_total": 40,
     "eta_seconds": 810.2, "time": "2025-01-31T12:00:00+00:00", "seconds": 97.3, "rss_bytes": 7516192768}

`event` is one of start, phase, layer, block, finished and failed; `seconds` count from the start, `eta_seconds` are those
the phase still needs at the speed it had so far; `gpu_peak_bytes` are there where a GPU is at work.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from tqdm.auto import tqdm

from lord_quant.checkpoint import check_file
from lord_quant.errors import OutputError
from lord_quant.files.reading import parse_json


SAY_EVERY = 20.0
"""Seconds between lines where there is no bar."""
LONGEST = 2**16
"""Bytes of a line."""


@dataclass
class Phase:
    """A phase under way.

    Attributes:
        name: What it is called.
        total: Blocks it goes through; 0 where it goes through none.
        resumed: Blocks that were done before it began.
        began: When it did, in seconds of `time.perf_counter`.
        bar: What a terminal shows of it.
        done: Blocks that are done by now.
    """

    name: str
    total: int
    resumed: int
    began: float
    bar: Any
    done: int

    def told(self) -> dict[str, Any]:
        """Returns what a line of the log says of it."""
        if not self.total:
            return {"phase": self.name}
        new = self.done - self.resumed
        left = (time.perf_counter() - self.began) / new * (self.total - self.done) if new else None
        eta = None if left is None else round(left, 3)
        return {"phase": self.name, "blocks_done": self.done, "blocks_total": self.total, "eta_seconds": eta}


class Progress:
    """Where a run tells how far it is. As a context it writes start and end of the run into the log, and closes it.

    Args:
        log: File that lines are added to; None writes none.
        about: What the first line says of the run: JSON values.
        apart: Folders and files by what they are, such as the model; the log may not lie in them.
        quiet: Whether there are no bars, wherever standard error goes.

    Raises:
        OutputError: The log cannot be written, or the file is something else.
    """

    def __init__(
        self,
        log: str | Path | None = None,
        about: Mapping[str, Any] | None = None,
        apart: Mapping[str, str | None] | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        self._quiet = quiet
        self._log = None if log is None else check_log(log, apart or {})
        self._about, self._began = dict(about or {}), time.perf_counter()
        self._handle: BinaryIO | None = None
        self._phase: Phase | None = None
        self._spoke = self._began

    def __enter__(self) -> Progress:
        if self._log is not None:
            self._handle = _open(self._log)
        self._began = time.perf_counter()
        self._tell("start", **self._about)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._tell("finished")
        else:
            self._tell("failed", error=f"{kind.__name__}: {error}".removesuffix(": "))
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    @contextmanager
    def phase(self, name: str, blocks: int = 0, resumed: int = 0) -> Iterator[None]:
        """Tells that a phase begins, and shows a bar until it ends.

        Args:
            name: What it is called.
            blocks: Blocks it goes through.
            resumed: How many of them are done already.
        """
        bar = tqdm(
            initial=resumed,
            total=blocks,
            desc=name,
            unit="block",
            disable=None if blocks and not self._quiet else True,  # None: where it is no terminal
            dynamic_ncols=True,
        )
        self._phase = Phase(name, blocks, resumed, time.perf_counter(), bar, resumed)
        self._tell("phase")
        try:
            yield
        finally:
            bar.close()
            self._phase = None

    @contextmanager
    def layers(self, *names: str) -> Iterator[None]:
        """Shows that layers are at work, those of a group together, and tells when they are finished."""
        if self._phase is not None:
            self._phase.bar.set_postfix_str(f"{names[0]}, {_shown()}")
        yield
        for name in names:
            self._tell("layer", name=name)

    def block(self, name: str) -> None:
        """Tells that one more block of the phase is done."""
        if self._phase is not None:
            self._phase.done += 1
            self._phase.bar.update()
            self._say(self._phase)
        self._tell("block", name=name)

    def _say(self, phase: Phase) -> None:
        """Writes a line now and then where standard error is no terminal, and a bar would be none."""
        now = time.perf_counter()
        if self._quiet or sys.stderr.isatty() or now - self._spoke < SAY_EVERY:
            return
        self._spoke = now
        told = phase.told()
        eta = "" if told.get("eta_seconds") is None else f", about {told['eta_seconds'] / 60:.1f} min left"
        sys.stderr.write(f"{phase.name}: {phase.done} of {phase.total} blocks{eta}, {_shown()}\n")
        sys.stderr.flush()

    def _tell(self, event: str, **values: Any) -> None:
        if self._handle is None:
            return
        line = {"event": event, **values} | ({} if self._phase is None else self._phase.told())
        line |= {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        line |= {"seconds": round(time.perf_counter() - self._began, 3), **memory()}
        try:
            self._handle.write(json.dumps(line).encode() + b"\n")
        except OSError as error:  # a run is worth more than its log
            self._handle.close()
            self._handle = None
            logging.getLogger(__name__).warning("the log %s ends here, the run goes on: %s", self._log, error)


def memory() -> dict[str, int]:
    """Returns the bytes this process has in memory, and the most its GPUs held so far, where it uses any."""
    import psutil

    found = {"rss_bytes": psutil.Process().memory_info().rss}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu_peak_bytes"] = sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))
    return found


def check_log(log: str | Path, apart: Mapping[str, str | None]) -> Path:
    """Checks that a log can be written or continued, before any work; leaves nothing behind.

    Args:
        log: The file.
        apart: Folders and files by what they are; the log may not lie in them. They need not exist.

    Raises:
        OutputError: It is a folder, lies in another place, cannot be written, or holds something else than a log.
    """
    path = check_file(log, overwrite=True)
    for kind, name in apart.items():
        place = None if name is None else os.path.realpath(os.path.expanduser(name))
        if place is not None and Path(place) in (path, *path.parents):
            raise OutputError(f"log {str(log)!r} is or lies in the {kind} itself; wanted another place")
    try:
        if path.exists():
            with path.open("r+b") as handle:
                first = handle.readline(LONGEST) if path.is_file() else b"a device or a pipe"
            if first and not _is_line(first):
                raise OutputError(f"log {str(log)!r} is there and no log of a run; wanted a new file")
    except OSError as error:
        raise OutputError(f"log {str(log)!r} cannot be written: {error.strerror}") from error
    return path


def _is_line(text: bytes) -> bool:
    try:
        line = parse_json(text)
    except ValueError:
        return False
    return isinstance(line, dict) and "event" in line


def _open(path: Path) -> BinaryIO:
    """Opens a log behind its last whole line: what a power cut tore is taken away."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("ab", buffering=0)
        handle.truncate(path.read_bytes().rfind(b"\n") + 1)
        return handle
    except OSError as error:
        raise OutputError(f"log {str(path)!r} cannot be written: {error.strerror}") from error


def _shown() -> str:
    return ", ".join(f"{name.split('_')[0]} {size / 1e9:.1f} GB" for name, size in memory().items())
