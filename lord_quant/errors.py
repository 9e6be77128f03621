# SPDX-License-Identifier: Apache-2.0
"""Every error the project raises on purpose.

A message says what is wrong, where, what was found, what was wanted and, where there is one, the nearest legal value.
Checks collect *all* offenders before raising, so that one run names every problem.

Errors of user input derive from `ValueError` as well, so that callers who know nothing of this package can catch them.
Errors that may be raised while a host library drives a forward pass derive from `RuntimeError` instead: Optimum's
first-block capture swallows every `ValueError` (``optimum/gptq/quantizer.py``), and an error must never vanish there.

A command that ends with an error exits with the error's `exit_code`, which tells scripts what kind of thing is wrong:

2. What was asked for, as with argparse: `LordError`, `ConfigError` (plans too), `TargetError`, `RankError`, `BudgetError`,
   `GroupSizeError`, `EvaluationError`, `ConsentError`.
3. What was to be read: `ModelError` and `LayoutError`, `CalibrationError`, `CheckpointError` and `FormatVersionError`.
4. What was to be written: `OutputError`, `SpoiltError`.
5. Numbers that are not finite: `NumericsError`.
6. A host library or another process: `HostError`, `ElsewhereError`.

Any other exception is a fault of the program: a traceback, and Python's own exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class LordError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        exit_code: What a command that ends with the error exits with; see the module.
    """

    exit_code: ClassVar[int] = 2


class ConfigError(LordError, ValueError):
    """A configuration value or key is illegal."""


class TargetError(LordError, ValueError):
    """The model has no layers to work on, or a pattern selects none."""


class ModelError(LordError, ValueError):
    """The model cannot be compressed: not found, not a causal language model, already quantized, no tokenizer."""

    exit_code = 3


class LayoutError(ModelError):
    """A model's files name its tensors otherwise than the model does, or hold them in other shapes."""


class RankError(LordError, ValueError):
    """A rank is illegal for a layer, or no layer would be decomposed."""


class BudgetError(LordError, ValueError):
    """A budget cannot be met by any plan."""


class GroupSizeError(LordError, ValueError):
    """A group size or feature count is illegal for packing."""


class CalibrationError(LordError, ValueError):
    """The calibration data is missing, empty, binary or too short."""

    exit_code = 3


class OutputError(LordError, ValueError):
    """The output folder is not empty or cannot be written."""

    exit_code = 4


class SpoiltError(OutputError):
    """What an unfinished run left cannot be gone on from."""


class CheckpointError(LordError, ValueError):
    """A saved checkpoint does not hold what its configuration says."""

    exit_code = 3


class FormatVersionError(CheckpointError):
    """The checkpoint was written by a newer version of the format."""


class EvaluationError(LordError, ValueError):
    """A task, metric or evaluation setting is unknown or illegal."""


class ConsentError(LordError, PermissionError):
    """Generated code would run, and nobody consented."""


class NumericsError(LordError, RuntimeError):
    """NaN or inf in weights, activations or factors; the message names the tensor."""

    exit_code = 5


class HostError(LordError, RuntimeError):
    """A host library did something other than its contract says."""

    exit_code = 6


class ElsewhereError(LordError, RuntimeError):
    """Another process failed or is gone; one of the run's own (torchrun) tells why itself."""

    exit_code = 6


def reason_of(error: Exception) -> str:
    """Returns what went wrong, without the file's name where the system says it apart."""
    return getattr(error, "strerror", None) or str(error)


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Returns a hint such as ``; did you mean 'rank_ratio'?``, or an empty string when nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_keys(found: Iterable[object], known: Iterable[str], where: str) -> ConfigError | None:
    """Builds one error naming every key of `found` that is not in `known`, or returns None. YAML keys may be no strings."""
    known = list(dict.fromkeys(known))
    bad = [key for key in found if key not in known]
    if not bad:
        return None
    lines = [f"  {key!r}{nearest_name(key, known) if isinstance(key, str) else '; wanted a name'}" for key in bad]
    return ConfigError(f"unknown key in {where}:\n" + "\n".join(lines) + f"\nknown keys: {', '.join(sorted(known))}")
