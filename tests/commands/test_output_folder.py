# SPDX-License-Identifier: Apache-2.0
"""Output folders that `quantize` refuses to write or to replace."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import Box, run_command

from lord_quant.checkpoint import check_output
from lord_quant.errors import OutputError


NOBODY = 65534


@pytest.fixture
def try_as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where root runs the tests, who may write everywhere, the check of the output tries its folder as nobody."""
    make = tempfile.mkdtemp

    def make_as_nobody(*args: Any, **kwargs: Any) -> str:
        os.seteuid(NOBODY)
        try:
            return make(*args, **kwargs)
        finally:
            os.seteuid(0)

    if os.geteuid() == 0:
        try:
            os.seteuid(NOBODY)
        except OSError as error:  # a container with no such user, or a root without rights
            pytest.skip(f"root cannot act as nobody here: {error.strerror}")
        os.seteuid(0)
        monkeypatch.setattr("lord_quant.checkpoint.tempfile.mkdtemp", make_as_nobody)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that everybody may enter; pytest's own are closed to all but their owner."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.usefixtures("try_as_nobody")
def test_a_folder_without_write_permission_is_refused(
    box: Box, public_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    box.flags["--output"] = public_folder / "output"
    assert run_command("quantize", "--dry-run", *box.arguments()) == 0  # it can be entered and written
    capfd.readouterr()
    public_folder.chmod(0o555)
    assert run_command("quantize", *box.arguments()) == OutputError.exit_code
    message = capfd.readouterr().err
    assert "OutputError" in message and "Permission denied" in message
    assert list(public_folder.iterdir()) == []


def test_a_folder_that_may_not_be_entered_is_refused(public_folder: Path) -> None:
    """Below it nothing can even be looked at."""
    (public_folder / "closed").mkdir(mode=0o000)
    drop = f"os.setuid({NOBODY})" if os.geteuid() == 0 else "pass"  # for good, so in a process of its own, after imports
    script = f"""import os
from lord_quant.checkpoint import check_output
{drop}
check_output({str(public_folder / "closed" / "x" / "out")!r})"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "OutputError" in done.stderr and "closed" in done.stderr.splitlines()[-1]
    assert "Permission denied" in done.stderr.splitlines()[-1]


def test_what_was_replaced_and_cannot_be_removed_is_told_as_that(public_folder: Path) -> None:
    """Its own subfolder is closed to writing, by someone who runs the tests or acts as nobody."""
    drop = f"os.setuid({NOBODY})" if os.geteuid() == 0 else "pass"
    script = f"""import os
from pathlib import Path
from lord_quant.checkpoint import atomic_folder
{drop}
out = Path({str(public_folder)!r}) / "out"
(out / "closed").mkdir(parents=True)
(out / "closed" / "x").write_text("old")
(out / "closed").chmod(0o555)
with atomic_folder(out, overwrite=True) as staging:
    (staging / "new").write_text("new")"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert "OutputError" in last and "is in place, but what it replaced could not be removed" in last
    assert [path.name for path in (public_folder / "out").iterdir()] == ["new"]
    (left,) = public_folder.glob(".out.replaced-*")
    assert repr(str(left)) in last and (left / "out" / "closed" / "x").read_text() == "old"
    (left / "out" / "closed").chmod(0o755)  # or nothing here can be removed


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_is_read_is_not_written_over(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "data" / "text.txt"
    source.parent.mkdir()
    source.write_text("text")
    for output in (source, source.parent):
        with pytest.raises(OutputError, match=f"is or holds the {kind} itself"):
            check_output(output, **{kind: str(source)})
    assert check_output(tmp_path / "free", **{kind: str(source)}) == tmp_path / "free"


def test_a_read_only_file_system_is_refused(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    """As root too: /proc takes no folders."""
    box.flags["--output"] = "/proc/lord-output"
    assert run_command("quantize", *box.arguments()) == OutputError.exit_code
    assert "OutputError: output '/proc/lord-output' cannot be written" in capfd.readouterr().err


def test_overwrite_never_replaces_what_is_no_model(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    box.occupy()
    assert run_command("quantize", "--overwrite", *box.arguments()) == OutputError.exit_code
    assert "no model folder" in capfd.readouterr().err
    assert (box.output / "thesis.tex").read_text() == "mine"
