# SPDX-License-Identifier: Apache-2.0
"""Bad input to `plan` and `inspect`: the refusals of `quantize`, and folders that hold no model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import Box, exit_code_of, run_command

from lord_quant.errors import TargetError


def test_plan_shares_the_refusals(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("plan", "--model", box.original, "--rank-ratio", "0.25", "--targets", "mpl") == TargetError.exit_code
    assert "'mpl' matches no layer; did you mean 'mlp'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda root: root / "nothing", "ModelError: .*holds no config.json"),
        (lambda root: (root / "config.json").write_text("{}") and root, "ModelError: .*config.json cannot be read"),
        (
            lambda root: (root / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1}') and root,
            "CheckpointError: .*holds no safetensors file",
        ),
    ],
)
def test_inspect_names_what_is_wrong(
    make: Callable[[Path], Path], error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command("inspect", make(tmp_path)) == exit_code_of(error)
    assert re.search(error, capfd.readouterr().err)
