# SPDX-License-Identifier: Apache-2.0
"""The processes inside the sandbox: each program and its test, confined, one after the other.

Started by `sandbox.py` as ``python -I -S -B sandbox_child.py SOCKET`` (a file descriptor). It never imports lord_quant.
Every message on the socket brings two pipes, JOB and STATUS, and is answered when nothing of the job is left. The
processes, each the child of the one before:

    server      forks, so that an interpreter starts once and not for every program; reads no job, runs none
    launcher    enters the namespaces; keeps the wall time; kills what is left
    supervisor  process 1 of the process namespace; gives up every privilege, starts the program, and only then reads the
                test and runs it (`sandbox_check`); writes on STATUS how that ended. Its end takes the namespace with it
    program     confines itself further, writes on STATUS what confines it, keeps two pipes to its supervisor only, runs
                the untrusted text and answers calls
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from types import SimpleNamespace
from typing import Any, NoReturn


COMMON_MODULES = ("collections", "copy", "functools", "heapq", "itertools", "math", "random", "re", "string", "typing")
"""What prompts, tests and solutions import most: once for all of them."""


def _load_tools() -> SimpleNamespace:
    names = ("kernel", "calls", "values", "check")
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    try:
        return SimpleNamespace(**{name: importlib.import_module(f"sandbox_{name}") for name in names})
    finally:
        del sys.path[0]
        for name in names:
            sys.modules.pop(f"sandbox_{name}", None)


def main() -> None:
    tools = _load_tools()
    for name in COMMON_MODULES:
        importlib.import_module(name)
    tools.kernel.package_paths()  # they remember what they find
    gc.freeze()  # or every fork's collections copy the pages of all that is loaded
    tools.kernel.adopt_orphans()
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        while True:
            message, fds, _, _ = socket.recv_fds(requests, 1, 2)
            if not message:
                return
            serve(tools, requests, *fds)
            requests.sendall(message)


def serve(tools: Any, requests: socket.socket, job_fd: int, status_fd: int) -> None:
    """Sees one job through, or to its end if the evaluating process is gone."""
    ended, alive = os.pipe()
    pid = os.fork()
    if pid == 0:
        tools.kernel.keep_only(job_fd, status_fd, alive)
        launch(tools, job_fd, status_fd, alive)
    for fd in (job_fd, status_fd, alive):
        os.close(fd)
    ready, _, _ = select.select([ended, requests.fileno()], [], [])
    os.close(ended)
    if requests.fileno() in ready:
        os.kill(pid, signal.SIGKILL)
    else:
        os.waitpid(pid, 0)
    tools.kernel.kill_descendants()


def launch(tools: Any, job_fd: int, status_fd: int, alive: int) -> NoReturn:
    """Starts the supervisor, waits for its end or that of the wall time, and clears up."""
    kernel = tools.kernel
    kernel.die_with_parent()
    kernel.adopt_orphans()
    os.setsid()
    job = tools.values.read_frame(job_fd)
    active = kernel.enter_namespaces() if "namespaces" in job["layers"] else []
    ended, supervised = os.pipe()
    pid = os.fork()
    if pid == 0:
        kernel.keep_only(job_fd, status_fd, supervised)
        supervise(tools, job, active, job_fd, status_fd)
    os.close(supervised)
    ready, _, _ = select.select([ended], [], [], job["limits"]["wall_seconds"])
    if not ready:
        _report(status_fd, timed_out=True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    kernel.kill_descendants()
    os._exit(0)


def supervise(tools: Any, job: dict[str, Any], active: list[str], job_fd: int, status_fd: int) -> NoReturn:
    """Drops privileges, starts the program, tests it, and reports the end."""
    kernel = tools.kernel
    kernel.die_with_parent()
    os.setsid()  # or a signal to "my process group" would reach the launcher
    kernel.prefer_as_victim()
    folder, layers, limits = job["folder"], job["layers"], job["limits"]
    if "process-namespace" in active and kernel.private_root(folder, limits["folder_bytes"]):
        active, folder = [*active, "private-files"], kernel.PRIVATE_TMP
    os.chdir(folder)
    os.environ["HOME"] = os.environ["TMPDIR"] = folder
    user = kernel.drop_root(folder, job["user"]) if "user" in layers else None
    if user is not None:
        active = [*active, user]
        kernel.die_with_parent()  # the kernel forgets it when the user changes
    kernel.drop_capabilities()
    kernel.forbid_tracing()
    asked, questions = os.pipe()
    answers, answered = os.pipe()

    pid = os.fork()
    if pid == 0:
        kernel.keep_only(asked, answered, status_fd)
        active = [*active, *confine(tools, job, active, folder, counted=user is not None)]
        _report(status_fd, protections=active)
        os.close(status_fd)
        tools.check.run_program(job["program"], asked, answered)
    os.close(asked)
    os.close(answered)
    # Read after the fork: the program's memory never held the test.
    test = tools.values.read_frame(job_fd)
    kernel.limit_resources(limits, ["memory_bytes"])
    end = tools.check.run_test(tools.check.Program(pid, questions, answers), **test)
    _report(status_fd, **end)
    os._exit(0)


def confine(tools: Any, job: dict[str, Any], active: list[str], folder: str, *, counted: bool) -> list[str]:
    """Confines this process for good; returns the names of what the kernel granted."""
    kernel, layers, granted = tools.kernel, job["layers"], []
    kernel.die_with_parent()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where all was started by nohup
    os.setsid()
    if {"landlock", "seccomp"} & set(layers) and kernel.forbid_new_privileges():
        if "landlock" in layers:
            granted += kernel.landlock(folder, private="private-files" in active)
        if "seccomp" in layers and tools.calls.refuse_calls():
            granted.append("seccomp")
    # Outside a process namespace the limit counts the user's processes everywhere: any number may be too low already.
    counted = os.getuid() != 0 and (counted or "process-namespace" in active)
    kinds = ["cpu_seconds", "memory_bytes", "file_bytes", "open_files", *["processes"] * counted]
    return [*granted, *kernel.limit_resources(job["limits"], kinds)]


def _report(status_fd: int, **content: Any) -> None:
    os.write(status_fd, json.dumps(content).encode() + b"\n")


if __name__ == "__main__":
    main()
