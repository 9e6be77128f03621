# SPDX-License-Identifier: Apache-2.0
"""One run at a time writes a folder: the second is refused, by every way in, and the lock goes with its process."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import families
import pytest

from lord_quant.checkpoint import atomic_folder
from lord_quant.config import LordConfig
from lord_quant.errors import OutputError
from lord_quant.files.claim import Claim, claimed, folder_of
from lord_quant.runs.execution import execute
from lord_quant.runs.journal import Journal
from lord_quant.runs.pipeline import prepare


HOLD = """
import sys, time
from pathlib import Path
from lord_quant.files.claim import claimed
with claimed(Path(sys.argv[1])):
    Path(sys.argv[1]).with_name(".out.partial-abc").mkdir()
    print("held", flush=True)
    time.sleep(600)
"""
REFUSED = r"another run is writing .*out'; wanted one at a time"


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    """While it lives everybody else is refused; killed, it blocks nobody, and what it was writing is removed."""
    output = tmp_path / "new" / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, output], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            for claim in (Claim, lambda place: Journal(place, {}), lambda place: claimed(place).__enter__()):
                with pytest.raises(OutputError, match=REFUSED):
                    claim(output)
        finally:
            holder.send_signal(signal.SIGKILL)
    assert {path.name for path in output.parent.iterdir()} == {".out.unfinished", ".out.partial-abc"}
    with claimed(output):
        assert [path.name for path in output.parent.iterdir()] == [".out.unfinished"]
    assert not list(output.parent.iterdir())


def test_what_another_run_keeps_stays_and_nothing_else(tmp_path: Path) -> None:
    """Folders that were made on the way go too; a file of a similar name is somebody else's."""
    output = tmp_path / "deep" / "er" / "out"
    with claimed(output):
        pass
    assert not list(tmp_path.iterdir())
    journal = Journal(output, {"seed": 1})
    journal.finish({"loss": 1})
    journal.close(keep=True)
    (output.parent / ".out.partial-of-a-file").write_text("half")
    with claimed(output):
        pass
    again = Journal(output, {"seed": 1})
    assert again.blocks == [{"loss": 1}]
    again.close()
    assert [path.name for path in output.parent.iterdir()] == [".out.partial-of-a-file"]


def test_what_a_killed_run_had_replaced_goes_once_there_is_another(tmp_path: Path) -> None:
    """Killed between two renames, what it was to replace is all that there is."""
    output, aside = tmp_path / "out", tmp_path / ".out.replaced-abc" / "out"
    aside.mkdir(parents=True)
    with claimed(output):
        assert aside.exists()
    assert aside.exists()
    with claimed(output), atomic_folder(output) as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    aside.mkdir(parents=True)
    with claimed(output):
        assert not aside.parent.exists()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(OutputError, match=r"output '.*file/out' cannot be written: Not a directory"),
        claimed(tmp_path / "file" / "out"),
    ):
        pass


def test_a_refused_journal_lets_go(tmp_path: Path) -> None:
    """One that differs from what is kept holds the lock no longer than its message."""
    first = Journal(tmp_path / "out", {"seed": 1})
    first.finish({})
    first.close(keep=True)
    with pytest.raises(OutputError, match="seed was 1, now 2") as caught:
        Journal(tmp_path / "out", {"seed": 2})
    with claimed(tmp_path / "out"):
        assert caught.value.__traceback__ is not None  # which may hold the journal
    assert folder_of(tmp_path / "out").is_dir()


def test_runs_that_load_the_whole_model_are_refused(
    model_folder: Callable[..., Path], corpus_file: Path, tmp_path: Path
) -> None:
    """Before they load it: the naive stack, and a joint run whose model names its tensors otherwise than transformers."""
    odd = Path(shutil.copytree(model_folder("gpt2"), tmp_path / "odd"))
    families.edit_tensors(odd, lambda tensors: tensors.update(odd=tensors.pop("transformer.h.0.mlp.c_fc.weight")))
    for model, stack in ((model_folder("gpt2"), "naive"), (odd, "joint")):
        settings = {
            "model": str(model),
            "output": str(tmp_path / "out"),
            "stack": stack,
            "lowrank": {"rank_ratio": 0.25},
            "gptq": {"group_size": 32},
            "calibration": {"dataset": str(corpus_file), "num_samples": 2, "seq_len": 32},
        }
        job = prepare(LordConfig.from_dict(settings))
        with claimed(tmp_path / "out"), pytest.raises(OutputError, match=REFUSED):
            execute(job)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
