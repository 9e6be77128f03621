# SPDX-License-Identifier: Apache-2.0
"""Running programs: verdicts, limits, what is granted and what is told. Adversaries are in `test_attacks.py`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from lord_quant.evaluation import sandbox
from lord_quant.evaluation.sandbox import LAYERS, NOT_STARTED, Check, Limits, Sandbox, SandboxResult, gaps, run_program


TEST = "def check(candidate):\n    assert candidate(1) == 2\n    assert abs(candidate(-9)) == 8\ncheck(f)\n"
RIGHT = "def f(x):\n    return x + 1\n"
QUICK = Limits(wall_seconds=3.0, cpu_seconds=1)
WITHOUT_NAMESPACES = LAYERS - {"namespaces"}
BOTH = pytest.mark.parametrize("layers", [LAYERS, WITHOUT_NAMESPACES], ids=["all", "no-namespaces"])


@pytest.fixture(autouse=True)
def own_child(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs the test's sandboxes from a copy, whose path tells them from all others on the machine."""
    source, folder = Path(sandbox.__file__).parent, tmp_path_factory.mktemp("child")
    for file in source.glob("sandbox_*.py"):
        shutil.copy(file, folder)
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
    return run_program(Check(textwrap.dedent(program), test, ("f",)), limits=limits, layers=layers)


@pytest.fixture(scope="module")
def protections() -> tuple[str, ...]:
    return run(RIGHT).protections


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
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    if actions.exists() and "errno" in actions.read_text() and os.uname().machine in {"x86_64", "aarch64"}:
        assert "seccomp" in protections


def test_endless_loop_is_stopped_by_processor_time() -> None:
    limits = Limits(wall_seconds=60.0, cpu_seconds=1)
    result = run("while True: pass", limits=limits)
    assert (result.passed, result.reason) == (False, "timeout")
    assert result.seconds < limits.wall_seconds


def test_sleep_is_stopped_by_the_wall_clock() -> None:
    result = run("import time; time.sleep(60)", limits=Limits(wall_seconds=1.0))
    assert result.reason == "timeout"
    assert 1.0 <= result.seconds < 5.0


@BOTH
@pytest.mark.slow
def test_fork_bomb_is_contained_and_cleared_up(layers: frozenset[str], protections: tuple[str, ...]) -> None:
    if os.getuid() != 0 and "namespaces" not in layers:
        pytest.skip("a plain user's processes can be counted in a namespace of their own alone")
    if not {"process-namespace", "processes"} & set(protections):
        pytest.skip("this kernel counts no processes for us")
    layers -= {"seccomp"}
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
    # Server, launcher and supervisor are not counted.
    assert 3 < most <= limits.processes + 3
    assert leftovers() == []


def test_leftovers_are_this_tests_own() -> None:
    foreign = Path(sandbox.__file__).with_name("sandbox_child.py")
    command = [sys.executable, "-c", "import time; time.sleep(30)"]
    others = [subprocess.Popen([*command, str(path)]) for path in (foreign, sandbox._CHILD)]
    until = time.monotonic() + 10
    while time.monotonic() < until and not all(Path(f"/proc/{each.pid}/cmdline").read_bytes() for each in others):
        time.sleep(0.01)  # a program that has just been started has no command line for a moment
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
        from lord_quant.evaluation.sandbox import Check, run_program
        program = "import resource\\ndef f(): return resource.getrlimit(resource.RLIMIT_CPU)"
        result = run_program(Check(program, "assert f() == (3, 3)", ("f",)))
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
def test_a_sandbox_that_cannot_start_says_so(broken: str, own_child: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_CLEAR_UP_SECONDS", 0.5)
    own_child.with_name("sandbox_kernel.py").write_text(broken)
    result = run(RIGHT, limits=Limits(wall_seconds=1.0))
    assert (result.passed, result.reason, result.protections) == (False, NOT_STARTED, ())


def test_a_program_that_ends_its_supervisor_has_failed_and_not_been_prevented() -> None:
    """Where nothing forbids the signal: the score is 0, and the evaluation goes on."""
    result = run(f"import os\nos.kill(os.getppid(), 9)\n{RIGHT}", layers=frozenset())
    assert (result.passed, result.reason) == (False, "ended its supervisor")


VALUES = [
    *(None, True, 0, -1, 2**64, -(7**400), 1.5, -0.0, 1e300, 1 + 2j, "", "ä\ud800\0", b"\0\xff", bytearray(b"x")),
    *([], [1, [2.0, None]], (1,), {1, "2"}, frozenset({1}), {1: [2], (3,): {}}, range(1, 9, 2), Fraction(1, 3)),
    *(Decimal("1.50"), ["int", "x"], ["object"], {"raised": "E"}),
]


def test_plain_data_comes_back_as_it_was() -> None:
    """Out of the test, through the program and back, in pieces of the test's own making."""
    test = f"from fractions import Fraction\nfrom decimal import Decimal\nfor value in {VALUES!r}:\n" + (
        "    found = f(value)\n    assert (type(found), found, repr(found)) == (type(value), value, repr(value))\n"
    )
    assert run("def f(x): return x", test=test).reason == "passed"


def test_a_program_may_leave_iterators_objects_and_exceptions() -> None:
    test = """
assert tuple(f(0)) == (0, 1) and isinstance(f(1), int) and f(1) == 7 and f(2) != f(2)
for wanted, argument in ((ValueError, 3), (ZeroDivisionError, 4), (RecursionError, 5)):
    try:
        f(argument)
    except wanted:
        continue
    raise SystemExit
"""
    program = """
        import enum
        class Seven(enum.IntEnum):
            VALUE = 7
        def f(x):
            if x == 3: raise ValueError("no")
            if x == 5: return f(x)
            return [iter([0, 1]), Seven.VALUE, object()][x] if x < 3 else 1 // 0
    """
    assert run(program, test=test).reason == "passed"


def test_one_sandbox_runs_many_programs_that_know_nothing_of_each_other() -> None:
    stateful = """
import math, os
def f(x):
    math.pi += 1
    open("x", "a").write("x")
    return os.path.getsize("x"), int(math.pi)
"""
    with Sandbox() as sandbox:
        for _ in range(3):
            assert sandbox.run(Check(stateful, "assert f(0) == (1, 4)", ("f",)), limits=QUICK).reason == "passed"
            assert sandbox.run(Check("import os\nos._exit(3)", TEST, ("f",)), limits=QUICK).reason.startswith("exited")
        assert len(leftovers()) == 1  # the server
    assert leftovers() == []


def test_a_sandbox_whose_server_was_killed_starts_another() -> None:
    with Sandbox() as sandbox:
        assert sandbox.run(Check(RIGHT, TEST, ("f",))).passed
        os.kill(leftovers()[0], signal.SIGKILL)
        time.sleep(0.2)
        assert sandbox.run(Check(RIGHT, TEST, ("f",))).passed


def test_a_killed_evaluation_leaves_no_process(tmp_path: Path) -> None:
    script = f"""
        import pathlib
        from lord_quant.evaluation import sandbox
        sandbox._CHILD = pathlib.Path({str(sandbox._CHILD)!r})
        print(1, flush=True)
        sandbox.run_program(sandbox.Check("import time; time.sleep(60)"), limits=sandbox.Limits(wall_seconds=60.0))
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert wait_for(lambda: len(leftovers()) >= 4)  # server, launcher, supervisor, program
        process.kill()
    assert wait_for(lambda: leftovers() == [])


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


ALL = ("network-namespace", "process-namespace", "private-files", "own-user", "landlock-files", "landlock-tcp")
ALL += ("landlock-signals", "seccomp", "cpu_seconds", "memory_bytes", "file_bytes", "open_files", "processes")


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (set(), []),
        ({"network-namespace"}, []),
        ({"network-namespace", "seccomp"}, ["network", "each process it starts"]),
        ({"private-files"}, ["fill the disk"]),
        ({"private-files", "landlock-files"}, ["read and write whatever files", "fill the disk"]),
        ({"seccomp", "processes"}, ["processes without end", "each process it starts"]),
        ({"memory_bytes"}, ["all memory"]),
        (
            set(ALL),
            ["files", "disk", "network", "signal", "environment", "without end", "system call", "memory", "wall", "size"],
        ),
    ],
)
def test_what_is_not_covered_is_told(missing: set[str], told: list[str]) -> None:
    found = gaps(name for name in ALL if name not in missing)
    assert len(found) == len(told)
    assert all(word in gap for word, gap in zip(told, found, strict=True))
