# SPDX-License-Identifier: Apache-2.0
"""Streamed runs when disks are full, sources go away and streams are old: nothing finished is lost, bytes stay the same."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import build, copy_tokenizer
from test_streaming import config_of, require_same, run

from lord_quant.blocks import residency
from lord_quant.config import LordConfig
from lord_quant.errors import ModelError, NumericsError, OutputError, SpoiltError
from lord_quant.files.claim import folder_of
from lord_quant.runs import execution, joint, streaming
from lord_quant.runs.execution import clear_away, is_finished
from lord_quant.runs.journal import Journal
from lord_quant.runs.pipeline import prepare


pytestmark = pytest.mark.slow

BLOCKS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose blocks lie in files of their own."""
    folder = tmp_path_factory.mktemp("faults") / "model"
    build("llama", num_hidden_layers=BLOCKS).save_pretrained(folder, max_shard_size="700KB")
    copy_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run without faults makes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(config_for(model, output, corpus_file))
    return output


def config_for(model: Path, output: Path, corpus: Path) -> LordConfig:
    """Of both streams a batch takes 0.5 MB, a block less than 0.3 MB, the finished model more than 2 MB."""
    calibration = {"dataset": str(corpus), "num_samples": 8, "seq_len": 128, "batch_size": 4}
    return config_of(model, output, corpus, calibration=calibration)


def after(blocks: int, happens: Callable[[], Any]) -> Callable[..., None]:
    """Returns a `Journal.finish` behind whose line about so many blocks something happens."""
    finish = Journal.finish

    def finish_and_more(journal: Journal, block: Any) -> None:
        finish(journal, block)
        if len(journal.blocks) == blocks:
            happens()

    return finish_and_more


def steps_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes which blocks are compressed from now on."""
    steps: list[int] = []
    step = joint.JointRun.step
    monkeypatch.setattr(joint.JointRun, "step", lambda self, index: (steps.append(index), step(self, index))[1])
    return steps


@pytest.mark.parametrize(
    ("size", "what", "kept"),
    [
        (50_000, r"block-00001\.safetensors", 1),
        (400_000, r"streams-0-00002\.00000\.safetensors", 1),
        (2_000_000, "out", 3),
    ],
    ids=["shard", "streams", "model"],
)
def test_a_disk_that_is_full_is_told_and_the_run_goes_on_when_there_is_room(
    size: int, what: str, kept: int, model: Path, whole: Path, corpus_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config, limits = config_for(model, tmp_path / "out", corpus_file), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(streaming, "SAVING", float("inf"))  # after every block
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "finish", after(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))))
            wanted = (
                rf"{what}' cannot be written: .*File too large.*; {kept} of 3 blocks are finished and kept; put that right"
            )
            with pytest.raises(OutputError, match=wanted):
                run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    assert not list((tmp_path / ".out.unfinished").glob(".*"))  # nothing half written
    steps = steps_of(monkeypatch)
    assert run(config)["blocks_resumed"] == kept and steps == list(range(kept, BLOCKS))
    require_same(whole, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_full_from_the_start_leaves_nothing(
    model: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, limits = config_for(model, tmp_path / "out", corpus_file), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(residency, "WAITING_BYTES", 0)  # nothing waits in memory
    for size, what in (
        (100, r"\.out\.unfinished' cannot be used"),
        (50_000, r"activations cannot be kept in '.*\.out\.unfinished'"),
    ):
        job = prepare(config)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OutputError, match=rf"{what}: .*File too large"):
                execution.execute(job, verify=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize(
    "spoilt", [lambda path, content: path.write_bytes(content[:-100]), lambda path, content: path.unlink()]
)
def test_a_source_that_cannot_be_read_any_more_is_named_and_finished_blocks_stay(
    spoilt: Callable[[Path, bytes], Any], read_ahead: bool, model: Path, whole: Path, corpus_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config, stream_source = config_for(model, tmp_path / "out", corpus_file), execution.stream_source

    def streamed(source: Any, device: Any) -> Any:
        skeleton, residency = stream_source(source, device)
        residency.read_ahead = read_ahead
        return skeleton, residency

    monkeypatch.setattr(execution, "stream_source", streamed)
    files = {
        place.file
        for name, place in streamed(prepare(config).source, prepare(config).device)[1].places.items()
        if ".2." in name
    }
    file = Path(max(files))
    content = file.read_bytes()
    monkeypatch.setattr(streaming, "SAVING", float("inf"))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "finish", after(1, lambda: spoilt(file, content)))
            wanted = rf"'{re.escape(str(file))}' cannot be read: .*; 2 of 3 blocks are finished and kept; put that right"
            with pytest.raises(ModelError, match=wanted):
                run(config)
    finally:
        file.write_bytes(content)
    assert run(config)["blocks_resumed"] == 2
    require_same(whole, tmp_path / "out")


@pytest.mark.parametrize(("saving", "resumed"), [(float("inf"), 2), (0.0, 1)], ids=["after every block", "once"])
def test_streams_that_are_older_than_the_last_block_are_gone_on_from(
    saving: float,
    resumed: int,
    model: Path,
    whole: Path,
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_for(model, tmp_path / "out", corpus_file)
    monkeypatch.setattr(streaming, "SAVING", saving)

    def break_off() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "finish", after(2, break_off))
        run(config)
    left = tmp_path / ".out.unfinished"
    # None are written behind the last block; the others are dropped when newer ones count.
    assert {f"streams-0-{1:05}.00000.safetensors", f"streams-0-{1:05}.safetensors"} <= {
        path.name for path in left.iterdir()
    }
    steps = steps_of(monkeypatch)
    assert run(config)["blocks_resumed"] == resumed and steps == list(range(resumed, BLOCKS))
    require_same(whole, tmp_path / "out")


def test_streams_of_which_the_last_batch_was_not_written_do_not_count(
    model: Path, whole: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(model, tmp_path / "out", corpus_file)
    monkeypatch.setattr(streaming, "SAVING", float("inf"))
    save = Journal.save

    def break_off(journal: Journal, name: str, tensors: Any) -> None:
        if name == f"streams-0-{2:05}":
            raise KeyboardInterrupt
        save(journal, name, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "save", break_off)
        run(config)
    names = {path.name for path in (tmp_path / ".out.unfinished").glob("streams-*")}
    assert names == {f"streams-0-{name}.safetensors" for name in ("00001", "00001.00000", "00002.00000")}
    assert run(config)["blocks_resumed"] == 1
    require_same(whole, tmp_path / "out")


def test_what_a_finished_run_left_behind_is_cleared_away_unless_it_is_anothers(
    model: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    output = tmp_path / "out"
    config = config_for(model, output, corpus_file)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "close", lambda journal, keep=False: journal._claim._lock.release())
        run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.unfinished", "out"]
    job = prepare(LordConfig.from_dict(config.to_dict() | {"output": None}))
    caplog.clear()
    other = prepare(LordConfig.from_dict(config.to_dict() | {"output": None, "joint": {"refine": 1}}))
    assert is_finished(job, output) and not is_finished(other, output)
    clear_away(other, output)
    assert folder_of(output).is_dir()
    next(folder_of(output).glob("block-*")).unlink()  # it was being removed, and nothing goes on from it
    clear_away(job, output)
    clear_away(job, output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not caplog.text


@pytest.mark.parametrize("damage", ["gone", "cut short", "a bit"])
def test_a_finished_block_that_was_damaged_meanwhile_is_made_again(
    damage: str, model: Path, whole: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    output = tmp_path / "out"
    config = config_for(model, output, corpus_file)
    monkeypatch.setattr(streaming, "SAVING", float("inf"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "finish", after(2, interrupt))
        run(config)
    shard = folder_of(output) / "block-00001.safetensors"
    content = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(content[:-1] if damage == "cut short" else content[:-1] + bytes([content[-1] ^ 1]))
    steps = steps_of(monkeypatch)
    report = run(config)
    assert steps[-2:] == [1, 2] and f"{shard} is gone or damaged: the run goes on from block 1" in caplog.text
    require_same(whole, output)
    seconds = report["seconds"]
    assert seconds["resumed"] > 0 and sum(seconds.values()) == pytest.approx(2 * seconds["total"], abs=0.01)


@pytest.mark.parametrize("name", ["streams-0-00002", "streams-0-00002.00000", "fingerprint-00002"])
@pytest.mark.parametrize("damage", ["cut short", "a bit"])
def test_a_run_goes_on_from_where_it_does_not_need_what_was_damaged(
    damage: str,
    name: str,
    model: Path,
    whole: Path,
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    output = tmp_path / "out"
    config = config_for(model, output, corpus_file)
    monkeypatch.setattr(streaming, "SAVING", float("inf"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "finish", after(2, interrupt))
        run(config)
    file = folder_of(output) / f"{name}.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100] if damage == "cut short" else content[:-1] + bytes([content[-1] ^ 1]))
    assert run(config)["blocks_resumed"] == 1 and f"{file} is damaged" in caplog.text
    require_same(whole, output)


def test_a_journal_that_says_something_else_has_one_way_out(
    model: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    config = config_for(model, output, corpus_file)
    monkeypatch.setattr(streaming, "SAVING", float("inf"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "finish", after(1, interrupt))
        run(config)
    journal = folder_of(output) / "journal.jsonl"
    first, *blocks = journal.read_text().splitlines()
    told = json.loads(blocks[0])
    journal.write_text(f"{first}\n{json.dumps(told | {'records': [{}]})}\n")
    with pytest.raises(SpoiltError, match=r"the journal of .* is spoilt; to start again, remove that folder$"):
        run(config)


def test_a_run_of_which_only_the_end_is_missing_goes_through_the_model_no_more(
    model: Path, whole: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(model, tmp_path / "out", corpus_file)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(execution, "write_checkpoint", lambda *_, **__: interrupt())
        run(config)
    steps = steps_of(monkeypatch)
    monkeypatch.setattr(execution.Sensitivity, "measure", lambda *_, **__: pytest.fail("a backward pass for nothing"))
    assert run(config)["blocks_resumed"] == BLOCKS and steps == []
    require_same(whole, tmp_path / "out")


def test_what_a_run_is_made_of_holds_all_that_its_output_depends_on(
    model: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    output = tmp_path / "out"
    run(config_for(copy, output, corpus_file))

    def same(**asked: bool) -> bool:
        return is_finished(prepare(config_for(copy, tmp_path / "none", corpus_file)), output, **asked)

    assert same() and not same(verified=True)
    with monkeypatch.context() as patch:
        patch.setattr(execution, "__version__", "99.0")
        assert not same()
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert not same()
    (copy / "chat_template.jinja").unlink()
    assert same()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert not same()


def test_a_norm_that_its_stored_dtype_does_not_hold_is_refused_before_a_block_is_compressed(
    model: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = steps_of(monkeypatch)
    for name in ("model.norm.weight", "model.layers.2.input_layernorm.weight"):
        tensors = dict(build("llama", num_hidden_layers=BLOCKS).state_dict())
        tensors[name] = tensors[name].clone()
        tensors[name][3] = 1e5
        folder = tmp_path / name
        build("llama", num_hidden_layers=BLOCKS).save_pretrained(folder, state_dict=tensors)
        copy_tokenizer(folder)
        for joint_options in ({}, {"fisher": False}):
            changes = {"dtype": "float16", "joint": joint_options}
            config = LordConfig.from_dict(config_for(folder, tmp_path / "out", corpus_file).to_dict() | changes)
            with pytest.raises(NumericsError, match=rf"'{name}' stored as torch.float16: 1 of"):
                run(config)
    assert steps == []


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_job_run_twice_is_refused_before_its_second_run(
    model: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(config_for(model, tmp_path / "out", corpus_file))
    execution.execute(job, verify=False)
    steps = steps_of(monkeypatch)
    with pytest.raises(OutputError, match="is not empty; wanted a new folder, or --overwrite"):
        execution.execute(job, verify=False)
    assert steps == [] and [path.name for path in tmp_path.iterdir()] == ["out"]
