# SPDX-License-Identifier: Apache-2.0
"""SHA-256 digests that tell models, settings and files apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lord_quant.errors import CheckpointError
from lord_quant.files.reading import parse_json


SAMPLES, SAMPLE_BYTES = 16, 4096
"""Pieces that are read of a large tensor to tell it from others, from first to last, and bytes of each."""
COMPANIONS = {".json", ".jinja", ".txt", ".model"}
APART = {"config.json", "model.safetensors.index.json", "lord_report.json", "lord_manifest.json"}
"""Files with other tellers, or none."""
PASSING = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})
"""What a configuration says of how it was loaded and by what."""


def digest_of_values(values: Mapping[str, Any]) -> str:
    """Returns a SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: str, what: str) -> str:
    """Returns a SHA-256 of a file's bytes.

    Args:
        path: The file.
        what: What it is called where it cannot be read.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{what} {path!r} cannot be read: {error.strerror}") from error


def companions_digest(model: str) -> str | None:
    """Returns a SHA-256 of what lies beside a model's weights and goes with them: tokenizer, chat template, generation.

    None for a model on the hub, of which more files may be there the next time.
    """
    if not os.path.isdir(model):
        return None
    paths = [path for path in sorted(Path(model).iterdir()) if path.is_file() and path.suffix in COMPANIONS]
    own = [path for path in paths if path.name not in APART]
    return digest_of_values({path.name: digest_of_file(str(path), "the model's file") for path in own})


def model_digest(config: dict[str, Any], files: Sequence[str]) -> str:
    """Returns a SHA-256 that tells models apart, without reading all of them.

    Args:
        config: The model's configuration as plain values; what says nothing of the model itself is left out.
        files: Its safetensors files; of each the header, the size and of every tensor all of it, if it is small, or
            `SAMPLES` pieces count.
    """
    own = {key: value for key, value in config.items() if key not in PASSING}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode())
    for file in sorted(files):
        with open(file, "rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")
            header = handle.read(start - 8)
            digest.update(header)
            digest.update(handle.seek(0, 2).to_bytes(8, "little"))
            for begin, end in sorted(_spans(header)):
                whole = end - begin <= SAMPLES * SAMPLE_BYTES
                for sample in range(1 if whole else SAMPLES):
                    handle.seek(start + begin + (end - begin - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                    digest.update(handle.read(end - begin if whole else SAMPLE_BYTES))
    return digest.hexdigest()


def _spans(header: bytes) -> list[tuple[int, int]]:
    """Returns where tensors lie by a safetensors header, from and to; nothing of a spoilt one, which others refuse."""
    try:
        found = [tensor["data_offsets"] for name, tensor in parse_json(header).items() if name != "__metadata__"]
        return [(int(begin), int(end)) for begin, end in found]
    except (AttributeError, LookupError, TypeError, ValueError):
        return []
