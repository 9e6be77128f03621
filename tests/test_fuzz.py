# SPDX-License-Identifier: Apache-2.0
"""Readers return a valid object or raise a `LordError`, whatever the bytes: what once broke one, and what hypothesis finds.

`fuzz/fuzz.py` searches longer, with coverage as its guide.
"""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import READERS, seeds
from scene import Scene, make_scene

from lord_quant.errors import LordError


pytestmark = pytest.mark.slow

KEPT = Path(__file__).parents[1] / "fuzz" / "kept"
MEMORY = 4 * 2**30
FEW = settings(
    max_examples=8,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Limits what a reader may allocate; a MemoryError is none of ours."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read(name: str, data: bytes, scene: Scene) -> bool:
    """Reads, and tells whether what was read is valid; anything but a `LordError` goes on."""
    with contextlib.suppress(LordError):
        READERS[name](data, scene)
        return True
    return False


@pytest.mark.parametrize("name", READERS)
def test_real_files_are_read(name: str, scene: Scene) -> None:
    assert read(name, seeds(name, scene)[0], scene)


@pytest.mark.parametrize("path", sorted(KEPT.glob("*/*.bin")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_once_broke_a_reader_is_refused_or_read(path: Path, scene: Scene) -> None:
    read(path.parent.name, path.read_bytes(), scene)


# Anything at all in the place of a value, and bytes that were tampered with

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([0, -1, 2**63, 2**70, 1e308, float("nan"), float("inf"), "", "nan", "~nobody/x", "a\0b", "re:(", "/"]),
)
anything = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def tampered(draw: st.DrawFn, data: bytes) -> bytes:
    """Cuts, flips and doubles parts of a file."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        other = draw(st.binary(max_size=4))
        length = draw(st.integers(0, 64))
        kind = draw(st.sampled_from(["cut", "flip", "put", "double", "end"]))
        if kind == "cut":
            data = data[:at] + data[at + length :]
        elif kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        elif kind == "put":
            data = data[:at] + other + data[at:]
        elif kind == "double":
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        else:
            data = data[:at]
    return data


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Lists the paths of all values in a nested one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inner for place in places(item, (*at, key)))]


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """Returns a nested value with another one at a place."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = put(copy[place[0]], place[1:], new)
    return copy


@pytest.mark.parametrize("name", READERS)
def test_tampered_bytes_are_refused_or_read(name: str, scene: Scene) -> None:
    start = seeds(name, scene)[0]

    @FEW
    @given(tampered(start))
    def search(data: bytes) -> None:
        read(name, data, scene)

    search()


@pytest.mark.parametrize("name", ["config", "plan", "quantization", "float", "model", "leftovers", "journal", "index"])
def test_anything_for_a_value_is_refused_or_read(name: str, scene: Scene) -> None:
    load, dump = (yaml.safe_load, yaml.safe_dump) if name in ("config", "plan") else (json.loads, json.dumps)
    start = load(seeds(name, scene)[0].decode().split("\n{")[0])

    @FEW
    @given(st.sampled_from(places(start)), anything)
    def search(place: tuple[Any, ...], new: Any) -> None:
        read(name, dump(put(start, place, new)).encode(), scene)

    search()


def test_anything_for_a_value_of_statistics_is_refused_or_read(scene: Scene) -> None:
    data = seeds("statistics", scene)[0]
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    about = json.loads(header["__metadata__"]["lord_statistics"])

    @FEW
    @given(st.sampled_from(places(about)), anything)
    def search(place: tuple[Any, ...], new: Any) -> None:
        told = header | {"__metadata__": {"lord_statistics": json.dumps(put(about, place, new))}}
        text = json.dumps(told).encode()
        text += b" " * (-len(text) % 8)
        read("statistics", len(text).to_bytes(8, "little") + text + data[end:], scene)

    search()


def test_any_header_of_weights_is_refused_or_read(scene: Scene) -> None:
    data = seeds("weights", scene)[0]
    header = json.loads(data[8:])

    @FEW
    @given(st.sampled_from(places(header)), anything)
    def search(place: tuple[Any, ...], new: Any) -> None:
        text = json.dumps(put(header, place, new)).encode()
        text += b" " * (-len(text) % 8)
        read("weights", len(text).to_bytes(8, "little") + text, scene)

    search()
