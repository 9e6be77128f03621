# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory of a model on the CPU, measured in a process of its own.

The operating system knows one peak per process, so two models loaded side by side cannot be told apart. A fresh process
that loads one model and generates with it can: its peak is what a user's machine must have free, the interpreter and its
libraries included (the same for every model).

On Linux a child starts its life with the peak of its parent in `ru_maxrss`, however much of that the parent has given back;
``VmHWM`` starts anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lord_quant.errors import ElsewhereError


def peak_process_memory(model: str, dtype: str = "auto", *, prompt_tokens: int = 128, new_tokens: int = 32) -> int:
    """Loads a model in a fresh process, generates, and returns that process's peak resident memory in bytes.

    Args:
        model: Folder or hub name.
        dtype: dtype to load in; ``auto`` is the checkpoint's own.
        prompt_tokens: Prompt length.
        new_tokens: Tokens decoded greedily.

    Raises:
        ElsewhereError: The process failed.
    """
    job = json.dumps({"model": model, "dtype": dtype, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens})
    command = [sys.executable, "-m", "lord_quant.evaluation.memory", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ElsewhereError(f"peak memory of {model!r} could not be measured: {reason}")
    return int(done.stdout.split()[-1])


def peak_resident_bytes() -> int:
    """Returns the peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _main(job: str) -> None:
    from transformers import AutoModelForCausalLM

    from lord_quant.evaluation.speed import measure_speed

    values = json.loads(job)
    model = AutoModelForCausalLM.from_pretrained(values["model"], dtype=values["dtype"]).eval()
    measure_speed(model, prompt_tokens=values["prompt_tokens"], new_tokens=values["new_tokens"], repeats=1)
    sys.stdout.write(f"\n{peak_resident_bytes()}\n")


if __name__ == "__main__":
    _main(sys.argv[1])
