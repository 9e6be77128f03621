# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: tiny models, calibration text, environment of subprocesses."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest


# Before torch is imported: cores are shared, models tiny, and nothing may reach for the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

pytest.register_assert_rewrite("families", "model_runs")  # helpers whose assertions tests rely on

LONGEST = (
    "test_readme.py",
    "test_distributed.py",
    "test_elsewhere.py",
    "test_reload.py",
    "test_kill.py",
    "test_bench_compress.py",
)
"""Modules that go first, so that no worker is left alone with one of them."""
CALIBRATION_FILES = ("textwrap.py", "bisect.py", "heapq.py", "shlex.py", "string.py", "fnmatch.py", "glob.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the longest modules to the front; otherwise order stays."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small jsonl of real source files."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    documents = [(stdlib / name).read_text(encoding="utf-8") for name in CALIBRATION_FILES]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function from a family (and configuration overrides) to a saved tiny model; each is built once.

    The folders are shared: tests that change one copy it first.
    """
    from lord_quant.silence import import_hosts

    import_hosts()
    import families

    root, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def get(family: str, **overrides: object) -> Path:
        key = "-".join([family, *(f"{name}={value}" for name, value in sorted(overrides.items()))])
        if key not in made:
            made[key] = families.save(families.build(family, **overrides), root / key)
        return made[key]

    return get


@pytest.fixture(scope="session")
def python() -> list[str]:
    """The command that starts this interpreter, as a list."""
    return [sys.executable]
