# SPDX-License-Identifier: Apache-2.0
"""On a GPU: what is computed there is what the CPU computes; what waits on the host comes back whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, save
from safetensors.torch import load_file

from lord_quant.blocks import residency as places
from lord_quant.config import LordConfig
from lord_quant.files.headers import weight_files
from lord_quant.files.kept import KeptOnHost
from lord_quant.runs.execution import execute
from lord_quant.runs.pipeline import prepare


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns the folder of a family's tiny model in a dtype."""

    def folder(family: str, dtype: torch.dtype = torch.float32) -> Path:
        return save(build(family).to(dtype), tmp_path_factory.mktemp("models") / family)

    return folder


def run(model: Path, output: Path, corpus: Path, device: str, bits: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "calibration": {"dataset": str(corpus), "num_samples": 8, "seq_len": 64, "batch_size": 2},
        "gptq": {"bits": bits, "group_size": 32},
        "lowrank": {"rank_ratio": 0.5, "force_rank": True},
    }
    job = LordConfig.from_dict({"model": str(model), "output": str(output), "device": device, **(values | changes)})
    return execute(prepare(job))


def errors_of(report: dict[str, Any]) -> dict[str, float]:
    return {layer["name"]: layer["rel_stacked_error"] for layer in report["layers"]}


@pytest.mark.parametrize("family", ["gpt_bigcode", "codegen", "llama"])
def test_float_factors_are_those_of_the_cpu(
    family: str, models: Callable[..., Path], corpus_file: Path, tmp_path: Path
) -> None:
    model = models(family)
    reports = {device: run(model, tmp_path / device, corpus_file, device, 16) for device in ("cpu", "cuda")}
    there, here = errors_of(reports["cuda"]), errors_of(reports["cpu"])
    assert there == pytest.approx(here, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_factors_at_4_bits_lose_what_they_lose_on_the_cpu(
    dtype: torch.dtype, models: Callable[..., Path], corpus_file: Path, tmp_path: Path
) -> None:
    """Codes flip where sums are ordered otherwise, and the model runs in bfloat16 here and in float32 on the CPU."""
    model = models("gpt_bigcode", dtype)
    reports = {device: run(model, tmp_path / device, corpus_file, device, 4) for device in ("cpu", "cuda")}
    there, here = errors_of(reports["cuda"]), errors_of(reports["cpu"])
    assert there == pytest.approx(here, rel=0.1)
    assert sum(there.values()) == pytest.approx(sum(here.values()), rel=0.03)


def test_what_waits_on_the_host_or_in_files_changes_nothing(
    models: Callable[..., Path], corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("llama", torch.bfloat16)
    run(model, tmp_path / "device", corpus_file, "cuda", 4)
    monkeypatch.setattr(places, "waiting_bytes", lambda block: 0)
    run(model, tmp_path / "host", corpus_file, "cuda", 4)
    monkeypatch.setattr(places, "host_bytes", lambda device: 0)
    run(model, tmp_path / "files", corpus_file, "cuda", 4)
    first, *others = (
        {name: value for file in weight_files(tmp_path / place) for name, value in load_file(file).items()}
        for place in ("device", "host", "files")
    )
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], value) for name, value in first.items())


def test_much_that_waits_on_the_host_comes_back_whole() -> None:
    """Copies are not waited for, and memory on both sides is used again at once."""
    kept = []
    for number in range(64):
        tensor = torch.full((1 << 20,), float(number), device=CUDA)
        kept.append(KeptOnHost([tensor, tensor[::2]]))
        del tensor
    for number, each in reversed(list(enumerate(kept))):
        whole, half = each.take()
        assert torch.equal(whole, torch.full_like(whole, number)) and torch.equal(half, whole[::2])
