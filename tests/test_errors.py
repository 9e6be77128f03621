# SPDX-License-Identifier: Apache-2.0
"""Exit codes by class of error: scripts rely on them."""

from __future__ import annotations

from argparse import Namespace
from types import ModuleType

import pytest

from lord_quant import errors


CODES = {
    errors.LordError: 2,
    errors.ConfigError: 2,
    errors.TargetError: 2,
    errors.RankError: 2,
    errors.BudgetError: 2,
    errors.GroupSizeError: 2,
    errors.EvaluationError: 2,
    errors.ConsentError: 2,
    errors.ModelError: 3,
    errors.LayoutError: 3,
    errors.CalibrationError: 3,
    errors.CheckpointError: 3,
    errors.FormatVersionError: 3,
    errors.OutputError: 4,
    errors.SpoiltError: 4,
    errors.NumericsError: 5,
    errors.HostError: 6,
    errors.ElsewhereError: 6,
}


def command(error: Exception) -> ModuleType:
    """A command that ends with an error."""

    def run(args: Namespace) -> int:
        raise error

    module = ModuleType("command")
    module.run = run  # type: ignore[attr-defined]
    return module


def test_every_class_has_its_exit_code() -> None:
    """A new class must be given a line here."""
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.LordError)]
    assert {each: each.exit_code for each in classes} == CODES


@pytest.mark.parametrize("error", CODES, ids=lambda error: error.__name__)
def test_a_command_exits_with_the_code_of_its_error(
    error: type[errors.LordError], capsys: pytest.CaptureFixture[str]
) -> None:
    from optimum.commands.register.register_lord import _guarded

    assert _guarded(command(error("why")), Namespace()) == CODES[error]
    assert capsys.readouterr().err == f"optimum-cli lord: {error.__name__}: why\n"


def test_an_unexpected_exception_is_not_taken_for_one_of_ours() -> None:
    from optimum.commands.register.register_lord import _guarded

    with pytest.raises(ZeroDivisionError):
        _guarded(command(ZeroDivisionError()), Namespace())
