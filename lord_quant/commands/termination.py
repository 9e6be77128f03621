# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, which schedulers send before they kill, ends a run like Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Like an interruption by the keyboard it passes by whatever catches errors."""


@contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM raise `Terminated` in the main thread while the body runs there."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
