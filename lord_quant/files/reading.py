# SPDX-License-Identifier: Apache-2.0
"""Files that others wrote, read strictly: YAML and JSON with nothing in them that could be meant otherwise.

YAML's safe loader makes no objects, but it takes the last of two values for one key, follows aliases (a few lines that
stand for gigabytes), takes numbers of any length, and raises whatever its constructors do. JSON as Python reads it knows
NaN and Infinity, and ends in a RecursionError where brackets are nested deeply.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


MOST_BYTES = 2**24
"""Bytes of a configuration or plan; those of models with ten thousand layers have a tenth of that."""
LONGEST = 2**12
"""Characters of one value, which messages repeat; as many as a path may have."""
DEEPEST = 16
"""Levels of nesting; a configuration has three."""
LARGEST = 2**63


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, less what a configuration does not need."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse(f"found the alias *{event.anchor}; wanted the value written out", event)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST:
            self._refuse(f"found a value of {len(event.value)} characters; wanted at most {LONGEST}", event)
        if self.depth == DEEPEST:
            self._refuse(f"found more than {DEEPEST} levels of nesting", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    self._refuse(f"found the key {key.value!r} twice", key)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        if re.match(r"[-+]?0[0-9_]|[^:]+:", node.value):  # YAML 1.1 reads 010 as 8 and 1:30 as 90
            self._refuse(f"found the number {node.value}, which has more than one reading; wanted plain digits", node)
        value = super().construct_yaml_int(node)
        if abs(value) > LARGEST:
            self._refuse("found a number of more than 64 bits", node)
        return value

    def construct_yaml_float(self, node: Any) -> float:
        if ":" in node.value:  # YAML 1.1 reads 1:30.5 as 90.5
            self._refuse(f"found the number {node.value}, which has more than one reading; wanted plain digits", node)
        return super().construct_yaml_float(node)

    @staticmethod
    def _refuse(problem: str, found: Any) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=found.start_mark)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)
_StrictLoader.add_implicit_resolver(  # YAML 1.1 takes 1e-2, without a dot, for text
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(path: str | Path) -> Any:
    """Reads a YAML file into plain values.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger than `MOST_BYTES`, not UTF-8, not YAML, or not strictly; the message says what and where.
    """
    with Path(path).open("rb") as handle:
        data = handle.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; is it binary?") from error
    loader = None
    try:
        loader = _StrictLoader(text)
        return loader.get_single_data()
    except Exception as error:  # constructors of tags that do not fit their values raise whatever they like
        raise ValueError(str(error) if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def parse_json(text: str | bytes) -> Any:
    """Reads JSON in which every number is finite and every key stands once.

    Raises:
        ValueError: It is not JSON, or not strictly.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text}, which no float can hold")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it holds the key {name!r} twice")
    return found


def open_tensors(file: str | Path) -> Any:
    """Opens a safetensors file as `safe_open` does; of one that may not be read, that would say that it is not there.

    Raises:
        OSError: It cannot be opened.
        SafetensorError: It is no safetensors file.
    """
    from safetensors import safe_open

    try:
        with open(file, "rb"):
            return safe_open(file, framework="pt")
    except ValueError as error:  # no path at all: it holds a zero byte
        raise OSError(str(error)) from error


def denied(file: str | Path) -> str:
    """Returns why one may not even look whether a file is there; nothing if one may, and it is there or not."""
    try:
        os.stat(file)
    except PermissionError as error:
        return f"{str(file)!r} cannot be read: {error.strerror}"
    except OSError:
        pass
    return ""
