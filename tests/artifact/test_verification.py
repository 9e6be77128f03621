# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is verified: changed files and illegal tensors are named, what a fresh process reads back is compared."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from families import copy_tokenizer, edit_tensors
from models import tiny_model
from safetensors.torch import save_file

from lord_quant.artifact import verification
from lord_quant.artifact.manifest import MANIFEST_NAME, all_there, changed_files, read_manifest, write_manifest
from lord_quant.artifact.verification import tensor_problems, verify
from lord_quant.backends import gptq as backend
from lord_quant.config import LordConfig
from lord_quant.errors import CheckpointError
from lord_quant.files.claim import folder_of
from lord_quant.runs.execution import execute
from lord_quant.runs.pipeline import prepare


@pytest.fixture(scope="module")
def config(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> LordConfig:
    root = tmp_path_factory.mktemp("verified")
    tiny_model("llama", torch.float32, vocab_size=4096).save_pretrained(root / "model")
    copy_tokenizer(root / "model")
    calibration = {"dataset": str(corpus_file), "num_samples": 4, "seq_len": 24}
    lowrank, gptq = {"rank_ratio": 0.5, "targets": ["mlp"]}, {"bits": 8, "group_size": 32}
    values = {"model": str(root / "model"), "output": str(root / "out"), "calibration": calibration}
    return LordConfig.from_dict({**values, "lowrank": lowrank, "gptq": gptq})


@pytest.fixture(scope="module")
def written(config: LordConfig) -> Path:
    execute(prepare(config), verify=False)
    assert config.output is not None
    return Path(config.output)


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "copy")


def flip(path: Path, at: float, bit: int = 0) -> None:
    """Flips one bit of a file, so far into it."""
    content = bytearray(path.read_bytes())
    content[min(int(at * len(content)), len(content) - 1)] ^= 1 << bit
    path.write_bytes(bytes(content))


def test_a_bit_flipped_in_any_file_is_found_and_named(copy: Path) -> None:
    manifest = read_manifest(copy)
    names = {path.name for path in copy.iterdir()} - {MANIFEST_NAME}
    assert manifest is not None and names == set(manifest.files) and len(names) >= 6
    for name in names:
        sound = (copy / name).read_bytes()
        for at, bit in ((0, 0), (0.3, 5), (0.999, 7), (1, 2)):
            flip(copy / name, at, bit)
            with pytest.raises(CheckpointError, match=rf"is not what was written:\n  {re.escape(name)}: its contents were"):
                verify(copy)
            (copy / name).write_bytes(sound)


def test_a_bit_flipped_in_the_manifest_is_found_too(copy: Path) -> None:
    path = copy / MANIFEST_NAME
    sound = path.read_bytes()
    for step in range(60):
        flip(path, step / 59, step % 8)
        with pytest.raises(CheckpointError, match=f"{MANIFEST_NAME} in .* (was changed|cannot be read)"):
            verify(copy)
        path.write_bytes(sound)


def test_files_that_are_gone_cut_or_new_are_named_together(copy: Path) -> None:
    (copy / "README.md").unlink()
    weights = copy / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-1])
    (copy / "adapter.py").write_text("import os")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    with pytest.raises(CheckpointError) as caught:
        verify(copy)
    assert str(caught.value).splitlines()[1:] == [
        "  README.md: missing",
        f"  model.safetensors: {size - 1} bytes, written were {size}",
        "  adapter.py: not written by the run",
    ]


def test_files_in_folders_of_their_own_are_recorded_as_well(copy: Path) -> None:
    for adapter in (copy / "adapter", copy / ".cache"):  # nobody reads it without being told
        adapter.mkdir()
        (adapter / "config.json").write_text("{}")
    manifest = read_manifest(copy)
    assert manifest is not None and list(changed_files(copy, manifest)) == []
    template = copy / "additional_chat_templates" / "tool.jinja"
    template.parent.mkdir()
    template.write_text("{{ tools }}")
    with pytest.raises(CheckpointError, match=r"additional_chat_templates/tool\.jinja: not written by the run"):
        verify(copy)
    write_manifest(copy, None)
    assert all_there(copy)
    template.write_text("{{ fools }}")
    with pytest.raises(CheckpointError, match=r"additional_chat_templates/tool\.jinja: its contents were changed"):
        verify(copy)
    template.unlink()
    assert not all_there(copy)


@pytest.mark.slow
def test_what_was_written_is_verified_and_what_says_something_else_is_not(copy: Path) -> None:
    """Also where the hashes are those of the files: of weights that were wrong when they were written."""
    manifest = read_manifest(copy)
    found = verify(copy)
    assert manifest is not None and found.files == len(manifest.files) and found.tensors > 50
    assert found.difference is not None and found.difference < 0.01
    edit_tensors(copy, lambda tensors: tensors["model.layers.1.mlp.down_proj.up.scales"].neg_())
    write_manifest(copy, manifest.fingerprint)
    with pytest.raises(CheckpointError, match=r"not what was compressed: logits on 16 fixed tokens differ by \d"):
        verify(copy)
    (copy / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"is not what was written:\n  {MANIFEST_NAME}: missing"):
        verify(copy)
    (copy / "lord_report.json").unlink()  # as `save_pretrained` leaves a folder
    assert verify(copy) == (0, found.tensors, None)
    edit_tensors(copy, lambda tensors: tensors["model.layers.1.mlp.down_proj.up.scales"][0].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=r"illegal tensors:\n  .*down_proj\.up\.scales: 64 of \d+ values are NaN"):
        verify(copy)


PACKED = {
    "a.qweight": torch.zeros(8, 64, dtype=torch.int32),
    "a.qzeros": torch.zeros(2, 8, dtype=torch.int32),
    "a.scales": torch.ones(2, 64, dtype=torch.float16),
    "a.g_idx": torch.arange(64, dtype=torch.int32) // 32,
    "b.order": torch.tensor([2, 0, 1], dtype=torch.int16),
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"a.scales": torch.full((2, 64), torch.inf)}, "a.scales: 128 of 128 values are NaN or inf"),
        ({"b.norm": torch.tensor([1.0, torch.nan])}, "b.norm: 1 of 2 values are NaN or inf"),
        ({"a.g_idx": PACKED["a.g_idx"] + 1}, "a.g_idx: groups 1 to 2; there are 2"),
        ({"a.g_idx": PACKED["a.g_idx"] - 1}, "a.g_idx: groups -1 to 0; there are 2"),
        ({"b.order": torch.tensor([2, 0, 0], dtype=torch.int16)}, "b.order: no order of 3 features"),
        ({"a.qweight": PACKED["a.qweight"].float()}, "a.qweight: dtype F32; wanted I32"),
        ({"a.scales": PACKED["a.scales"].int()}, "a.scales: dtype I32; wanted floats"),
        (
            {"a.qzeros": PACKED["a.qzeros"][:, :4].clone()},
            r"a: shapes do not fit together: qweight \(8, 64\), qzeros \(2, 4\)",
        ),
        ({"a.scales": PACKED["a.scales"][:1].clone()}, "a.g_idx: groups 0 to 1; there are 1"),
    ],
)
def test_illegal_tensors_are_named(change: dict[str, torch.Tensor], problem: str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(PACKED | change, path)
    found = list(tensor_problems([str(path)]))
    assert re.match(problem, found[0]) if problem else found == []


@pytest.mark.slow
def test_what_a_fresh_process_reads_otherwise_is_not_put_in_place(
    config: LordConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes are packed wrongly in one layer: hashes and headers of the files are in order, the model is not."""
    pack, output = backend.pack_words, tmp_path / "out"
    calls = iter(range(1000))

    def wrong(values: torch.Tensor, bits: int) -> torch.Tensor:
        return pack(values.flip(0) if next(calls) == 0 else values, bits)

    other = LordConfig.from_dict(config.to_dict() | {"output": str(output)})
    with monkeypatch.context() as patch:
        patch.setattr(backend, "pack_words", wrong)
        with pytest.raises(
            CheckpointError, match=r"not what was compressed: logits .*nothing was put in place.*--no-verify"
        ):
            execute(prepare(other))
    assert not output.exists() and [path.name for path in tmp_path.iterdir()] == [folder_of(output).name]
    report = execute(prepare(other), verify=False)
    assert report["blocks_resumed"] == 2 and "verified" not in report
    with pytest.raises(CheckpointError, match="not what was compressed"):
        verify(output)


@pytest.mark.slow
def test_a_relative_search_path_means_the_same_to_the_fresh_process(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has another current folder: a module beside ours would not be found there."""
    (copy.parent / "marker.py").write_text("")
    monkeypatch.chdir(copy.parent)
    monkeypatch.setenv("PYTHONPATH", f".{os.pathsep}beside")
    monkeypatch.setattr(verification, "START", f"import marker; {verification.START}")
    assert verify(copy).tensors > 0
