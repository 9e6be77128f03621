# SPDX-License-Identifier: Apache-2.0
"""Registers `lord` with optimum-cli. Installed as optimum/commands/register/register_lord.py.

Runs whenever any optimum-cli command starts, so it imports nothing but argparse and the thin command modules.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from types import ModuleType
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from lord_quant.commands import eval as eval_command
from lord_quant.commands import inspect as inspect_command
from lord_quant.commands import plan as plan_command
from lord_quant.commands import quantize as quantize_command
from lord_quant.commands import sensitivity as sensitivity_command
from lord_quant.commands.surroundings import check_surroundings, print_anything
from lord_quant.commands.termination import Terminated, terminable
from lord_quant.distributed import launched


def _command(name: str, module: ModuleType) -> CommandInfo:
    """Wraps a command module (HELP, EXAMPLES, add_arguments, run) as an optimum-cli subcommand."""

    class LordSubcommand(BaseOptimumCLICommand):
        COMMAND = CommandInfo(name=name, help=module.HELP)

        @staticmethod
        def parse_args(parser: ArgumentParser) -> None:
            parser.description, parser.epilog = module.HELP, module.EXAMPLES
            parser.formatter_class = RawDescriptionHelpFormatter
            module.add_arguments(parser)
            _refuse_unknown(parser)

        def run(self) -> None:
            print_anything()
            sys.exit(_guarded(module, self.args))

    return CommandInfo(name=name, help=module.HELP, subcommand_class=LordSubcommand)


def _refuse_unknown(parser: ArgumentParser) -> None:
    """Lets a subcommand itself refuse what it does not know: optimum's parser would not know what is near."""
    parse = parser.parse_known_args

    def parse_all(args: Any = None, namespace: Any = None) -> Any:
        found, unknown = parse(args, namespace)
        if unknown:
            from lord_quant.errors import nearest_name

            options = [option for action in parser._actions for option in action.option_strings]
            hint = nearest_name(unknown[0].partition("=")[0], options)
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    parser.parse_known_args = parse_all  # type: ignore[method-assign]


def _guarded(module: ModuleType, args: Namespace) -> int:
    """Runs a command; an error of ours becomes its message and its exit code, an interruption 130, SIGTERM 143."""
    from lord_quant.errors import LordError

    try:
        check_surroundings(args)
        with terminable():
            return module.run(args)
    except LordError as error:
        sys.stderr.write(f"optimum-cli lord: {type(error).__name__}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt as end:
        word, code = ("terminated", 143) if isinstance(end, Terminated) else ("interrupted", 130)
        if launched().first:
            resumes = module in (quantize_command, sensitivity_command)
            told = "finished blocks are kept, the same command goes on" if resumes else "nothing was written"
            sys.stderr.write(f"optimum-cli lord: {word}; {told}\n")
        return code
    except BrokenPipeError:
        return 0


class LordCommand(BaseOptimumCLICommand):
    """The parent of all our commands."""

    COMMAND = CommandInfo(
        name="lord", help="Low-rank decomposition and quantization: sensitivity, plan, quantize, eval, inspect."
    )
    SUBCOMMANDS = (
        _command("sensitivity", sensitivity_command),
        _command("plan", plan_command),
        _command("quantize", quantize_command),
        _command("eval", eval_command),
        _command("inspect", inspect_command),
    )


REGISTER_COMMANDS = [LordCommand]
