# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint may be written, and that its folder appears whole or not at all."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lord_quant.checkpoint import atomic_file, atomic_folder, check_file, check_output
from lord_quant.errors import OutputError
from lord_quant.files.claim import claimed


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    (path / "model.safetensors").write_bytes(b"")
    return path


# What may be written to


@pytest.mark.parametrize("name", ["new", "new/deeper/still", "empty"])
def test_a_free_output_is_accepted_and_nothing_is_left_behind(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    before = listing(tmp_path)
    assert check_output(tmp_path / name) == tmp_path / name
    assert listing(tmp_path) == before


def test_a_relative_output_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_output("out") == tmp_path / "out"


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is the current folder"):
        check_output(".")


def test_a_folder_with_anything_in_it_needs_overwrite(tmp_path: Path) -> None:
    out = model_folder(tmp_path / "out")
    with pytest.raises(OutputError, match=r"out' is not empty.*--overwrite"):
        check_output(out)
    assert check_output(out, overwrite=True) == out


def test_overwrite_only_replaces_model_folders(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no model folder"):
        check_output(tmp_path / "home", overwrite=True)
    (tmp_path / "home" / "config.json").write_text('{"editor": "vi"}')  # some other program's
    (tmp_path / "home" / "x.safetensors").write_bytes(b"")
    with pytest.raises(OutputError, match="no model folder"):
        check_output(tmp_path / "home", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=True)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_no_folder(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file", overwrite=overwrite)
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / "file" / "below", overwrite=overwrite)


@pytest.mark.parametrize("output", ["model", "model/../model", "link", "parent", "."])
def test_the_model_itself_and_what_holds_it_are_refused_even_with_overwrite(tmp_path: Path, output: str) -> None:
    folder = model_folder(tmp_path / "parent" / "model")
    (folder.parent / "config.json").write_text("{}")
    (folder.parent / "link").symlink_to(folder)
    for given in (str(folder), str(folder.parent / "link")):
        target = folder.parent / output if output not in ("parent", ".") else folder.parent / ("." if output == "." else "")
        with pytest.raises(OutputError, match="is or holds the model itself"):
            check_output(target, overwrite=True, model=given)
    assert (folder / "config.json").is_file()


def test_a_neighbour_of_the_model_and_a_hub_name_are_fine(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    check_output(tmp_path / "model-lord", model=str(folder))
    check_output(tmp_path / "out", model="org/model")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: /proc"):
        check_output("/proc/lord-quant-test")


def test_an_error_of_the_file_system_becomes_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lord_quant.checkpoint.tempfile.mkdtemp", refuse)
    with pytest.raises(OutputError, match=r"cannot be written.*Permission denied"):
        check_output(tmp_path / "out")


def test_links_to_nowhere_and_mount_points_are_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="does not exist"):
        check_output(tmp_path / "link")
    with pytest.raises(OutputError, match="mount point"):
        check_output("/dev/shm")


# Atomic writing


def test_the_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as staging:
        (staging / "a").write_text("1")
        (staging / "sub").mkdir()
        (staging / "sub" / "b").write_text("2")
        assert not out.exists() and staging.parent == out.parent
    assert listing(tmp_path) == ["deep", "deep/out", "deep/out/a", "deep/out/sub", "deep/out/sub/b"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_changes_nothing(tmp_path: Path, existing: bool, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "old").write_text("old")
    before = listing(tmp_path)
    with pytest.raises(error), atomic_folder(out) as staging:
        (staging / "new").write_text("new")
        raise error
    assert listing(tmp_path) == before


def test_an_existing_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = model_folder(tmp_path / "out")
    (out / "stale.safetensors").write_text("old")
    with atomic_folder(out, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
        assert (out / "stale.safetensors").read_text() == "old"  # still there while the new one is written
    assert listing(tmp_path) == ["out", "out/config.json"] and (out / "config.json").read_text() == "new"


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = model_folder(tmp_path / "out")
    rename = Path.rename

    def flaky(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", flaky)
    with (
        pytest.raises(OutputError, match=r"Input/output.*kept at") as caught,
        atomic_folder(out, overwrite=True) as staging,
    ):
        (staging / "config.json").write_text("new")
    assert "gpt2" in (out / "config.json").read_text()
    assert str(staging) in str(caught.value) and (staging / "config.json").read_text() == "new"  # hours of work


def test_what_appears_during_the_run_is_not_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"appeared.*kept at") as caught, atomic_folder(out) as staging:
        (staging / "config.json").write_text("new")
        out.mkdir()
        (out / "precious.txt").write_text("years of work")
    assert (out / "precious.txt").read_text() == "years of work"
    with claimed(out):  # another run, which removes what a killed one left
        kept = next(tmp_path.glob(".out.kept-*"))
    assert str(kept) in str(caught.value) and (kept / "config.json").read_text() == "new"


def test_the_folder_has_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "out"):
            pass
        (tmp_path / "plain").mkdir()
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "plain")]
    assert modes == [0o750, 0o750]


def test_files_of_hosts_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    """safetensors makes files that only their owner may read."""
    old = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "single") as staging:
            save_file({"tensor": torch.ones(2)}, staging)
        with atomic_folder(tmp_path / "out") as folder:
            save_file({"tensor": torch.ones(2)}, folder / "model.safetensors")
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("single", "out/model.safetensors")]
    assert modes == [0o640, 0o640]


def test_output_files_are_checked_before_work(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(OutputError, match="exists; wanted a new file, or --overwrite"):
        check_file(tmp_path / "there")
    assert check_file(tmp_path / "there", overwrite=True).read_text() == "mine"
    with pytest.raises(OutputError, match="is a folder"):
        check_file(tmp_path)
    assert check_file(tmp_path / "new" / "file") == tmp_path / "new" / "file" and not (tmp_path / "new").exists()
    for kind in ("model", "dataset"):
        with pytest.raises(OutputError, match=f"is or lies in the {kind} itself"):
            check_file(tmp_path / "there", overwrite=True, **{kind: str(tmp_path)})
        with pytest.raises(OutputError, match=f"is or lies in the {kind} itself"):
            check_file(tmp_path / "there", overwrite=True, **{kind: str(tmp_path / "there")})


def test_a_folder_that_would_become_calibration_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="lies in the dataset; wanted a folder outside"):
        check_output(tmp_path / "runs" / "out", dataset=str(tmp_path))
    assert check_output(tmp_path / "out", model=str(tmp_path)) == tmp_path / "out"


def test_a_name_that_leaves_no_room_for_those_made_of_it_is_refused(tmp_path: Path) -> None:
    assert check_output(tmp_path / ("x" * 220), dataset=None)
    with pytest.raises(OutputError, match="name too long"):
        check_output(tmp_path / ("x" * 235))
    assert list(tmp_path.iterdir()) == []
