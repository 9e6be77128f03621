# SPDX-License-Identifier: Apache-2.0
"""The comparison with AutoGPTQ, without AutoGPTQ: what it compares with, and what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_layers import random_codes, stored


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def legacy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import legacy_gptq

    yield legacy_gptq
    sys.modules.pop("legacy_gptq")


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_unpacked_by_the_definition(legacy: Any, bits: int, desc_act: bool) -> None:
    codes = random_codes(96, 64, bits, 32, desc_act=desc_act)
    tensors = {f"layer.{name}": tensor for name, tensor in stored(codes, bits).items()}
    weight, bias = legacy.unpack(tensors, "layer", bits)
    assert torch.equal(weight, codes.weight()) and torch.equal(bias, torch.zeros(96, dtype=torch.float64))
    tensors["layer.bias"] = torch.arange(96).half()
    assert torch.equal(legacy.unpack(tensors, "layer", bits)[1], torch.arange(96).double())


def test_the_table_shows_the_worst_layer_of_every_checkpoint(legacy: Any) -> None:
    small = {"largest": 10.0, "weights": 4, "other_weights": 0}
    small |= {"float32": 1e-6, "float16": 1e-3, "ours": 2e-6, "float32_to_ours": 3e-6}
    large = small | {"largest": 1.0, "other_weights": 2, "float16": 5e-4}
    line = legacy.table([{"label": "8-bit", "layers": {"a": small, "b": large}}]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["8-bit", "2", "2", "1.0e-06", "1.0e-06", "1.0e-03", "5.0e-04"] + ["2.0e-06"] * 2 + ["3.0e-06"] * 2


def test_a_folder_that_is_no_environment_is_left_alone(legacy: Any, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="is not empty and no finished environment"):
        legacy.build_environment(tmp_path, sys.executable)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    (tmp_path / ".ready").touch()
    assert legacy.build_environment(tmp_path, sys.executable) == tmp_path / "bin" / "python"
