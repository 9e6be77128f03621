# SPDX-License-Identifier: Apache-2.0
"""Runs untrusted Python programs and their tests in confined subprocesses.

What holds on Linux, from the strongest to what is left where the kernel refuses (containers often refuse namespaces);
the result names what was active:

    process-namespace  the program sees and reaches no other process, and whatever it started dies with it
    network-namespace  an empty one: not even loopback is up
    private-files      only the interpreter and system libraries without installed packages, read-only, and an empty, small
                       `/tmp` that is the working folder and HOME. No other file of the machine can be read or written
    own-user           started by root: the program runs as a user id that owns nothing (``own-user-for-limits``: only
                       the limit on processes knows the new id, for the interpreter's files are root's alone)
    landlock-*         no reading outside the same files and no writing outside the working folder, no TCP, no signals to
                       outside (second line)
    seccomp            no sockets, no new processes, no signals to others, no memory that no limit counts (`sandbox_calls`;
                       x86-64 and ARM64)
    *_seconds, *_bytes, processes, open_files    resource limits of the kernel, those it accepted

Always: wall-clock limit, no standard input, no output, no inherited environment or file descriptors, an isolated
interpreter without site-packages, a working folder that is removed afterwards. At the end the program itself is killed
and, on Linux with `/proc`, everything it started; elsewhere processes it started and detached may stay behind. Where
memory runs out, the kernel is told to end the program first.

How the verdict comes about: program and test are two processes. The test calls the program's functions over a pipe
(`sandbox_check`), and what comes back is plain data, rebuilt in its own process (`sandbox_values`): an object that compares
equal to everything arrives as one that equals nothing. The test's source comes after the program's process was split off,
so its memory never held the expected answers. Only the supervisor, which the program cannot trace, reports a pass. So a
program passes by answering every call rightly, and in no other way. One difference from runners that share an interpreter:
arguments are copies, so that a program which changes them in place does not change the test's own.

What is NOT covered. A hole in the kernel is a hole in the sandbox, and so is one in the few lines that read a program's
answers. What an active sandbox lacks is told by `gaps`. For hostile code use a virtual machine around all of this.
Outside Linux only resource limits and wall clock remain (of the limits, those the system knows: macOS refuses the one on
memory). Without POSIX there is no sandbox at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple


LAYERS = frozenset({"namespaces", "user", "landlock", "seccomp"})
NOT_STARTED = "sandbox did not start"
_CHILD = Path(__file__).with_name("sandbox_child.py")
_MAX_REPORT = 4096
_CLEAR_UP_SECONDS = 5.0
_USERS = 1 << 24  # wide enough that programs running at the same time, in any container, draw different numbers


class Check(NamedTuple):
    """One untrusted program and how it is tested.

    Attributes:
        program: Untrusted Python source.
        test: Trusted Python source that raises unless the program is right.
        functions: Names of the program's functions that the test calls. Arguments and results are copied, and must be plain
            data (see `sandbox_values`).
        helpers: Trusted Python source that runs before the test, in its namespace.
    """

    program: str
    test: str = ""
    functions: tuple[str, ...] = ()
    helpers: str = ""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        wall_seconds: Time from the start of its first process to the verdict. Generous, so that a busy machine
            does not turn right answers into wrong ones: the limit that decides is the processor time.
        cpu_seconds: Processor time of one process, whole seconds (3, the limit of the original HumanEval runner).
        memory_bytes: Address space of one process.
        processes: Threads, and processes where seccomp does not refuse them, together.
        file_bytes: Size of one file.
        folder_bytes: Size of the working folder, where it is a private one.
        open_files: File descriptors.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 3
    memory_bytes: int = 1 << 30
    processes: int = 16
    file_bytes: int = 16 << 20
    folder_bytes: int = 64 << 20
    open_files: int = 64


@dataclass(frozen=True)
class SandboxResult:
    """The end of one program.

    Attributes:
        passed: The program ran, and its test came to its end.
        reason: ``passed``, ``failed: <exception>``, ``timeout``, ``killed: memory``, ``killed: <signal>``,
            ``exited before the end of the test``, ``ended its supervisor``, or ``sandbox did not start``: the program
            never ran, which says nothing about it.
        seconds: Wall-clock time.
        protections: What confined the program (see the module); empty if it never ran.
    """

    passed: bool
    reason: str
    seconds: float
    protections: tuple[str, ...]


_GAPS = (
    ({"private-files", "landlock-files"}, "can read and write whatever files this user can"),
    ({"private-files"}, "can fill the disk of the temporary folder until its time is up; that is removed afterwards"),
    (
        {"network-namespace", "seccomp"},
        "can use the network, sockets of this machine's services included (no TCP where landlock-tcp holds)",
    ),
    (
        {"process-namespace", "landlock-signals", "seccomp", "own-user"},
        "can signal, and so end, processes of this user, those that watch over it too",
    ),
    ({"landlock-files", "process-namespace", "own-user"}, "can read environment and memory of this user's processes"),
    ({"processes", "seccomp"}, "can start processes without end until its time is up"),
    ({"seccomp"}, "can take the memory of one limit for each process it starts, and has every system call of the kernel"),
    ({"memory_bytes"}, "can take all memory"),
    ({"cpu_seconds"}, "can use the processor until the wall time is up"),
    ({"file_bytes", "private-files"}, "can write files of any size"),
)
"""What is open where none of the protections named holds."""


def gaps(protections: Iterable[str]) -> list[str]:
    """What a program can still do where only these protections are active, in words; nothing if all of them are."""
    active = set(protections)
    return [gap for any_of, gap in _GAPS if not any_of & active]


class Sandbox:
    """Runs programs, one at a time, each in new processes forked from one small interpreter.

    A context manager; not for several threads at once. What does not depend on the program is done once: starting an
    interpreter takes several times as long as confining a process.
    """

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, patience: float | None = None) -> None:
        """Ends the interpreter, and with it whatever it runs; by force after `patience` seconds."""
        if self._requests is not None:
            self._requests.close()
        if self._server is not None:
            try:
                self._server.wait(_CLEAR_UP_SECONDS if patience is None else patience)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        self._server = self._requests = None

    def run(self, check: Check, *, limits: Limits | None = None, layers: frozenset[str] = LAYERS) -> SandboxResult:
        """Runs one program and its test (see `run_program`)."""
        limits = limits or Limits()
        folder = tempfile.mkdtemp(prefix="lord-sandbox-")
        try:
            program = {
                "program": check.program,
                "folder": os.path.realpath(folder),
                "layers": sorted(layers),
                "user": secrets.randbelow(_USERS),
                "limits": asdict(limits),
            }
            test = {"helpers": check.helpers, "test": check.test, "functions": check.functions}
            job = b"".join(len(part).to_bytes(8, "big") + part for part in (_json(program), _json(test)))
            start = time.monotonic()
            report = _parse_report(self._request(job, start + limits.wall_seconds + _CLEAR_UP_SECONDS))
            seconds = time.monotonic() - start
        finally:
            _remove(folder)
        if "protections" not in report:
            return SandboxResult(False, NOT_STARTED, seconds, ())
        reason = _reason(report)
        return SandboxResult(reason == "passed", reason, seconds, tuple(report["protections"]))

    def _request(self, job: bytes, deadline: float) -> bytes:
        """Has the server run `job`; returns what came as its status until nothing of it was left."""
        requests = self._running()
        job_read, job_write = os.pipe()
        status_read, status_write = os.pipe()
        # A thread writes: the job may be larger than a pipe's buffer, and the child may never read it.
        feeder = threading.Thread(target=_feed, args=(job_write, job), daemon=True)
        feeder.start()
        try:
            socket.send_fds(requests, [b"j"], [job_read, status_write])
        except OSError:
            pass  # the server is gone: there will be no status
        finally:
            os.close(job_read)
            os.close(status_write)
        try:
            status, done = _collect(status_read, requests.fileno(), deadline)
            if not done:
                self.close(patience=0.0)
            return status
        finally:
            feeder.join()
            os.close(status_read)

    def _running(self) -> socket.socket:
        """Returns where the server is told of jobs; starts one if there is none."""
        if self._requests is not None and self._server is not None and self._server.poll() is None:
            return self._requests
        self.close()
        own, other = socket.socketpair()
        # The interpreter itself, not a virtual environment's link to it: without `site` only the path differs.
        python = getattr(sys, "_base_executable", None) or sys.executable
        with other:
            self._server = subprocess.Popen(
                [python, "-I", "-S", "-B", str(_CHILD), str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"},
                pass_fds=(other.fileno(),),
                start_new_session=True,
            )
        self._requests = own
        return own


def run_program(check: Check, *, limits: Limits | None = None, layers: frozenset[str] = LAYERS) -> SandboxResult:
    """Runs one untrusted program and its test.

    Args:
        check: The two, and what the test may call.
        limits: Resource limits.
        layers: Kernel mechanisms to try, a subset of `LAYERS`; fewer is for testing what remains without them.
    """
    with Sandbox() as sandbox:
        return sandbox.run(check, limits=limits, layers=layers)


def _json(content: object) -> bytes:
    return json.dumps(content).encode()


def _feed(fd: int, data: bytes) -> None:
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except BrokenPipeError:
        pass  # the child is gone; its missing status tells


def _collect(status: int, answer: int, deadline: float) -> tuple[bytes, bool]:
    """Reads `status` until there is an answer; also returns whether one came before the deadline."""
    collected, open_fds = b"", {status, answer}
    while answer in open_fds:
        ready, _, _ = select.select(open_fds, [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return collected, False
        if status in ready:
            data = os.read(status, _MAX_REPORT)
            collected += data
            if not data:
                open_fds.discard(status)
        elif answer in ready:  # all that was written has been read
            with contextlib.suppress(ConnectionResetError):  # the server died before it read the request
                return collected, os.read(answer, 1) != b""
            return collected, False
    return collected, True


def _remove(folder: str) -> None:
    """Removes a working folder, which without private-files holds what the program liked to put there."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):  # folders without permissions, or nested deeper than Python's stack
        for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            subprocess.run([*command, "--", folder], stderr=subprocess.DEVNULL, check=False)


def _parse_report(status: bytes) -> dict[str, Any]:
    """Merges the lines: the protections, written as the program starts, then how it ended."""
    report: dict[str, Any] = {}
    for line in status.splitlines():
        try:
            report |= json.loads(line)
        except ValueError:  # killed in the middle of it
            break
    return report


def _reason(report: Mapping[str, Any]) -> str:
    code, verdict = report.get("code"), report.get("verdict")
    if report.get("timed_out") or code == -signal.SIGXCPU:
        return "timeout"
    if code is not None:
        return f"killed: {_signal_name(-code)}" if code < 0 else "exited before the end of the test"
    if verdict is None:
        return "ended its supervisor"
    if verdict == "failed: MemoryError":
        return "killed: memory"
    # The exception's name is the program's own word.
    return verdict if re.fullmatch(r"passed|failed: \w{1,80}", verdict, re.ASCII) else "failed: Exception"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most of the real-time signals have no name
        return f"signal {number}"
