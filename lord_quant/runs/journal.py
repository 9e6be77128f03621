# SPDX-License-Identifier: Apache-2.0
"""What survives of a run that was cut off: finished blocks, where both streams stood, and a line about each.

Everything lies in a hidden folder beside the output. A block counts when its line is in the journal, and the line is
written last. The first line says what the run is made of, and a run that differs in anything does not continue it. One run
at a time: a second one is refused (`files/claim.py`).

Of several processes the first writes the journal and the blocks; each keeps there where its own streams stood.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lord_quant.checkpoint import atomic_file
from lord_quant.errors import OutputError, SpoiltError
from lord_quant.files.claim import Claim, folder_of
from lord_quant.files.kept import read_tensors
from lord_quant.files.reading import open_tensors, parse_json


logger = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
SHARD = "shard_sha256"
"""What a block's line calls the digest of its weights."""
TENSORS = "tensors_sha256"
"""What other files call the digest of what is in them."""


class Unfinished:
    """What a run has finished, as those of its processes see it that do not write the journal.

    Args:
        output: The folder the run is to write.
        blocks: What the journal says of every finished block, from the first.

    Attributes:
        folder: Where everything lies.
        blocks: Likewise, with those finished meanwhile.
    """

    def __init__(self, output: Path, blocks: list[dict[str, Any]]) -> None:
        self.folder = folder_of(output)
        self.blocks = blocks

    def shard(self, block: int) -> Path:
        """Returns the file of a block's finished weights."""
        return self.folder / f"block-{block:05}.safetensors"

    def save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes tensors and a digest of them; they appear by one rename.

        Raises:
            OutputError: They cannot be written.
        """
        from safetensors.torch import save_file

        here = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        with atomic_file(self._file(name)) as staging:
            save_file(here, staging, metadata={TENSORS: _digest_of(here)})

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """Returns tensors that were saved.

        Raises:
            SpoiltError: They cannot be read.
        """
        from safetensors import SafetensorError

        try:
            return read_tensors(self._file(name))
        except (OSError, SafetensorError) as error:
            raise SpoiltError(
                f"{str(self._file(name))!r} of an unfinished run cannot be read ({error}); remove its folder to start again"
            ) from error

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of tensors that were saved; none if they are not there or not as they were, which is told."""
        path = self._file(name)
        if not path.is_file():
            return {}
        with contextlib.suppress(SpoiltError):
            tensors = self.load(name)
            with open_tensors(str(path)) as handle:
                told = (handle.metadata() or {}).get(TENSORS)
            if told == _digest_of(tensors):
                return {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        logger.warning("%s is damaged: the run goes on from where it does not need it", path)
        return {}

    def saved(self, prefix: str) -> set[str]:
        """Returns the names of tensors that were saved and begin with a prefix."""
        return {path.stem for path in self.folder.glob(f"{prefix}*.safetensors")}

    def drop(self, name: str) -> None:
        """Removes tensors that are not needed any more."""
        self._file(name).unlink(missing_ok=True)

    def finish(self, block: Mapping[str, Any]) -> None:
        """Hears that the next block is finished."""
        self.blocks.append(dict(block))

    def go_back(self, blocks: int) -> None:
        """Hears that only the first blocks count as finished."""
        self.blocks = self.blocks[:blocks]

    def close(self, *, keep: bool = False) -> None:
        """Leaves everything to the process that writes the journal."""

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


class Journal(Unfinished):
    """The journal of one run.

    Args:
        output: The folder the run is to write.
        made_of: What must be the same for a run to continue it: JSON values.
        restart: Whether what another run left there is thrown away instead of refused.
        go_on: Whether the run goes on, and finished blocks are held against their digests.

    Raises:
        OutputError: Another run is at work there, an unfinished one differs, and in what, or the folder cannot be used.
    """

    def __init__(self, output: Path, made_of: Mapping[str, Any], *, restart: bool = False, go_on: bool = True) -> None:
        super().__init__(output, [])
        self.made_of = json.loads(json.dumps(made_of))
        claim = None
        try:
            claim = self._claim = Claim(output)
            lines = self._lines()
            if lines and lines[0] != self.made_of and not restart:
                raise OutputError(self._differs(lines[0]))
            if lines and lines[0] == self.made_of:
                self.blocks = lines[1:]
                if go_on:
                    self._go_back_to_what_is_sound()
            else:
                for path in claim.others():
                    path.unlink()
                self._append(self.made_of)
            for path in self.folder.glob(".*.partial-*"):  # what a killed run was just writing
                path.unlink()
        except OutputError:
            if claim is not None:
                claim.release(keep=True)
            raise
        except OSError as error:
            if claim is not None:
                claim.release(keep=bool(self.blocks))
            raise OutputError(f"{str(self.folder)!r} cannot be used: {error.strerror or error}") from error

    def finish(self, block: Mapping[str, Any]) -> None:
        """Says that the next block is finished; all that belongs to it is written already.

        Raises:
            OutputError: It cannot be written.
        """
        try:
            digest = self._digest(len(self.blocks))
            block = dict(block) | ({} if digest is None else {SHARD: digest})
            self._append(block)
        except OSError as error:
            raise OutputError(f"{str(self.folder)!r} cannot be written: {error.strerror or error}") from error
        self.blocks.append(block)

    def go_back(self, blocks: int) -> None:
        """Lets only the first blocks count as finished.

        Raises:
            OutputError: It cannot be written.
        """
        lines = [self.made_of, *self.blocks[:blocks]]
        with atomic_file(self.folder / JOURNAL) as staging:
            staging.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self.blocks = self.blocks[:blocks]

    def close(self, *, keep: bool = False) -> None:
        """Lets other runs have the folder; removes it, unless something in it is still needed."""
        self._claim.release(keep=keep)

    def _go_back_to_what_is_sound(self) -> None:
        """Lets blocks from the first on whose weights are not as they were written count no more."""
        for index, block in enumerate(self.blocks):
            if block.get(SHARD) != self._digest(index):
                logger.warning("%s is gone or damaged: the run goes on from block %d", self.shard(index), index)
                self.go_back(index)
                return

    def _digest(self, block: int) -> str | None:
        """Returns a SHA-256 of a block's finished weights; None if there are none."""
        path = self.shard(block)
        if not path.is_file():
            return None
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    def _lines(self) -> list[dict[str, Any]]:
        """Reads the journal up to the first line that was not written to its end."""
        path, found = self.folder / JOURNAL, []
        whole = 0
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                try:
                    values = parse_json(line)
                except ValueError:
                    break
                if not isinstance(values, dict):
                    break
                found.append(values)
                whole += len(line)
            os.truncate(path, whole)
        return found

    def _append(self, values: Mapping[str, Any]) -> None:
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(values) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def _differs(self, other: Mapping[str, Any]) -> str:
        was, now = _flat(other), _flat(self.made_of)
        names = [name for name in {**now, **was} if now.get(name) != was.get(name)]
        shown = "; ".join(f"{name} was {was.get(name)!r}, now {now.get(name)!r}" for name in names)
        return (
            f"an unfinished run in {str(self.folder)!r} differs: {shown}. Run the same command to continue it, or "
            "--overwrite to start again"
        )


def _digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns a SHA-256 of tensors in the host's memory, contiguous, by name."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns settings by their path, such as `gptq.bits`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return flat
