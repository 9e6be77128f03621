# SPDX-License-Identifier: Apache-2.0
"""Runs one untrusted Python program and its test in a confined subprocess.

What holds on Linux, from the strongest to what is left where the kernel refuses (containers often refuse namespaces);
the result names what was active:

    process-namespace  the program sees and reaches no other process, and whatever it started dies with it
    network-namespace  an empty one: not even loopback is up
    private-files      only the interpreter and system libraries, read-only, and an empty, small `/tmp` that is the
                       working folder and HOME. Nothing else of the machine's files can be read or written
    own-user           started by root: the program runs as a user id that owns nothing (``own-user-for-limits``: only
                       the limit on processes knows the new id, for the interpreter's files are root's alone)
    landlock-*         no writing outside the working folder, no TCP, no signals to outside (second line)
    *_seconds, *_bytes, processes, open_files    resource limits of the kernel, those it accepted

Always: wall-clock limit, no standard input, no output, no inherited environment or file descriptors, an isolated
interpreter without site-packages, a working folder that is removed afterwards. At the end the program itself is killed
and, on Linux with `/proc`, everything it started; elsewhere processes it started and detached may stay behind.

How the verdict comes about: the program runs in a module of its own; then the test runs in a fresh namespace with the
builtins as they were before the program; when the test came to its end, a one-time secret is written on a private
pipe. Only that exact secret, and an exit status 0 seen by a supervisor the program cannot impersonate, is a pass.
Printing, exiting, patching builtins, redefining the test's helpers and writing to the pipe gain nothing.

What is NOT covered. Program and test share one interpreter, as in every HumanEval runner. A program written for that
purpose can return objects that compare equal to everything, walk the interpreter's frames to the secret, or change the
test's own frame: it can fake *its own score*, not leave the sandbox. Without private-files it can read what the user
can read; without network-namespace it can use UDP, and TCP unless landlock-tcp holds; without process-namespace it can
kill processes of the same user unless own-user or landlock-signals holds, and a fork bomb of a plain user is stopped
by the wall clock alone. A hole in the kernel is a hole in the sandbox, and memory is limited per process only.
For hostile code use a virtual machine around all of this. Outside Linux only resource limits and wall clock remain (of
the limits, those the system knows: macOS refuses the one on memory). Without POSIX there is no sandbox at all.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


LAYERS = frozenset({"namespaces", "user", "landlock"})
NOT_STARTED = "sandbox did not start"
_CHILD = Path(__file__).with_name("sandbox_child.py")
_MAX_REPORT = 4096
_CLEAR_UP_SECONDS = 5.0
_USERS = 1 << 24  # wide enough that programs running at the same time, in any container, draw different numbers


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        wall_seconds: Time from start to verdict, the interpreter's start included. Generous, so that a busy machine
            does not turn right answers into wrong ones: the limit that decides is the processor time.
        cpu_seconds: Processor time of one process, whole seconds (3, the limit of the original HumanEval runner).
        memory_bytes: Address space of one process.
        processes: Processes and threads together.
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


def run_program(
    program: str, test: str = "", *, limits: Limits | None = None, layers: frozenset[str] = LAYERS
) -> SandboxResult:
    """Runs `program`, then `test`, which sees the names the program defined.

    Args:
        program: Untrusted Python source.
        test: Trusted Python source that raises unless the program is right.
        limits: Resource limits.
        layers: Kernel mechanisms to try, a subset of `LAYERS`; fewer is for testing what remains without them.
    """
    limits = limits or Limits()
    secret = secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="lord-sandbox-", ignore_cleanup_errors=True) as folder:
        job = {
            "program": program,
            "test": test,
            "secret": secret,
            "folder": os.path.realpath(folder),
            "layers": sorted(layers),
            "user": secrets.randbelow(_USERS),
            "limits": asdict(limits),
        }
        start = time.monotonic()
        verdict, status, timed_out = _spawn(json.dumps(job).encode(), folder, start + limits.wall_seconds)
        seconds = time.monotonic() - start
    report = _parse_report(status)
    code = report.get("code")
    passed = not timed_out and code == 0 and verdict == secret.encode()
    if "protections" not in report:
        return SandboxResult(False, NOT_STARTED, seconds, ())
    reason = "passed" if passed else _reason(verdict, code, timed_out)
    return SandboxResult(passed, reason, seconds, tuple(report["protections"]))


def _spawn(job: bytes, folder: str, deadline: float) -> tuple[bytes, bytes, bool]:
    """Starts the child, feeds it `job`, and collects verdict and status until its end or `deadline`."""
    job_read, job_write = os.pipe()
    verdict_read, verdict_write = os.pipe()
    status_read, status_write = os.pipe()
    # The interpreter itself, not a virtual environment's link to it: without `site` only the path differs.
    python = getattr(sys, "_base_executable", None) or sys.executable
    command = [python, "-I", "-S", "-B", str(_CHILD), str(job_read), str(verdict_write), str(status_write)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"},
            pass_fds=(job_read, verdict_write, status_write),
            start_new_session=True,
        )
    finally:
        for fd in (job_read, verdict_write, status_write):
            os.close(fd)
    timed_out = True
    try:
        # A thread writes: the job may be larger than a pipe's buffer, and the child may never read it.
        feeder = threading.Thread(target=_feed, args=(job_write, job), daemon=True)
        feeder.start()
        collected = {status_read: b"", verdict_read: b""}
        timed_out = not _collect(collected, status_read, deadline)
        return collected[verdict_read], collected[status_read], timed_out
    finally:
        _end(process, timed_out)
        feeder.join()
        for fd in (verdict_read, status_read):
            os.close(fd)


def _feed(fd: int, data: bytes) -> None:
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except BrokenPipeError:
        pass  # the child is gone; its missing status tells


def _collect(collected: dict[int, bytes], last: int, deadline: float) -> bool:
    """Reads the pipes until `last` is closed by its writers; False when the deadline came first."""
    open_fds = set(collected)
    while last in open_fds:
        ready, _, _ = select.select(open_fds, [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        for fd in ready:
            data = os.read(fd, _MAX_REPORT)
            collected[fd] += data
            if not data or len(collected[fd]) > _MAX_REPORT:
                open_fds.discard(fd)
    return True


def _end(process: subprocess.Popen[bytes], timed_out: bool) -> None:
    """Has the launcher kill what it started, and kills the launcher itself if it takes too long over it."""
    if timed_out:
        process.terminate()
    try:
        process.wait(timeout=_CLEAR_UP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _parse_report(status: bytes) -> dict[str, Any]:
    """Merges the lines: the protections, written as the program starts, then its exit status."""
    report: dict[str, Any] = {}
    for line in status.splitlines():
        try:
            report |= json.loads(line)
        except ValueError:  # killed in the middle of it
            break
    return report


def _reason(verdict: bytes, code: object, timed_out: bool) -> str:
    if timed_out or code == -signal.SIGXCPU:
        return "timeout"
    if not isinstance(code, int):
        return "ended its supervisor"
    if code < 0:
        return f"killed: {signal.Signals(-code).name}"
    # The program's own words: they can name a failure, never a pass.
    match = re.fullmatch(rb"failed: (\w{1,80})", verdict)
    if match is None:
        return "exited before the end of the test"
    name = match[1].decode("ascii", "replace")
    return "killed: memory" if name == "MemoryError" else f"failed: {name}"
