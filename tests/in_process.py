# SPDX-License-Identifier: Apache-2.0
"""Commands run in this process, through the code that optimum-cli runs; `test_cli.py` runs a few for real."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from lord_quant import errors
from lord_quant.commands import eval as eval_command
from lord_quant.commands import inspect as inspect_command
from lord_quant.commands import plan as plan_command
from lord_quant.commands import quantize as quantize_command
from lord_quant.commands import sensitivity as sensitivity_command


COMMANDS = {
    "sensitivity": sensitivity_command,
    "plan": plan_command,
    "quantize": quantize_command,
    "inspect": inspect_command,
    "eval": eval_command,
}
SHORT = ["--num-samples", "2", "--seq-len", "32"]


def run_command(name: str, *arguments: str | Path) -> int:
    """Parses and runs a command like optimum-cli does; returns the exit code."""
    from optimum.commands.register.register_lord import _guarded

    parser = argparse.ArgumentParser(prog=f"optimum-cli lord {name}")
    COMMANDS[name].add_arguments(parser)
    return _guarded(COMMANDS[name], parser.parse_args([*map(str, arguments)]))


def exit_code_of(error: str) -> int:
    """The exit code of an error of ours: of its name, which a message begins with."""
    return getattr(errors, error.partition(":")[0]).exit_code


def write_file(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


class Box:
    """A model folder to be spoilt, a place for output, and the arguments of a run that would succeed."""

    def __init__(self, root: Path, model: Path, corpus: Path) -> None:
        self.root, self.original, self.corpus = root, model, corpus
        self.output = root / "output"
        self.flags: dict[str, Any] = {"--model": model, "--output": self.output, "--dataset": corpus, "--rank-ratio": 0.25}
        self.flags["--group-size"] = 32

    def copy(self) -> Path:
        """Makes the run use a copy of the model, and returns it."""
        self.flags["--model"] = shutil.copytree(self.original, self.root / "model")
        return self.flags["--model"]

    def occupy(self) -> None:
        self.output.mkdir()
        (self.output / "thesis.tex").write_text("mine")

    def configure(self, text: str) -> None:
        """Adds a configuration file to the run."""
        self.flags["--config"] = write_file(self.root / "run.yaml", text)

    def arguments(self) -> list[str]:
        listed = [(flag, value if isinstance(value, list) else [value]) for flag, value in self.flags.items()]
        return [*SHORT, *(str(part) for flag, values in listed for part in (flag, *values))]
