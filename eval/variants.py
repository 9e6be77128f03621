# SPDX-License-Identifier: Apache-2.0
"""The rows of every comparison table here, as flags of the real command line, and how to run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One row: its label, and the flags of `quantize` that make it; no flags for the dense model itself."""

    label: str
    flags: tuple[str, ...] | None


OPTIMUM_DEFAULTS = ("--stack", "naive", "--sym", "--mse", "0", "--damp-percent", "0.1")
"""The naive stack as it comes: what a user of Optimum gets who changes nothing."""


def variants(rank_ratio: float, bits: int = 4) -> list[Variant]:
    """Returns the demo's rows: dense, plain GPTQ, LoRD alone, and the two stacked naively and jointly."""
    rank = ("--rank-ratio", str(rank_ratio))
    packed = ("--bits", str(bits))
    return [
        Variant("dense", None),
        Variant(f"GPTQ {bits}-bit", ("--stack", "naive", "--rank-ratio", "1", *packed)),
        Variant("LoRD float", ("--stack", "naive", *rank, "--bits", "16")),
        Variant(f"naive {bits}-bit", (*OPTIMUM_DEFAULTS, *rank, *packed)),
        Variant(f"joint {bits}-bit", (*rank, *packed)),
    ]


def lord(*arguments: str, quiet: bool = False, environment: dict[str, str] | None = None) -> None:
    """Runs ``optimum-cli lord …`` of this environment; ends the program if it fails.

    Args:
        *arguments: The command line after ``lord``.
        quiet: Show what it prints only if it fails.
        environment: Variables to set for it.
    """
    executable = shutil.which("optimum-cli", path=str(Path(sys.executable).parent)) or "optimum-cli"
    sink = subprocess.PIPE if quiet else None
    command = [executable, "lord", *arguments]
    done = subprocess.run(command, stdout=sink, stderr=sink, text=True, env=os.environ | (environment or {}), check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} failed with exit code {done.returncode}\n{done.stdout or ''}{done.stderr or ''}"
        )


def compress(variant: Variant, model: str, folder: Path, common: tuple[str, ...], **how: Any) -> tuple[str, float | None]:
    """Makes one row's checkpoint and returns where it is and the seconds its compression took (imports not counted).

    Args:
        variant: The row.
        model: Folder of the dense model.
        folder: Where the checkpoint goes.
        common: Flags that all rows share.
        **how: Passed to `lord`.
    """
    if variant.flags is None:
        return model, None
    output = folder / variant.label.lower().replace(" ", "-").replace("+", "and")
    lord("quantize", "--no-verify", "--model", model, "--output", str(output), *variant.flags, *common, **how)
    report = json.loads((output / "lord_report.json").read_text(encoding="utf-8"))
    return str(output), report["seconds"]["total"]


class Clock:
    """Wall time since it was made, for the line at the end of a script."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __str__(self) -> str:
        minutes, seconds = divmod(round(time.perf_counter() - self.start), 60)
        return f"{minutes} min {seconds} s"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes results in one step, so that a reader or a cut-off run finds a whole file; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
