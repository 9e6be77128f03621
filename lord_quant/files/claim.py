# SPDX-License-Identifier: Apache-2.0
"""One run at a time writes an output: a lock in a hidden folder beside it, where a run may also keep what it has finished.

The kernel holds the lock for as long as the process lives, so that of a killed run only a file stays, and it blocks nobody.
"""

from __future__ import annotations

import contextlib
import glob
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lord_quant.errors import OutputError


LOCK = "lock"


def folder_of(output: Path) -> Path:
    """Returns where the lock lies, and what survives of a run."""
    return output.parent / f".{output.name}.unfinished"


def sensed_beside(output: Path, run_sha256: str) -> Path:
    """Returns where a run keeps what its sensitivity pass found, for when it is cut off and started again."""
    return output.parent / f".{output.name}.sensed-{run_sha256[:16]}"


def sensing_beside(output: Path, run_sha256: str) -> Path:
    """Returns where a sensitivity pass keeps what it has measured so far, likewise."""
    return output.parent / f".{output.name}.sensing-{run_sha256[:16]}"


def forget_sensed(output: Path) -> None:
    """Removes what runs into an output kept of their sensitivity passes, and what a killed one was just writing of it."""
    for kind in ("sensed", "sensing"):
        own = f".{glob.escape(output.name)}.{kind}-*"
        for path in (*output.parent.glob(own), *output.parent.glob(f".{own}.partial-*")):
            path.unlink(missing_ok=True)


class Claim:
    """The right to write an output, held until it is released.

    Args:
        output: The folder or file that will be written.

    Attributes:
        folder: Where the lock lies.

    Raises:
        OutputError: Another run has it.
        OSError: The folder cannot be used.
    """

    def __init__(self, output: Path) -> None:
        self.folder = folder_of(output)
        self._output = output
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self._lock = FileLock(self.folder / LOCK)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            for path in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):  # what a killed run was just writing
                if path.is_dir():
                    shutil.rmtree(path)
            self._remove_replaced()
        except Timeout:
            raise OutputError(f"another run is writing {str(output)!r}; wanted one at a time") from None
        except OSError:
            self.release(keep=True)
            raise

    def others(self) -> list[Path]:
        """Returns what lies in the folder beside the lock."""
        return [path for path in self.folder.iterdir() if path.name != LOCK]

    def release(self, *, keep: bool = False) -> None:
        """Lets other runs write; removes the folder, unless something in it is still needed, and empty ones it lay in."""
        self._remove_replaced()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        if self.folder in self._made and not self.folder.exists():
            self._made.remove(self.folder)
        with contextlib.suppress(OSError):  # one of them holds something: the output, or what is kept
            for path in self._made:
                path.rmdir()

    def _remove_replaced(self) -> None:
        """Removes what a killed run was just removing, having replaced it; not where it is all that there is."""
        if self._lock.is_locked and self._output.exists():
            for path in self._output.parent.glob(f".{glob.escape(self._output.name)}.replaced-*"):
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Lets nobody else write an output while the body does, which keeps nothing; what another run keeps there stays.

    Raises:
        OutputError: Another run is writing it, or it cannot be written.
    """
    try:
        claim = Claim(output)
        kept = bool(claim.others())
    except OSError as error:
        raise OutputError(f"output {str(output)!r} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        claim.release(keep=kept)
