# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are there and may not be read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from in_process import run_command
from plain_user import plain_user
from refusal import Ground, Refusal


def closed(path: Path) -> Path:
    path.chmod(0)
    return path


def copied(ground: Ground, name: str) -> Path:
    """A copy of one of the scene's files that may not be read."""
    return closed(Path(shutil.copy(ground.scene.root / name, ground.root / name)))


def within(folder: Path, name: str) -> Path:
    """A folder in which one file may not be read."""
    closed(folder / name)
    return folder


def partly(ground: Ground) -> Path:
    """A folder of texts with one that may not be entered: leaving it out would be calibrating on something else."""
    folder = ground.folder("texts")
    (folder / "good.py").write_text("x = 1\n" * 500)
    (folder / "below").mkdir(mode=0)
    return folder


def refused(do: Callable[[Ground], Any], error: str, *parts: str) -> Refusal:
    """What a plain user does; the error says that permission is denied, and to what."""

    def as_plain_user(ground: Ground) -> Any:
        with plain_user():
            return do(ground)

    return Refusal(as_plain_user, error, parts)


def evaluate(model: Path, text: Path) -> Any:
    return run_command("eval", "--model", model, "--perplexity", text, "--max-windows", 1)


WEIGHTS, INDEXED = "model.safetensors", "model-00002-of-00002.safetensors"
DENIED = "ermission denied"
UNREADABLE = {
    "run's configuration": refused(
        lambda g: g.configured(closed(g.file("run.yaml", "a: 1"))), "ConfigError", "run.yaml", DENIED
    ),
    "plan": refused(lambda g: g.planned(copied(g, "plan.yaml")), "ConfigError", "plan.yaml", DENIED),
    "statistics": refused(lambda g: g.budgeted(copied(g, "model.stats")), "CheckpointError", "model.stats", DENIED),
    "text": refused(lambda g: g.compress(dataset=copied(g, "text.py")), "CalibrationError", "text.py", DENIED),
    "folder of texts": refused(
        lambda g: g.compress(dataset=closed(g.folder("texts"))), "CalibrationError", "texts", DENIED
    ),
    "folder in one of texts": refused(lambda g: g.compress(dataset=partly(g)), "CalibrationError", "below", DENIED),
    "model's folder": refused(lambda g: g.compress(model=closed(g.model())), "ModelError", "model", DENIED),
    "model's configuration": refused(
        lambda g: g.compress(model=within(g.model(), "config.json")), "ModelError", "config.json", DENIED
    ),
    "model's tokenizer": refused(
        lambda g: g.compress(model=within(g.model(), "tokenizer.json")), "ModelError", "tokenizer", DENIED
    ),
    "model's weights": refused(lambda g: g.compress(model=within(g.model(), WEIGHTS)), "ModelError", WEIGHTS, DENIED),
    "checkpoint's folder, looked at": refused(
        lambda g: run_command("inspect", closed(g.packed())), "ModelError", "packed", DENIED
    ),
    "checkpoint's configuration, looked at": refused(
        lambda g: run_command("inspect", within(g.packed(), "config.json")), "ModelError", "config.json", DENIED
    ),
    "checkpoint's weights, looked at": refused(
        lambda g: run_command("inspect", within(g.sharded(), INDEXED)), "CheckpointError", INDEXED, DENIED
    ),
    "checkpoint's manifest, verified": refused(
        lambda g: run_command("inspect", "--verify", within(g.packed(), "lord_manifest.json")),
        "CheckpointError",
        "lord_manifest.json",
        DENIED,
    ),
    "checkpoint's weights, verified": refused(
        lambda g: run_command("inspect", "--verify", within(g.packed(), WEIGHTS)), "CheckpointError", WEIGHTS, DENIED
    ),
    "checkpoint's weights, loaded": refused(
        lambda g: g.load(within(g.packed(), WEIGHTS)), "CheckpointError", WEIGHTS, DENIED
    ),
    "checkpoint's index, looked at": refused(
        lambda g: run_command("inspect", within(g.sharded(), "model.safetensors.index.json")),
        "CheckpointError",
        "index.json",
        DENIED,
    ),
    "checkpoint's weights, evaluated": refused(
        lambda g: evaluate(within(g.packed(), WEIGHTS), g.text), "CheckpointError", WEIGHTS, DENIED
    ),
    "checkpoint's configuration, evaluated": refused(
        lambda g: evaluate(within(g.packed(), "config.json"), g.text), "ModelError", DENIED, "config.json"
    ),
    "text of an evaluation": refused(
        lambda g: evaluate(g.dense, copied(g, "text.py")), "CalibrationError", "text.py", DENIED
    ),
}
