# SPDX-License-Identifier: Apache-2.0
"""The two sides of a check, in two processes: the program answers calls, the test asks them.

The test's process never runs a line of the program. What the test calls as a function sends its arguments over a pipe and
gets back plain data (`sandbox_values`), or the name of what was raised. So nothing the program does to its own interpreter
— patched builtins, tracing, walking frames, hunting objects, leaving early — reaches the verdict.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import select
import sys
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn


if TYPE_CHECKING:
    from lord_quant.evaluation.sandbox_values import MAX_FRAME, MalformedAnswer, decode, encode, read_frame, write_frame
else:  # beside this file: the sandbox never imports lord_quant
    from sandbox_values import MAX_FRAME, MalformedAnswer, decode, encode, read_frame, write_frame


_LOOK_SECONDS = 0.05


class ProgramEnded(BaseException):
    """The program's process is gone. No test may take it for an exception of the program."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Program:
    """The program as the test's process sees it: a process id and two pipes."""

    def __init__(self, pid: int, questions: int, answers: int) -> None:
        self.pid, self.questions, self.answers = pid, questions, answers

    def _wait(self) -> None:
        """Waits for something to read. A child of the program may hold its pipe open: its own end counts."""
        while True:
            ready = select.select([self.answers], [], [], _LOOK_SECONDS)[0]
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                raise ProgramEnded(os.waitstatus_to_exitcode(status))
            if ready:
                return

    def answer(self) -> Any:
        """Returns the value of the next answer.

        Raises:
            ProgramEnded: There will be none.
            Exception: The program raised an exception; one of the same name.
        """
        try:
            reply = read_frame(self.answers, MAX_FRAME, self._wait)
        except EOFError:
            ended = os.waitpid(self.pid, 0)[1]  # it closed the pipe: until it ends, or the wall time is up
            raise ProgramEnded(os.waitstatus_to_exitcode(ended)) from None
        match reply:
            case {"raised": str(name)}:
                raise _exception(name)
            case {"value": value}:
                return decode(value)
        raise MalformedAnswer

    def call(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with contextlib.suppress(BrokenPipeError):  # the answer tells how it ended
            write_frame(self.questions, encode([name, args, kwargs]))
        return self.answer()

    def function(self, name: str) -> Callable[..., Any]:
        """Returns what calls the program's function of this name."""
        return lambda *args, **kwargs: self.call(name, args, kwargs)


def _exception(name: str) -> BaseException:
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return type(name[:80], (Exception,), {})()
    try:
        return kind()
    except TypeError:  # it wants arguments
        return type(name, (Exception,), {})()


def run_test(program: Program, helpers: str, test: str, functions: Sequence[str]) -> dict[str, Any]:
    """Runs the test and returns how it ended: ``verdict`` in words, or the exit ``code`` of a program that is gone.

    Args:
        program: The process to ask.
        helpers: Trusted source that runs first, in the test's namespace.
        test: Trusted source that raises unless the program is right.
        functions: The program's functions, which replace helpers of their names.
    """
    scope: dict[str, Any] = {"__name__": "test"}
    try:
        program.answer()
        exec(compile(helpers, "<helpers>", "exec"), scope)
        scope.update({name: program.function(name) for name in functions})
        exec(compile(test, "<test>", "exec"), scope)
    except ProgramEnded as end:
        return {"code": end.code}
    except BaseException as error:
        return {"verdict": f"failed: {type(error).__name__}"}
    return {"verdict": "passed"}


def run_program(program: str, questions: int, answers: int) -> NoReturn:
    """Runs the untrusted source, then answers calls of its functions until the pipe ends."""
    solution = types.ModuleType("solution")
    sys.modules["solution"] = sys.modules["__main__"] = solution
    reply: dict[str, Any] = {"value": None}
    try:
        exec(compile(program, "<program>", "exec"), vars(solution))
    except BaseException as error:
        reply = {"raised": type(error).__name__}
    while True:
        write_frame(answers, reply)
        try:
            name, args, kwargs = decode(read_frame(questions))
        except EOFError:
            os._exit(0)
        try:
            if name not in vars(solution):
                raise NameError(name)
            reply = {"value": encode(vars(solution)[name](*args, **kwargs))}
        except BaseException as error:
            reply = {"raised": type(error).__name__}
