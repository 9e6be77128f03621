# SPDX-License-Identifier: Apache-2.0
"""What a run leaves to be published: no calibration text, no paths of this machine, no environment, sane permissions."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from families import copy_tokenizer
from in_process import run_command
from models import tiny_model


TEXT, SECRET, PLACE = "zq_calibration_canary_7731", "hf_EnvironmentCanary4409", "privatefolder-canary"
SOURCE = f"# {TEXT}\n" + "".join(f"def {TEXT}_{i}(value):\n    return value * {i}\n" for i in range(400))


def canaries(path: Path, root: Path) -> list[str]:
    content = path.read_bytes()
    known = (TEXT, SECRET, PLACE, str(root), str(Path.home()), str(Path(__file__).parents[2]))
    return [word for word in known if word.encode() in content]


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o027])
def test_nothing_private_is_in_what_a_run_leaves(umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / PLACE
    tiny_model("llama", torch.float32, vocab_size=4096).save_pretrained(private / "tiny")
    copy_tokenizer(private / "tiny")
    (private / "code.py").write_text(SOURCE)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("LORD_CANARY", SECRET)
    data = ["--model", private / "tiny", "--dataset", private / "code.py", "--num-samples", "4", "--seq-len", "24"]
    statistics, plan, output = private / "tiny.stats", private / "plan.yaml", private / "out"
    before = os.umask(umask)
    try:
        assert run_command("sensitivity", *data, "--output", statistics) == 0
        budget = ["--statistics", statistics, "--target-bpw", "9"]
        assert run_command("plan", "--model", private / "tiny", *budget, "--save", plan) == 0
        assert run_command("quantize", *data, *budget, "--output", output, "--no-verify") == 0
    finally:
        os.umask(before)
    left = [statistics, plan, *output.iterdir()]
    names = {path.name for path in left}
    assert {"config.json", "lord_report.json", "lord_manifest.json", "README.md", "model.safetensors"} <= names
    assert "tiny" in (output / "lord_report.json").read_text()
    assert {path.name: found for path in left if (found := canaries(path, tmp_path))} == {}
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in left}
    assert modes == dict.fromkeys(names, oct(0o666 & ~umask))
    assert stat.S_IMODE(output.stat().st_mode) == 0o777 & ~umask
