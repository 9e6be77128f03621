# SPDX-License-Identifier: Apache-2.0
"""The journal of a run: what it gives back, what it refuses, what a torn line does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lord_quant.errors import OutputError
from lord_quant.runs.journal import JOURNAL, Journal


MADE_OF = {"seed": 1, "gptq": {"bits": 4}, "versions": {"torch": "2"}}


def test_a_journal_gives_back_what_was_said_and_saved(tmp_path: Path) -> None:
    first = Journal(tmp_path / "out", MADE_OF)
    first.save("streams", {"a": torch.arange(6.0).reshape(2, 3).T})
    first.finish({"loss": 0.1 + 0.2})
    first.close(keep=True)
    again = Journal(tmp_path / "out", MADE_OF)
    assert again.blocks == [{"loss": 0.1 + 0.2}]
    assert torch.equal(again.load("streams")["a"], torch.arange(6.0).reshape(2, 3).T)
    again.drop("streams")
    with pytest.raises(OutputError, match=r"streams.safetensors' of an unfinished run cannot be read"):
        again.load("streams")
    again.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", [b'{"loss": 2', b'{"loss": 2\n', b"\x00\x00\n", b"\xff"])
def test_a_line_that_was_not_written_to_its_end_does_not_count(torn: bytes, tmp_path: Path) -> None:
    first = Journal(tmp_path / "out", MADE_OF)
    first.finish({"loss": 1})
    first.close(keep=True)
    with (first.folder / JOURNAL).open("ab") as handle:
        handle.write(torn)
    second = Journal(tmp_path / "out", MADE_OF)
    assert second.blocks == [{"loss": 1}]
    second.finish({"loss": 3})
    second.close(keep=True)
    third = Journal(tmp_path / "out", MADE_OF)
    assert third.blocks == [{"loss": 1}, {"loss": 3}]
    third.close()


def test_what_a_killed_run_was_just_writing_is_removed(tmp_path: Path) -> None:
    first = Journal(tmp_path / "out", MADE_OF)
    first.finish({})
    first.close(keep=True)
    (first.folder / ".block-00001.safetensors.partial-abc").write_bytes(b"half")
    (tmp_path / ".out.partial-abc").mkdir()
    (tmp_path / ".other.partial-abc").mkdir()
    Journal(tmp_path / "out", MADE_OF).close(keep=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-abc", ".out.unfinished"]
    assert not list(first.folder.glob(".*"))


def test_going_back_leaves_the_first_blocks_and_what_was_saved(tmp_path: Path) -> None:
    first = Journal(tmp_path / "out", MADE_OF)
    for loss in range(3):
        first.finish({"loss": loss})
    for name in ("streams-1", "streams-2", "other"):
        first.save(name, {"a": torch.ones(1)})
    (first.folder / ".streams-3.safetensors.partial-abc").write_bytes(b"half")
    assert first.saved("streams-") == {"streams-1", "streams-2"}
    first.go_back(1)
    first.finish({"loss": 7})
    first.close(keep=True)
    again = Journal(tmp_path / "out", MADE_OF)
    assert again.blocks == [{"loss": 0}, {"loss": 7}] and again.saved("") == {"streams-1", "streams-2", "other"}
    again.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"file/\.out\.unfinished' cannot be used: Not a directory"):
        Journal(tmp_path / "file" / "out", MADE_OF)


def test_another_run_is_refused_by_what_differs_or_starts_again(tmp_path: Path) -> None:
    first = Journal(tmp_path / "out", MADE_OF)
    first.finish({})
    first.close(keep=True)
    with pytest.raises(OutputError, match=r"differs: seed was 1, now 2; dtype was None, now 'bfloat16'\. .*--overwrite"):
        Journal(tmp_path / "out", MADE_OF | {"seed": 2, "dtype": "bfloat16"})
    inside = MADE_OF | {"gptq": {"bits": 3, "sym": True}}
    nested = Journal(tmp_path / "out", inside, restart=True)
    nested.finish({})
    nested.close(keep=True)
    with pytest.raises(OutputError, match=r"differs: gptq\.bits was 3, now 4\. Run"):
        Journal(tmp_path / "out", MADE_OF | {"gptq": {"bits": 4, "sym": True}})
    again = Journal(tmp_path / "out", MADE_OF | {"seed": 2}, restart=True)
    assert again.blocks == []
    again.close(keep=True)
    Journal(tmp_path / "out", MADE_OF | {"seed": 2}).close()


def test_two_runs_at_a_time_are_refused(tmp_path: Path) -> None:
    first = Journal(tmp_path / "out", MADE_OF)
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"another run is writing .*one at a time"):
            Journal(tmp_path / "out", MADE_OF, restart=restart)
    first.finish({})
    first.close(keep=True)
    second = Journal(tmp_path / "out", MADE_OF)
    assert second.blocks == [{}]
    second.close()
