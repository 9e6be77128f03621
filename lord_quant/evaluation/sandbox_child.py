# SPDX-License-Identifier: Apache-2.0
"""The program inside the sandbox: confines itself, runs one untrusted program and its test, reports.

Started by `sandbox.py` as ``python -I -S -B sandbox_child.py JOB VERDICT STATUS`` (three file descriptors). It never
imports lord_quant. Three processes:

    launcher    enters the namespaces; outlives the others and kills what they leave behind
    supervisor  process 1 of the process namespace; gives up every privilege, then waits, and writes on STATUS how the
                program ended. Its end takes every process of the namespace with it
    program     limits itself, writes on STATUS what confines it, and keeps VERDICT only; runs the untrusted text, then
                the test
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import json
import os
import signal
import sys
import types
from typing import Any


def _load_kernel() -> types.ModuleType:
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    try:
        return importlib.import_module("sandbox_kernel")
    finally:
        del sys.path[0]
        sys.modules.pop("sandbox_kernel", None)


def main() -> None:
    job_fd, verdict_fd, status_fd = map(int, sys.argv[1:4])
    with os.fdopen(job_fd, "rb") as file:
        job: dict[str, Any] = json.load(file)
    kernel = _load_kernel()
    kernel.die_with_parent()
    kernel.adopt_orphans()
    active = kernel.enter_namespaces() if "namespaces" in job["layers"] else []
    pid = os.fork()
    if pid == 0:
        os.setsid()
        supervise(kernel, job, active, verdict_fd, status_fd)
    os.close(verdict_fd)
    os.close(status_fd)
    signal.signal(signal.SIGTERM, lambda *_: clear_up(kernel, pid))  # sent by sandbox.py when the wall time is up
    os.waitpid(pid, 0)
    clear_up(kernel, pid)


def clear_up(kernel: Any, supervisor: int) -> None:
    """Ends the supervisor and so its process namespace; without one, every process left, adopted ones too."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(supervisor, signal.SIGKILL)
    kernel.kill_descendants()
    os._exit(0)


def supervise(kernel: Any, job: dict[str, Any], active: list[str], verdict_fd: int, status_fd: int) -> None:
    """Drops privileges, starts the program, waits for its end, and writes its exit status as JSON on `status_fd`."""
    kernel.die_with_parent()
    folder, layers = job["folder"], job["layers"]
    in_namespace = "process-namespace" in active
    if in_namespace and kernel.private_root(folder, job["limits"]["folder_bytes"]):
        active, folder = [*active, "private-files"], kernel.PRIVATE_TMP
    os.chdir(folder)
    os.environ["HOME"] = os.environ["TMPDIR"] = folder
    user = kernel.drop_root(folder, job["user"]) if "user" in layers else None
    if user is not None:
        active = [*active, user]
        kernel.die_with_parent()  # the kernel forgets it when the user changes
    kernel.drop_capabilities()
    if "landlock" in layers and kernel.forbid_new_privileges():
        active = [*active, *kernel.landlock(folder)]
    # Outside a process namespace the limit counts the user's processes everywhere: any number may be too low already.
    counted = os.getuid() != 0 and (user is not None or in_namespace)
    kinds = ["cpu_seconds", "memory_bytes", "file_bytes", "open_files", *["processes"] * counted]
    kernel.forbid_tracing()

    pid = os.fork()
    if pid == 0:
        os.setsid()  # or a signal to "my process group" would reach the launcher
        active = [*active, *kernel.limit_resources(job["limits"], kinds)]
        os.write(status_fd, json.dumps({"protections": active}).encode() + b"\n")
        os.close(status_fd)
        run(job, verdict_fd)
    os.close(verdict_fd)
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            break
    os.write(status_fd, json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
    if not in_namespace:
        os.close(status_fd)
        kernel.kill_descendants()
    os._exit(0)


def run(job: dict[str, Any], verdict_fd: int) -> None:
    """Runs the program in one namespace, the test in another, and writes the secret if the test came to its end."""
    # Everything used after the program is bound here, out of its reach: it may patch any module it can import.
    write, leave, run_text, compile_text, kind_of = os.write, os._exit, exec, compile, type
    settrace, setprofile, module_names = sys.settrace, sys.setprofile, vars
    secret, test, program = job["secret"].encode(), job["test"], job["program"]
    import copy
    import math
    import random

    pristine = {module: dict(vars(module)) for module in (builtins, copy, math, random, os, sys)}
    known = pristine[builtins]
    solution = types.ModuleType("solution")
    sys.modules["solution"] = sys.modules["__main__"] = solution
    names = vars(solution)
    try:
        run_text(compile_text(program, "<program>", "exec"), names)
        settrace(None)
        setprofile(None)
        for module, attributes in pristine.items():
            module_names(module).update(attributes)
        scope = {name: value for name, value in names.items() if name not in known}
        scope["__builtins__"] = dict(known)
        scope["__name__"] = "test"
        run_text(compile_text(test, "<test>", "exec"), scope)
    except BaseException as error:
        write(verdict_fd, b"failed: " + kind_of(error).__name__.encode()[:80])
        leave(1)
    write(verdict_fd, secret)
    leave(0)


if __name__ == "__main__":
    main()
