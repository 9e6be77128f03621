# SPDX-License-Identifier: Apache-2.0
"""Every bad argument and file is refused: one message that says what and where, no traceback, nothing left behind."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import pytest
from argument_cases import ARGUMENTS
from checkpoint_cases import CHECKPOINTS
from file_cases import FILES
from in_process import exit_code_of
from refusal import Ground
from unreadable_cases import UNREADABLE

from lord_quant.errors import LordError


CASES = FILES | CHECKPOINTS | ARGUMENTS | {f"unreadable: {label}": case for label, case in UNREADABLE.items()}
PREFIX = "optimum-cli lord: "


def listing(root: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_size for path in root.rglob("*")}


@pytest.mark.parametrize("label", CASES)
def test_it_is_refused(
    label: str,
    ground: Ground,
    tmp_path_factory: pytest.TempPathFactory,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    do, error, parts = CASES[label]
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    shared, raised = listing(ground.scene.root), None
    try:
        code = do(ground)
    except LordError as caught:
        raised, code = caught, None
    stderr = capfd.readouterr().err
    if raised is not None:
        kind, message = type(raised).__name__, str(raised)
    else:
        assert code == exit_code_of(error), f"exit code {code}: {stderr}"
        assert stderr.count(PREFIX) == 1 and "Traceback" not in stderr
        kind, _, message = stderr[stderr.index(PREFIX) + len(PREFIX) :].partition(": ")
    assert kind == error, message
    position = 0
    for part in parts:
        assert part in message[position:], f"{part!r} is not (in order) in: {message}"
        position = message.index(part, position)
    assert len(message) < 6000
    assert listing(ground.scene.root) == shared and not any(scratch.iterdir())
    assert not [path for path in ground.root.iterdir() if path.name.startswith((".", "output"))]


def test_there_is_a_case_for_every_kind_of_input() -> None:
    kinds = Counter(label.partition(":")[0] for label in CASES)
    assert len(CASES) >= 120 and min(kinds.values()) >= 5, kinds


def test_the_ground_is_sound(ground: Ground) -> None:
    """What cases spoil is accepted unspoilt."""
    assert ground.configured("lowrank: {rank_ratio: 0.5, force_rank: true}\ngptq: {group_size: 32}\n") == 0
    assert ground.told(lambda about: None) == 0 and ground.measured(lambda data: data) == 0
    ground.load(ground.sharded())
    with contextlib.suppress(FileNotFoundError):
        assert ground.planned(lambda plan: None) == 0
