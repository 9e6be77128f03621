# SPDX-License-Identifier: Apache-2.0
"""The run of a large model's blocks: what is measured, and what is only multiplied."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from families import TOKENIZER


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.mark.slow
def test_blocks_are_measured_and_the_whole_model_is_projected(corpus_file: Path, tmp_path: Path) -> None:
    small = ("--width", "256", "--vocabulary", "5000", "--blocks", "2", "--all-blocks", "20", "--num-samples", "4")
    command = [
        sys.executable, str(EVAL / "large.py"), "--tokenizer", str(TOKENIZER), "--calibration", str(corpus_file),
        "--device", "cpu", "--seq-len", "64", *small, "--output", str(tmp_path / "large.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "large.json").read_text(encoding="utf-8"))
    # 12 d² per block but for one head of keys and values, embeddings of words and places, in two bytes.
    width = 256
    least = 2 * (2 * (10 * width**2 + 2 * 128 * width) + (5000 + 2048) * width)
    assert found["settings"]["weight_bytes"] == pytest.approx(least, rel=0.01)
    plain, packed = found["rows"]
    assert packed["bpw"] < 7 and plain["bpw"] > 16 and plain["gpu_bytes"] is None
    text = (tmp_path / "large.md").read_text(encoding="utf-8")
    assert "**projected**" in text and "2 blocks of width 256, vocabulary 5000" in text
    total = plain["seconds"]["total"]
    line = next(line for line in text.splitlines() if line.startswith("| decomposed  "))
    assert [cell.strip() for cell in line.split("|")][3:6] == [
        f"{total:.1f}",
        f"{total / 2:.1f}",
        f"{total / 2 * 20 / 60:.1f}",
    ]


@pytest.mark.slow
def test_a_vocabulary_without_the_tokenizers_words_is_refused(corpus_file: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, str(EVAL / "large.py"), "--tokenizer", str(TOKENIZER), "--calibration", str(corpus_file),
        "--device", "cpu", "--width", "256", "--vocabulary", "100", "--output", str(tmp_path / "large.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "vocabulary 100; wanted 4096 at least" in done.stderr
    assert not (tmp_path / "large.json").exists()
