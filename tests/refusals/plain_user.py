# SPDX-License-Identifier: Apache-2.0
"""Root without the right to read what it may not: files without permissions are refused it as they are any plain user."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


VERSION = 0x20080522
READ_ALL = (1 << 1) | (1 << 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


@contextmanager
def plain_user() -> Iterator[None]:
    """Gives up these rights in this thread and those it starts, until the body ends. Other users never had them."""
    libc, header, data = ctypes.CDLL(None, use_errno=True), struct.pack("Ii", VERSION, 0), ctypes.create_string_buffer(24)
    if not hasattr(libc, "capset") or libc.capget(header, data):
        pytest.skip("this system has no capabilities to give up")
    effective, *others = struct.unpack("6I", data.raw)
    if libc.capset(header, struct.pack("6I", effective & ~READ_ALL, *others)):
        pytest.skip("this process may not give up capabilities")
    try:
        yield
    finally:
        libc.capset(header, data)
