# SPDX-License-Identifier: Apache-2.0
"""What a function costs in a process of its own: wall and processor time, peak resident memory, peak GPU memory.

    cost = measured(COMMAND_LINE, "lord", "quantize", ...)

The child is this file: it runs a function by the name ``module:function``, with the arguments as its command line, and
writes what it cost as JSON. Modules beside this file can be named too.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


COMMAND_LINE = "optimum.commands.optimum_cli:main"
IMPORTS = "processes:imports"


class Cost(NamedTuple):
    """What a process cost.

    Attributes:
        wall_s: Seconds from its start to its end, imports included.
        processor_s: Seconds of all processors that it and its children used, imports included.
        peak_bytes: Peak resident memory.
        gpu_bytes: Peak memory that torch allocated on the GPU; None where it used none.
        returned: What the function returned.
        finished: Whether it was left to end; if not, it took at least this.
    """

    wall_s: float
    processor_s: float
    peak_bytes: int
    gpu_bytes: int | None
    returned: Any
    finished: bool = True


class TimeIsUp(SystemExit):
    """A measured function was not to run any longer."""


class ProcessFailed(SystemExit):
    """A measured function raised, or its process died; `reason` says what it raised. Ends a script that does not mind."""

    def __init__(self, entry: str, arguments: Sequence[str], returncode: int, reason: str, printed: str) -> None:
        self.reason = reason
        super().__init__(f"{entry} {' '.join(arguments)} failed with exit code {returncode}: {reason}\n{printed[-2000:]}")


def measured(entry: str, *arguments: str, environment: Mapping[str, str] | None = None, limit: float | None = None) -> Cost:
    """Runs a function in a process of its own.

    Args:
        entry: The function as ``module:function``; what it returns must be JSON values.
        *arguments: Its command line.
        environment: Variables to set for it.
        limit: Processor seconds after which it is ended.

    Raises:
        ProcessFailed: The function raised, or the process died; what it printed last is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        command = [sys.executable, __file__, str(path), str(limit or 0), entry, *arguments]
        variables = os.environ | {"TQDM_DISABLE": "1"} | dict(environment or {})
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=variables, check=False)
        wall = time.perf_counter() - start
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"error": "no message"}
    if done.returncode or "error" in found:
        raise ProcessFailed(entry, arguments, done.returncode, found.get("error", "no message"), done.stderr)
    return Cost(wall, **found)


def imports() -> None:
    """Imports everything that any compression here does, and does nothing: the baseline of memory."""
    import lord_quant.runs.pipeline  # noqa: F401
    from lord_quant.backends import gptq
    from lord_quant.silence import import_hosts

    import_hosts()
    gptq.host()


def _run(path: Path, limit: float, entry: str, arguments: list[str]) -> None:
    """Runs a function in this process and writes what it cost."""
    from lord_quant.evaluation.memory import peak_resident_bytes

    module, name = entry.split(":")
    sys.argv = [entry, *arguments]
    found: dict[str, Any] = {"returned": None, "finished": True}  # a command line may end by `SystemExit`
    signal.signal(signal.SIGPROF, _end)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        function = getattr(importlib.import_module(module), name)
        found["returned"] = function()
    except TimeIsUp:
        found["finished"] = False
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        found |= {"peak_bytes": peak_resident_bytes(), "gpu_bytes": _gpu_peak(), "processor_s": sum(os.times()[:4])}
        path.write_text(json.dumps(found), encoding="utf-8")


def _end(*_: object) -> None:
    raise TimeIsUp


def _gpu_peak() -> int | None:
    torch = sys.modules.get("torch")
    return int(torch.cuda.max_memory_allocated()) if torch is not None and torch.cuda.is_initialized() else None


if __name__ == "__main__":
    _run(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:])
