# SPDX-License-Identifier: Apache-2.0
"""Blocks that get their weights when their turn comes: the same model, and nothing left when it is over."""

from __future__ import annotations

import platform
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from families import build, copy_tokenizer, edit_tensors, probe_tokens, save

from lord_quant.blocks import residency as residencies
from lord_quant.blocks.gradients import BlockGradients
from lord_quant.blocks.residency import RESIDENT, Streamed
from lord_quant.blocks.source import build_skeleton, inspect_source, load_model, stream_source
from lord_quant.errors import ModelError, NumericsError, OutputError
from lord_quant.files.headers import weight_files
from lord_quant.files.kept import Kept, KeptInFile, KeptOnHost
from lord_quant.runs.shards import SINGLE_FILE
from lord_quant.sensitivity import Sensitivity
from lord_quant.targets import find_blocks


CPU = torch.device("cpu")


@pytest.fixture
def all_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nothing that waits stay in memory."""
    monkeypatch.setattr(residencies, "WAITING_BYTES", 0)


def streamed(folder: Path) -> tuple[Any, Streamed]:
    found = stream_source(inspect_source(str(folder)), CPU)
    assert found is not None
    return found


@pytest.mark.parametrize("family", ["gpt_bigcode", "codegen", "gpt2", "llama", "qwen3", "mistral"])
def test_blocks_are_those_of_the_loaded_model_and_go_again(family: str, tmp_path: Path) -> None:
    folder = save(build(family), tmp_path / "model")
    loaded = load_model(inspect_source(str(folder)), CPU)
    model, residency = streamed(folder)
    count = len(residency.blocks.modules)
    names = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert names == {name for name, _ in model.named_parameters() if name.startswith(f"{residency.blocks.path}.")}
    for _ in range(2):
        with residency.of(*range(count)), torch.no_grad():
            assert torch.equal(model(probe_tokens()).logits, loaded(probe_tokens()).logits)
        assert {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"} == names
    with residency.of(1):
        held = {name.split(f"{residency.blocks.path}.")[1][0] for name in names if not _on_meta(model, name)}
    assert held == {"1"}


def _on_meta(model: Any, name: str) -> bool:
    return bool(model.get_parameter(name).device.type == "meta")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied(tied: bool, tmp_path: Path) -> None:
    model, _ = streamed(save(build("llama", tie_word_embeddings=tied), tmp_path / "model"))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("read_ahead", [False, True])
def test_a_weight_that_is_not_finite_is_named_when_its_turn_comes(read_ahead: bool, tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(torch.nan))
    _, residency = ahead(folder, read_ahead)
    with residency.of(0, then=1):
        pass
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"), residency.of(1):
        pass
    assert _readers() == []


class Watched(Streamed):
    """Notes which block was read by which thread."""

    def __init__(self, *arguments: Any, **others: Any) -> None:
        self.reads: list[tuple[str, str]] = []
        super().__init__(*arguments, **others)

    def _read(self, names: Sequence[str], *others: Any) -> dict[str, torch.Tensor]:
        thread = threading.current_thread().name.split("_")[0]
        self.reads += [(thread, part) for part in sorted({name.split(".")[2] for name in names if "layers" in name})]
        return super()._read(names, *others)


def ahead(folder: Path, read_ahead: bool = True) -> tuple[Any, Watched]:
    source = inspect_source(str(folder))
    model = build_skeleton(source).eval()
    return model, Watched(model, weight_files(folder), torch.float32, CPU, read_ahead=read_ahead)


def _readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_only_a_cpu_does_not_read_ahead_by_itself(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "model")
    model, files = build_skeleton(inspect_source(str(folder))), [str(folder / SINGLE_FILE)]
    assert not Streamed(model, files, torch.float32, CPU).read_ahead
    assert Streamed(model, files, torch.float32, torch.device("meta")).read_ahead


def test_blocks_are_read_ahead_there_and_back_and_gradients_are_the_same(tmp_path: Path) -> None:
    folder = save(build("llama", num_hidden_layers=3), tmp_path / "model")
    batches = [probe_tokens()]

    def zeroes(number: int, logits: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(logits), dtype=torch.long)

    loaded = load_model(inspect_source(str(folder)), CPU)
    wanted = BlockGradients.measure(loaded, batches, [zeroes], "whole")
    model, residency = ahead(folder)
    found = BlockGradients.measure(model, batches, [zeroes], "streamed", residency)
    for index in range(3):  # whoever goes on begins with the first block, which is there already
        with residency.of(index, then=index + 1):
            names = ["self_attn.q_proj", "mlp.down_proj"]
            ours = found.through(index, residency.blocks.modules[index], "block", names)
            theirs = wanted.through(index, loaded.model.layers[index], "block", names)
            for mine, other in zip(ours, theirs, strict=True):
                assert mine.keys() == set(names)
                assert all(torch.equal(mine[name].gradients[0], other[name].gradients[0]) for name in names)
    assert residency.reads == [("MainThread", "0"), *(("read-ahead", block) for block in "1221012")]
    assert _readers() == []


def test_a_block_that_was_not_asked_for_after_all_does_no_harm(tmp_path: Path) -> None:
    folder = save(build("llama", num_hidden_layers=3), tmp_path / "model")
    loaded = load_model(inspect_source(str(folder)), CPU)
    model, residency = ahead(folder)
    with residency.of(0, then=1):
        pass
    with residency.of(0, 1, 2, then=3), torch.no_grad():
        assert torch.equal(model(probe_tokens()).logits, loaded(probe_tokens()).logits)
    with pytest.raises(ZeroDivisionError), residency.of(0, then=2):
        assert len(_readers()) == 1
        _ = 1 / 0
    assert _readers() == []
    with residency.of(0), residency.of(1, then=2), residency.of(2), torch.no_grad():
        assert torch.equal(model(probe_tokens()).logits, loaded(probe_tokens()).logits)


@pytest.mark.parametrize("read_ahead", [False, True])
def test_a_file_that_cannot_be_read_is_named_when_the_turn_of_its_block_comes(read_ahead: bool, tmp_path: Path) -> None:
    whole = build("llama")
    whole.save_pretrained(tmp_path / "model", max_shard_size="700KB")
    copy_tokenizer(tmp_path / "model")
    model, residency = ahead(tmp_path / "model", read_ahead)
    files = [{place.file for name, place in residency.places.items() if f".{block}." in name} for block in (0, 1)]
    (file,) = files[1] - files[0]
    content = Path(file).read_bytes()
    for spoil, reason in (
        (lambda: Path(file).write_bytes(content[:-9]), "not fully covered"),
        (Path(file).unlink, "No such"),
    ):
        spoil()
        with residency.of(0, then=1):
            pass
        with pytest.raises(ModelError, match=f"'{re.escape(file)}' cannot be read: .*{reason}"), residency.of(1):
            pass
        assert all(parameter.device.type == "meta" for parameter in residency.blocks.modules[1].parameters())
    Path(file).write_bytes(content)
    with residency.of(0, 1), torch.no_grad():
        assert torch.equal(model(probe_tokens()).logits, whole(probe_tokens()).logits)


def test_weights_are_a_copy_of_what_the_file_held(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "model")
    loaded = load_model(inspect_source(str(folder)), CPU)
    wanted = loaded(probe_tokens()).logits.detach()  # itself mapped from the file perhaps
    model, residency = ahead(folder)
    file = folder / SINGLE_FILE
    with residency.of(0, 1), torch.no_grad():
        with file.open("r+b") as handle:
            handle.write(bytes(file.stat().st_size))
        assert torch.equal(model(probe_tokens()).logits, wanted)


def test_what_is_kept_comes_back_once_and_leaves_no_file(tmp_path: Path, all_in_files: None) -> None:
    _, residency = streamed(save(build("llama"), tmp_path / "model"))
    residency.scratch = tmp_path / "scratch"
    given = [torch.randn(2, 3, 4), torch.randn(1, 5, dtype=torch.float64), torch.randn(4, 4).to(torch.bfloat16).T]
    with pytest.raises(OutputError, match=r"activations cannot be kept in '.*scratch'"):
        residency.keep(given)
    residency.scratch.mkdir()
    kept, left = residency.keep(given), residency.keep(given)
    assert isinstance(kept, KeptInFile) and not list(residency.scratch.iterdir())  # its file has no name
    kept.get()[0].zero_()  # whoever gets it may have it to himself
    for found, wanted in zip(kept.take(), given, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    for found, wanted in zip(left.get(), given, strict=True):
        assert torch.equal(found, wanted)


def test_what_is_kept_of_a_model_in_memory_is_let_go_once_taken() -> None:
    tensor = torch.ones(2)
    kept = RESIDENT.keep([tensor])
    assert kept.take()[0] is tensor and kept.take() == []


def test_little_that_waits_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, residency = streamed(save(build("llama"), tmp_path / "model"))
    residency.scratch = tmp_path
    monkeypatch.setattr(residencies, "WAITING_BYTES", 100)

    def in_file(kept: Kept) -> bool:
        return isinstance(kept, KeptInFile)

    first, second = (residency.keep([torch.ones(12)]) for _ in range(2))
    third = residency.keep([torch.ones(12)])  # 144 bytes
    assert [in_file(kept) for kept in (first, second, third)] == [False, False, True]
    del first
    fourth = residency.keep([torch.ones(13)])
    assert not in_file(fourth)
    assert [len(kept.get()[0]) for kept in (second, third, fourth)] == [12, 12, 13]


def test_beside_a_gpu_the_host_comes_before_files_and_no_more_than_its_share_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_in_files: None
) -> None:
    folder = save(build("llama"), tmp_path / "model")
    monkeypatch.setattr(residencies, "host_bytes", lambda device: 1024)
    _, residency = streamed(folder)
    residency.scratch = tmp_path
    given = [torch.full((100,), float(number)) for number in range(3)]  # 400 bytes take 512
    kept = [residency.keep([tensor]) for tensor in given]
    assert [isinstance(each, KeptOnHost) for each in kept] == [True, True, False]
    for tensor in given:
        tensor.fill_(-1)  # what was kept is a copy
    assert [float(each.get()[0][0]) for each in kept] == [0, 1, 2]
    assert [float(each.take()[0][99]) for each in kept] == [0, 1, 2]
    kept.clear()
    assert isinstance(residency.keep(given[:2]), KeptOnHost) and not isinstance(residency.keep(given), KeptOnHost)


def test_processes_of_one_host_share_half_of_what_is_free_there(monkeypatch: pytest.MonkeyPatch) -> None:
    free, gpu = psutil.virtual_memory().available, torch.device("cuda")
    assert residencies.host_bytes(CPU) == 0
    assert residencies.host_bytes(gpu) == pytest.approx(free / 2, rel=0.2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert residencies.host_bytes(gpu) == pytest.approx(free / 16, rel=0.2)


@pytest.mark.parametrize(("limit", "used"), residencies.CONTAINER_MEMORY)
def test_a_container_has_no_more_than_it_may(
    limit: str, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residencies, "CONTROL_GROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    gpu, free = torch.device("cuda"), residencies.host_bytes(torch.device("cuda"))
    for name, value in ((limit, "3000000"), (used, "1000000")):
        (tmp_path / name).write_text(f"{value}\n")
    assert residencies.host_bytes(gpu) == 1_000_000
    (tmp_path / used).write_text("4000000\n")
    assert residencies.host_bytes(gpu) == 0
    (tmp_path / limit).write_text("max\n")
    assert residencies.host_bytes(gpu) == pytest.approx(free, rel=0.2)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_a_block_took_goes_back_to_the_system_whatever_waits_behind_it(tmp_path: Path) -> None:
    """What waits lies between the pieces that were freed, and at the end of the heap."""

    def resident() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024

    _, residency = streamed(save(build("llama"), tmp_path / "model"))
    waiting = []
    with residency.of(0):
        torch.ones(2**22)  # 16 MiB, let go: from now on smaller ones lie on the heap
        at_work = []
        for _ in range(64):
            at_work.append(torch.ones(2**20))
            waiting.append(torch.ones(2**18))
        del at_work
        before = resident()
    assert before - resident() > 128
    del waiting


def test_more_waits_in_memory_beside_small_blocks_and_no_less_beside_large_ones() -> None:
    least = residencies.WAITING_BYTES
    blocks = [0, least // 16, least // 8, 2**40]
    assert [residencies.waiting_bytes(block) for block in blocks] == [2 * least, least * 3 // 2, least, least]


def test_without_a_folder_of_its_own_the_one_for_temporary_files_is_used_and_nothing_is_seen_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_in_files: None
) -> None:
    model, residency = streamed(save(build("llama"), tmp_path / "model"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OutputError, match=r"cannot be kept in a temporary folder: No such file.*; set TMPDIR"):
        Sensitivity.measure(model, [probe_tokens()], residency=residency)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = Sensitivity.measure(model, [probe_tokens()], residency=residency)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    block, name = residency.blocks.modules[0], "self_attn.q_proj"
    with residency.of(0):
        own = found.of_block(0, block, "block", [name])[name]
    loaded = load_model(inspect_source(str(tmp_path / "model")), CPU)
    wanted = Sensitivity.measure(loaded, [probe_tokens()])
    assert torch.equal(own, wanted.of_block(0, find_blocks(loaded).modules[0], "block", [name])[name])
