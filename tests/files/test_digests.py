# SPDX-License-Identifier: Apache-2.0
"""Digests: of models that differ in one number, of settings, of files that are gone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lord_quant.errors import CheckpointError
from lord_quant.files.digests import digest_of_file, digest_of_values, model_digest


def test_digests_tell_models_apart(tmp_path: Path) -> None:
    weights = {"a": torch.arange(40000.0), "b": torch.ones(3)}
    files = []
    for name in ("one", "same", "changed"):
        if name == "changed":
            weights["a"][20] += 1
        files.append(str(tmp_path / name))
        save_file(weights, files[-1])
    one, same, changed = (model_digest({"n": 1}, [file]) for file in files)
    assert one == same != changed
    assert model_digest({"n": 2}, files[:1]) != one
    for name, place in (("b", 1), ("a", 0), ("a", -1)):  # a norm, say, among much that is the same
        other = {"a": torch.arange(40000.0), "b": torch.ones(3)}
        other[name][place] += 1
        save_file(other, files[-1])
        assert model_digest({"n": 1}, files[-1:]) != one
    assert model_digest({"n": 1, "_name_or_path": "here", "dtype": "bfloat16"}, files[:1]) == one


def test_values_count_and_not_their_order() -> None:
    assert (
        digest_of_values({"a": 1, "b": [2]}) == digest_of_values({"b": [2], "a": 1}) != digest_of_values({"a": 1, "b": [3]})
    )


def test_a_file_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"some bytes")
    assert digest_of_file(str(tmp_path / "file"), "plan") == hashlib.sha256(b"some bytes").hexdigest()
    with pytest.raises(CheckpointError, match=r"plan '.*gone' cannot be read: No such file"):
        digest_of_file(str(tmp_path / "gone"), "plan")
