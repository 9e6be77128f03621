# SPDX-License-Identifier: Apache-2.0
"""Adversaries: each scores nothing and harms nothing. Real subprocesses throughout."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lord_quant.evaluation import sandbox
from lord_quant.evaluation.sandbox import LAYERS, NOT_STARTED, Limits, SandboxResult, run_program


TEST = "def check(candidate):\n    assert candidate(1) == 2\n    assert abs(candidate(-9)) == 8\ncheck(f)\n"
RIGHT = "def f(x):\n    return x + 1\n"
QUICK = Limits(wall_seconds=3.0, cpu_seconds=1)
WITHOUT_NAMESPACES = LAYERS - {"namespaces"}
BOTH = pytest.mark.parametrize("layers", [LAYERS, WITHOUT_NAMESPACES], ids=["all", "no-namespaces"])


@pytest.fixture(autouse=True)
def own_child(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs the test's sandboxes from a copy, whose path tells them from all others on the machine."""
    source, folder = Path(sandbox.__file__).parent, tmp_path_factory.mktemp("child")
    for name in ("sandbox_child.py", "sandbox_kernel.py"):
        shutil.copy(source / name, folder)
    monkeypatch.setattr(sandbox, "_CHILD", folder / "sandbox_child.py")
    return folder / "sandbox_child.py"


def leftovers() -> list[int]:
    """Ids of all processes of this test's sandboxes."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if os.fsencode(sandbox._CHILD) in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
    return found


def run(program: str, *, limits: Limits = QUICK, layers: frozenset[str] = LAYERS, test: str = TEST) -> SandboxResult:
    return run_program(textwrap.dedent(program), test, limits=limits, layers=layers)


@pytest.fixture(scope="module")
def protections() -> tuple[str, ...]:
    return run(RIGHT).protections


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


@pytest.mark.parametrize("layers", [LAYERS, WITHOUT_NAMESPACES, frozenset()], ids=["all", "no-namespaces", "none"])
def test_verdict_does_not_depend_on_the_layers(layers: frozenset[str]) -> None:
    assert run(RIGHT, layers=layers).reason == "passed"
    assert run("def f(x):\n    return x\n", layers=layers).reason == "failed: AssertionError"


def test_ordinary_programs_have_the_standard_library_a_folder_and_nothing_else() -> None:
    program = """
        import collections, dataclasses, decimal, hashlib, heapq, itertools, json, re, typing
        import os
        with open("scratch", "w") as file:
            file.write("x")
        assert os.listdir(".") == ["scratch"] and os.path.samefile(os.environ["HOME"], ".")
        assert set(os.environ) <= {"PATH", "LC_ALL", "LC_CTYPE", "PYTHONHASHSEED", "HOME", "TMPDIR"}
        try:
            import numpy
        except ImportError:
            pass
        else:
            raise SystemExit

        @dataclasses.dataclass
        class Pair:
            first: "int"

        def f(x):
            return Pair(x).first + 1
    """
    result = run(program)
    assert result.passed, result.reason


FAKES = {
    "prints": "print('passed')",
    "exits": "import sys; sys.exit(0)",
    "exits hard": "import os; os._exit(0)",
    "exits in the call": "import os\ndef f(x):\n    os._exit(0)",
    "reads stdin": "input()",
    "redefines check": "def check(*_): pass\ndef f(x): return 0",
    "patches builtins": """
        import builtins
        builtins.AssertionError = builtins.BaseException = type("Mild", (Exception,), {})
        builtins.abs = lambda x: 8
        builtins.exec = builtins.compile = lambda *a, **k: None
        def f(x): return 2
    """,
    "shadows builtins": "def abs(x): return 8\nAssertionError = ValueError\ndef f(x): return 2",
    "patches os": "import os\nos.write = lambda *a: None\nos._exit = lambda code: None\ndef f(x): return 0",
    "patches main": "import sys\nm = sys.modules['__main__']\nm.run = m.main = lambda *a: None\ndef f(x): return 0",
    "forges the pipe": """
        import os
        for fd in range(3, 64):
            for text in (b"passed", b"a" * 64):
                try:
                    os.write(fd, text)
                except OSError:
                    pass
        os._exit(0)
    """,
    "forges after failing": """
        import atexit, os
        atexit.register(os._exit, 0)
        def f(x): return 0
    """,
    "recursion": "def f(x): return f(x + 1)",
    "bad syntax": "def f(x:",
    "hard exit from a thread": """
        import os, threading
        threading.Thread(target=lambda: os._exit(0)).start()
        import time; time.sleep(1)
    """,
}


@BOTH
@pytest.mark.parametrize("name", FAKES)
def test_a_fake_scores_nothing(name: str, layers: frozenset[str]) -> None:
    result = run(FAKES[name], layers=layers)
    assert not result.passed
    assert result.reason != NOT_STARTED


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces and Landlock are Linux's")
def test_what_the_kernel_gives_is_used(protections: tuple[str, ...]) -> None:
    """Asked without our code, so that a protection we fail to take up is an error and not a skipped test."""
    user = [] if os.getuid() == 0 else ["--user", "--map-current-user"]
    unshare = ["unshare", *user, "--net", "--pid", "--fork", "--mount", "true"]
    if shutil.which("unshare") and subprocess.run(unshare, capture_output=True, check=False).returncode == 0:
        assert {"network-namespace", "process-namespace", "private-files"} <= set(protections)
    ask_version = 1
    abi = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ask_version)  # landlock_create_ruleset
    wanted = {1: "landlock-files", 4: "landlock-tcp", 6: "landlock-signals"}
    without = set(run(RIGHT, layers=WITHOUT_NAMESPACES).protections)
    assert {name for since, name in wanted.items() if abi >= since} == {name for name in wanted.values() if name in without}


def test_endless_loop_is_stopped_by_processor_time() -> None:
    result = run("while True: pass")
    assert (result.passed, result.reason) == (False, "timeout")
    assert result.seconds < QUICK.wall_seconds


def test_sleep_is_stopped_by_the_wall_clock() -> None:
    result = run("import time; time.sleep(60)", limits=Limits(wall_seconds=1.0))
    assert result.reason == "timeout"
    assert 1.0 <= result.seconds < 5.0


def test_huge_allocation_ends_the_program_alone() -> None:
    assert run("x = bytearray(8 << 30)").reason == "killed: memory"


def test_unbounded_recursion_is_contained() -> None:
    result = run("import sys\nsys.setrecursionlimit(10**9)\ndef g(n): return g(n + 1)\ng(0)")
    assert not result.passed
    assert result.reason.startswith(("killed", "timeout", "failed"))


@BOTH
@pytest.mark.slow
def test_fork_bomb_is_contained_and_cleared_up(layers: frozenset[str], protections: tuple[str, ...]) -> None:
    if os.getuid() != 0 and "namespaces" not in layers:
        pytest.skip("a plain user's processes can be counted in a namespace of their own alone")
    if not {"process-namespace", "processes"} & set(protections):
        pytest.skip("this kernel counts no processes for us")
    program = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    most, limits = 0, Limits(wall_seconds=4.0, cpu_seconds=2)
    import threading

    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.2):
            most = max(most, len(leftovers()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = run(program, layers=layers, limits=limits)
    done.set()
    watcher.join()
    assert not result.passed
    # The launcher and the supervisor are not counted.
    assert 2 < most <= limits.processes + 2
    assert leftovers() == []


@BOTH
def test_a_child_that_detaches_does_not_survive(layers: frozenset[str]) -> None:
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n" + RIGHT
    assert run(program, layers=layers).passed
    assert leftovers() == []


@BOTH
def test_writing_outside_is_refused(layers: frozenset[str], tmp_path: Path, protections: tuple[str, ...]) -> None:
    if not {"private-files", "landlock-files"} & set(run(RIGHT, layers=layers).protections):
        pytest.skip("this kernel protects no files")
    tmp_path.chmod(0o777)
    for target in (tmp_path / "evil", Path(os.__file__).parent / "evil.py", Path("/evil")):
        result = run(f"open({str(target)!r}, 'w').write('x')\n{RIGHT}", layers=layers)
        assert result.reason in {"failed: PermissionError", "failed: FileNotFoundError", "failed: OSError"}
        assert not target.exists()


def test_files_of_the_machine_cannot_be_read(tmp_path: Path, protections: tuple[str, ...]) -> None:
    if "private-files" not in protections:
        pytest.skip("this kernel gives no mount namespace")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    assert run(f"open({str(secret)!r}).read()\n{RIGHT}").reason == "failed: FileNotFoundError"


def test_writing_inside_is_bounded_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], tempfile.TemporaryDirectory

    def record(**options: Any) -> Any:
        made.append(real(**options))
        return made[-1]

    monkeypatch.setattr(sandbox.tempfile, "TemporaryDirectory", record)
    limits = Limits(file_bytes=1 << 20, folder_bytes=4 << 20)
    result = run("file = open('big', 'wb')\nfor _ in range(64): file.write(bytes(1 << 20)); file.flush()", limits=limits)
    assert result.reason in {"failed: OSError", "killed: SIGXFSZ"}
    assert len(made) == 1 and not Path(made[0].name).exists()


@BOTH
def test_no_connection_to_loopback(layers: frozenset[str], listener: socket.socket) -> None:
    if not {"network-namespace", "landlock-tcp"} & set(run(RIGHT, layers=layers).protections):
        pytest.skip("this kernel isolates no network")
    port = listener.getsockname()[1]
    program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1).send(b'x')\n{RIGHT}"
    assert not run(program, layers=layers).passed
    with pytest.raises(TimeoutError):
        listener.accept()


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
def test_the_evaluating_process_cannot_be_killed(signal: str, protections: tuple[str, ...]) -> None:
    if "process-namespace" not in protections:
        pytest.skip("this kernel gives no process namespace")
    program = f"""
        import os, signal
        for pid in ({os.getpid()}, os.getppid(), -1, 0):
            if pid == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                os.kill(pid, signal.{signal})
            except OSError:
                pass
        def f(x): return x + 1
    """
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        run(program)
        time.sleep(0.2)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert run(RIGHT).passed


def test_without_namespaces_signals_do_not_get_out() -> None:
    """Only signal 0, which checks the permission and kills nothing: a gap here must not take the test run with it."""
    if "landlock-signals" not in run(RIGHT, layers=WITHOUT_NAMESPACES).protections:
        pytest.skip("this kernel's Landlock knows no signals")
    program = f"""
        import os
        for pid in ({os.getpid()}, 1):
            try:
                os.kill(pid, 0)
            except PermissionError:
                continue
            raise SystemExit
        {RIGHT.replace(chr(10), chr(10) + "        ")}
    """
    assert run(program, layers=WITHOUT_NAMESPACES).reason == "passed"


def test_the_secret_changes_from_run_to_run() -> None:
    """A program that learnt a secret, and wrote it in a later run, would still fail."""
    leak = "import sys\ndef f(x):\n    frame = sys._getframe()\n    while 'secret' not in frame.f_locals:\n" + (
        "        frame = frame.f_back\n    raise type(frame.f_locals['secret'].decode(), (Exception,), {})\n"
    )
    first, second = run(leak), run(leak)
    assert first.reason.startswith("failed: ") and len(first.reason) > 64
    assert first.reason != second.reason


def test_leftovers_are_this_tests_own() -> None:
    foreign = Path(sandbox.__file__).with_name("sandbox_child.py")
    command = [sys.executable, "-c", "import time; time.sleep(30)"]
    others = [subprocess.Popen([*command, str(path)]) for path in (foreign, sandbox._CHILD)]
    try:
        assert leftovers() == [others[1].pid]
    finally:
        for process in others:
            process.kill()
            process.wait()


def test_parallel_programs_do_not_share_the_limit_on_processes() -> None:
    program = """
        import threading, time
        threads = [threading.Thread(target=time.sleep, args=(1.0,)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        def f(x): return x + 1
    """
    limits = Limits(wall_seconds=20.0)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: run(program, limits=limits), range(3)))
    assert [result.reason for result in results] == ["passed"] * 3


def python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_an_inherited_limit_on_processor_time_is_kept() -> None:
    script = """
        import resource
        resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
        from lord_quant.evaluation.sandbox import run_program
        result = run_program("import resource", "assert resource.getrlimit(resource.RLIMIT_CPU) == (3, 3)")
        print(result.reason, "cpu_seconds" in result.protections)
    """
    assert python(script) == "passed True"


def test_a_refused_limit_is_not_reported(own_child: Path) -> None:
    kernel = own_child.with_name("sandbox_kernel.py")
    refuse = """
def _refuse(kind, pair, real=resource.setrlimit):
    if kind == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    real(kind, pair)
resource.setrlimit = _refuse
"""
    assert "memory_bytes" in run(RIGHT).protections
    kernel.write_text(kernel.read_text() + refuse)
    result = run(RIGHT)
    assert result.reason == "passed"
    assert "memory_bytes" not in result.protections
    assert {"cpu_seconds", "file_bytes", "open_files"} <= set(result.protections)


@pytest.mark.parametrize("broken", ["raise OSError", "import time; time.sleep(60)"], ids=["fails", "hangs"])
def test_a_sandbox_that_cannot_start_says_so(broken: str, own_child: Path) -> None:
    own_child.with_name("sandbox_kernel.py").write_text(broken)
    result = run(RIGHT, limits=Limits(wall_seconds=1.0))
    assert (result.passed, result.reason, result.protections) == (False, NOT_STARTED, ())


def test_a_program_that_ends_its_supervisor_has_failed_and_not_been_prevented() -> None:
    """Where nothing forbids the signal: the score is 0, and the evaluation goes on."""
    result = run(f"import os\nos.kill(os.getppid(), 9)\n{RIGHT}", layers=frozenset())
    assert (result.passed, result.reason) == (False, "ended its supervisor")
