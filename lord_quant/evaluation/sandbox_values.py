# SPDX-License-Identifier: Apache-2.0
"""Frames of JSON over pipes, and Python values as data in them. Standard library only; runs inside the sandbox.

What a program answers is data of the built-in types or nothing: numbers, text, containers of them. An object of any other
class arrives as an `Opaque`, which equals nothing but itself, so that no method of the program's ever runs in the test's
process; an object of a subclass of a built-in type arrives as what it is a subclass of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any


MAX_FRAME = 4 << 20
"""Bytes of one answer. Python objects take up to a hundred times the bytes of their JSON."""
_HEADER = 8
_PLAIN_INTS = 1 << 63
"""Larger ones travel in hexadecimal: decimal digits are limited by the interpreter, and slow."""


class MalformedAnswer(ValueError):
    """What came is no frame, or no value that `encode` makes."""


class AnswerTooLong(ValueError):
    """A frame larger than `MAX_FRAME`."""


class Opaque:
    """Stands for an object whose class does not travel."""


def write_frame(fd: int, content: Any) -> None:
    """Writes `content`, anything JSON can hold, in full."""
    text = json.dumps(content).encode()
    data = memoryview(len(text).to_bytes(_HEADER, "big") + text)
    while data:
        data = data[os.write(fd, data) :]


def read_frame(fd: int, limit: int | None = None, wait: Callable[[], None] = lambda: None) -> Any:
    """Reads one frame and not a byte more.

    Args:
        fd: Pipe to read.
        limit: Bytes it may have.
        wait: Called before each read; it may raise.

    Raises:
        EOFError: The pipe ended.
        MalformedAnswer: Not JSON.
        AnswerTooLong: More bytes than `limit`.
    """
    size = int.from_bytes(_read(fd, _HEADER, wait), "big")
    if limit is not None and size > limit:
        raise AnswerTooLong
    text = _read(fd, size, wait)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedAnswer from error


def _read(fd: int, size: int, wait: Callable[[], None]) -> bytes:
    parts, missing = [], size
    while missing:
        wait()
        part = os.read(fd, min(missing, 1 << 16))
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def encode(value: Any) -> Any:
    """Returns what JSON can hold and `decode` turns into the value again."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int(value)
        return number if -_PLAIN_INTS < number < _PLAIN_INTS else ["int", hex(number)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict):
        return ["dict", *([encode(key), encode(item)] for key, item in value.items())]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, *map(encode, value)]
    if isinstance(value, Iterator):
        return ["iterator", *map(encode, value)]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, value.hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, Fraction):
        return ["Fraction", encode(value.numerator), encode(value.denominator)]
    if isinstance(value, Decimal):
        return ["Decimal", str(value)]
    return ["object"]


_KINDS: dict[str, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "list": lambda *items: [decode(item) for item in items],
    "tuple": lambda *items: tuple(decode(item) for item in items),
    "set": lambda *items: {decode(item) for item in items},
    "frozenset": lambda *items: frozenset(decode(item) for item in items),
    "dict": lambda *pairs: {decode(key): decode(item) for key, item in pairs},
    "iterator": lambda *items: iter([decode(item) for item in items]),
    "range": range,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": complex,
    "Fraction": lambda *parts: Fraction(*map(decode, parts)),
    "Decimal": Decimal,
    "object": Opaque,
}


def decode(value: Any) -> Any:
    """Returns the value `encode` was given.

    Raises:
        MalformedAnswer: It is none that `encode` makes.
    """
    if not isinstance(value, list):
        return value
    try:
        return _KINDS[value[0]](*value[1:])
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise MalformedAnswer from error
