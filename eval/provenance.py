# SPDX-License-Identifier: Apache-2.0
"""What results were made from: which model, which code. Names and digests only, paths are not published."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path


def model_name(model: str) -> str:
    """Returns the last part of a model's path."""
    return Path(model).resolve().name


def digests(models: Iterable[str]) -> dict[str, str]:
    """Returns a digest of every model's files by its name, so that results of another model are never taken for its own.

    Raises:
        SystemExit: A folder is no model, or two have one name.
    """
    found: dict[str, str] = {}
    for folder in {Path(model).resolve() for model in models}:
        files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
        if not (folder / "config.json").is_file():
            raise SystemExit(f"{folder} holds no config.json; wanted the folder of a model")
        if folder.name in found:
            raise SystemExit(f"two models are called {folder.name!r}; wanted different names")
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 24):
                    digest.update(chunk)
        found[folder.name] = digest.hexdigest()
    return found


def revision() -> str:
    """Names the code that makes the rows: the commit, and a digest of the package where it differs from the commit."""
    import lord_quant

    package = Path(lord_quant.__file__).parent

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(package), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short", "HEAD")
    if commit and git("status", "--porcelain", "--", ".") == "":
        return commit
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return f"{commit or lord_quant.__version__}+{digest.hexdigest()[:8]}"
