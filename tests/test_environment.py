# SPDX-License-Identifier: Apache-2.0
"""Runs where little is as usual: another locale, odd paths, no home, no network, no compiler, no cache, few open
files, warnings that are errors."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
from in_process import COMMANDS, Box, run_command

from lord_quant.errors import ConfigError, OutputError
from lord_quant.runs.journal import Journal


NOWHERE = "/proc"
"""A folder that nobody can write, root neither."""
UNREACHABLE = """
import socket
def refuse(*_, **__):
    raise OSError(101, "Network is unreachable")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""
MAIN = "from optimum.commands.optimum_cli import main; main()"
FLAGS = ["--rank-ratio", "0.25", "--group-size", "32", "--num-samples", "4", "--seq-len", "64"]


def bare(**others: str) -> dict[str, str]:
    """An environment of nothing but a plain locale, a search path without a compiler and a home that takes nothing."""
    return {"LC_ALL": "C", "PATH": str(Path(sys.executable).parent), "HOME": NOWHERE, "OMP_NUM_THREADS": "1", **others}


def run(*arguments: str | Path, flags: tuple[str, ...] = (), **how: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", MAIN, "lord", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False, **how)


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


@pytest.mark.slow
def test_a_run_where_little_is_as_usual(model_folder: Callable[..., Path], corpus_file: Path, tmp_path: Path) -> None:
    """Nobody is warned of anything, it ends with the bytes of a usual run, and nothing is written anywhere else."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(UNREACHABLE)
    odd = tmp_path / "ein Ordner – 模型 [1]"
    model = Path(shutil.copytree(model_folder("llama"), odd / "le modèle"))
    text = Path(shutil.copy(corpus_file, odd / "données à lire.jsonl"))
    arguments = ["quantize", "--model", model.relative_to(odd), "--dataset", text, "--output", "aus gabe/ü*", *FLAGS]
    environment = bare(PYTHONPATH=str(tmp_path / "site"), TMPDIR=NOWHERE, HF_HOME=f"{NOWHERE}/cache")
    before = set(tmp_path.rglob("*"))
    done = run(*arguments, flags=("-W", "error"), cwd=odd, env=environment, preexec_fn=few_files)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "written to" in done.stdout
    output = odd / "aus gabe" / "ü*"
    made = {path for path in set(tmp_path.rglob("*")) - before if output not in path.parents}
    assert {path for path in made if tmp_path / "site" not in path.parents} == {output.parent, output}
    usual = tmp_path / "usual"
    assert run_command("quantize", "--model", model, "--dataset", text, "--output", usual, *FLAGS) == 0
    assert families.different_tensors(output, usual) == []


@pytest.mark.slow
def test_names_that_the_encoding_does_not_have(tmp_path: Path) -> None:
    """Tokenizers and safetensors take UTF-8 alone, whatever the locale."""
    done = run("inspect", tmp_path / "modèle", env=bare(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"), cwd=tmp_path)
    assert done.returncode == ConfigError.exit_code and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("optimum-cli lord: ConfigError: ") and "wanted names in UTF-8" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_encoding(name: str) -> None:
    parser = argparse.ArgumentParser(prog=name)
    COMMANDS[name].add_arguments(parser)
    assert parser.format_help().isascii()


def test_no_room_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python looks in TMPDIR, the usual places and here; hosts ask for one as soon as they are imported."""
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", None)
        patched.setattr(tempfile, "_candidate_tempdir_list", lambda: [NOWHERE])
        assert run_command("inspect", tmp_path) == OutputError.exit_code
    assert "OutputError: no folder takes temporary files: No usable temporary directory" in capfd.readouterr().err


FILL = """
mount -t tmpfs -o size=64k none "$1" && dd if=/dev/zero of="$1/fill" bs=4096 2>/dev/null
truncate --size=-"$2" "$1/fill"
cd "$1"
for place in $3; do test ! -d "$place" || mount --bind "$1" "$place"; done
shift 3 && exec "$@"
"""
"""Mounts a file system, fills it but for some bytes, puts it in the place of folders, and runs a command in it."""
USUAL_PLACES = "/var/tmp /usr/tmp /tmp"  # the last may hold what is mounted


def run_in_full(folder: Path, free: int, places: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a file system of which some bytes are free, with TMPDIR there; nobody else sees it."""
    folder.mkdir()
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", folder], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this user may not mount a file system of its own (unshare -m, mount -t tmpfs)")
    shell = ["unshare", "-m", "sh", "-c", FILL, "sh", folder, str(free), places]
    command = [*shell, sys.executable, "-c", MAIN, "lord", *map(str, arguments)]
    environment = os.environ | {"TMPDIR": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_every_folder_for_temporary_files_is_full(tmp_path: Path) -> None:
    done = run_in_full(tmp_path / "full", 0, USUAL_PLACES, "inspect", "/nowhere")
    assert done.returncode == OutputError.exit_code and "Traceback" not in done.stderr
    assert "OutputError: no folder takes temporary files: No usable temporary directory" in done.stderr


@pytest.mark.slow
def test_a_run_whose_temporary_folder_has_a_page_left(
    model_folder: Callable[..., Path], corpus_file: Path, tmp_path: Path
) -> None:
    """Enough to be taken for a folder that takes files. What a run needs room for lies beside its output."""
    source = ["--model", model_folder("llama"), "--dataset", corpus_file, "--output", tmp_path / "out"]
    done = run_in_full(tmp_path / "full", 4096, "", "quantize", *source, *FLAGS)
    assert done.returncode == 0, done.stderr
    assert "verified " in done.stdout and {path.name for path in tmp_path.iterdir()} == {"full", "out"}


def test_a_current_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        assert run_command("inspect", tmp_path) == ConfigError.exit_code
    assert "ConfigError: the current folder cannot be read" in capfd.readouterr().err


def test_a_second_run_into_the_same_folder_is_refused(
    model_folder: Callable[..., Path], corpus_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    box = Box(tmp_path, model_folder("gpt_bigcode"), corpus_file)
    first = Journal(box.output, {"made": "of something"})
    try:
        for flags in ((), ("--overwrite",)):
            assert run_command("quantize", *box.arguments(), *flags) == OutputError.exit_code
            assert f"another run is writing {str(box.output)!r}; wanted one at a time" in capfd.readouterr().err
    finally:
        first.close()
    assert not os.listdir(box.root)
