# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's files were when they were written: a hash of each, and what the model said to a few tokens.

It lies beside them as `lord_manifest.json` and vouches for itself as well: it holds a hash of its own values, and must read
exactly as they are rendered. Hashes find what went wrong on a disk or on the way; they are no signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lord_quant.artifact.fingerprint import Fingerprint
from lord_quant.errors import CheckpointError, reason_of
from lord_quant.files.reading import parse_json


MANIFEST_NAME = "lord_manifest.json"
READ_BY_LOADERS = frozenset({".safetensors", ".bin", ".pt", ".json", ".py", ".jinja", ".model"})
"""Endings of files that loaders may read without being told: one that was not written by the run is a change."""
TEMPLATES = "additional_chat_templates/"
"""The one folder inside a checkpoint that they look into likewise."""


class Manifest(NamedTuple):
    """What was recorded.

    Attributes:
        files: SHA-256 and size in bytes of every file, by path inside the folder.
        fingerprint: Of the compressed model, or None where it was never whole in float.
    """

    files: dict[str, tuple[str, int]]
    fingerprint: Fingerprint | None


def write_manifest(folder: Path, fingerprint: Fingerprint | None) -> None:
    """Records all files of a folder."""
    files = {name: {"sha256": sha256(path), "bytes": path.stat().st_size} for name, path in _files(folder).items()}
    told = None if fingerprint is None else fingerprint.to_dict()
    (folder / MANIFEST_NAME).write_text(_render({"files": files, "fingerprint": told}), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """Reads what was recorded; None if nothing was.

    Raises:
        CheckpointError: The manifest itself was changed or cannot be read.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        values = parse_json(text)
        files = {name: (item["sha256"], item["bytes"]) for name, item in values["files"].items()}
        told = values["fingerprint"]
        sound = text == _render({"files": values["files"], "fingerprint": told})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST_NAME} in {str(folder)!r} cannot be read: {error!r}") from error
    if not sound:
        raise CheckpointError(f"{MANIFEST_NAME} in {str(folder)!r} was changed after it was written")
    return Manifest(files, None if told is None else Fingerprint.from_dict(told))


def changed_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Names every file that is not as it was recorded, and what loaders may read that was not recorded."""
    present = _files(folder)
    for name, (digest, size) in manifest.files.items():
        if name not in present:
            yield f"{name}: missing"
        elif present[name].stat().st_size != size:
            yield f"{name}: {present[name].stat().st_size} bytes, written were {size}"
        else:
            try:
                if sha256(present[name]) != digest:
                    yield f"{name}: its contents were changed after it was written"
            except OSError as error:
                yield f"{name}: cannot be read: {reason_of(error)}"
    for name in sorted(present.keys() - manifest.files.keys()):
        untold = "/" not in name or name.startswith(TEMPLATES)  # an adapter in a folder of its own is read when it is named
        if untold and present[name].suffix in READ_BY_LOADERS:
            yield f"{name}: not written by the run"


def all_there(folder: Path) -> bool:
    """Tells whether all files that were recorded are there with their sizes, without reading them.

    Raises:
        CheckpointError: The manifest was changed or cannot be read.
        OSError: The folder cannot be read.
    """
    manifest, present = read_manifest(folder), _files(folder)
    return manifest is not None and all(
        name in present and present[name].stat().st_size == size for name, (_, size) in manifest.files.items()
    )


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """Returns all files by path inside the folder."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: path for path in found if (name := path.relative_to(folder).as_posix()) != MANIFEST_NAME}


def _render(values: Mapping[str, Any]) -> str:
    """Renders the values with a hash of them."""
    own = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps({**values, "sha256": own}, indent=2) + "\n"
