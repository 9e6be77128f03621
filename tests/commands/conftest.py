# SPDX-License-Identifier: Apache-2.0
"""The run of a command that tests spoil or vary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import Box


@pytest.fixture
def box(tmp_path: Path, model_folder: Callable[..., Path], corpus_file: Path) -> Box:
    return Box(tmp_path, model_folder("gpt_bigcode"), corpus_file)
