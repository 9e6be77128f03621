# SPDX-License-Identifier: Apache-2.0
"""Evaluates hostile programs in a process of its own, the parent they attack. Reads its job as JSON, writes what happened.

ATTACK_SECRET=… python attack_run.py < job.json
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from typing import Any

from attacks import ATTACKS, PRELUDE, TEST

from lord_quant.evaluation.humaneval import run_checks
from lord_quant.evaluation.sandbox import Check, Limits, run_program


LIMITS = Limits(wall_seconds=3.0, cpu_seconds=1)


def main() -> None:
    """Runs the attacks named; whatever of them outlives its problem becomes a child of this process."""
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)
    job: dict[str, Any] = json.load(sys.stdin)
    tempfile.tempdir = job["folder"]
    layers = frozenset(job["layers"])
    protections = run_program(Check(""), layers=layers).protections
    names = [name for name in job["attacks"] if not ATTACKS[name].needs or set(ATTACKS[name].needs) & set(protections)]
    checks = [Check(source(ATTACKS[name].code, {**job["scene"], "PARENT": os.getpid()}), TEST, ("f",)) for name in names]
    results = run_checks(checks, workers=job["workers"], limits=LIMITS, layers=layers)
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        survivors = file.read().split()
    report = {
        "protections": protections,
        "reasons": {name: result.reason for name, result in zip(names, results, strict=True)},
        "survivors": survivors,
        "leftovers": os.listdir(job["folder"]),
    }
    json.dump(report, sys.stdout)


def source(code: str, scene: dict[str, Any]) -> str:
    """Returns a hostile program in full."""
    return "".join(f"{name} = {value!r}\n" for name, value in scene.items()) + PRELUDE + code


if __name__ == "__main__":
    main()
