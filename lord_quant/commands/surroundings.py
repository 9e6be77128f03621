# SPDX-License-Identifier: Apache-2.0
"""What a command needs around it, checked first: names that can be read, a folder to stand in, room for temporary files."""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile


def check_surroundings(args: argparse.Namespace) -> None:
    """Refuses surroundings in which hosts would break later.

    Raises:
        ConfigError: The current folder is gone, or a name holds bytes that the encoding of names does not have.
        OutputError: No folder takes temporary files.
    """
    from lord_quant.errors import ConfigError, OutputError

    try:
        here = os.getcwd()
    except OSError as error:
        raise ConfigError(f"the current folder cannot be read ({error.strerror}); wanted one that is there") from error
    given = [item for value in vars(args).values() for item in (value if isinstance(value, list) else [value])]
    for name in (here, *(item for item in given if isinstance(item, str))):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            encoding = sys.getfilesystemencoding()
            raise ConfigError(
                f"{name!r} holds bytes that names in {encoding} do not have; wanted names in UTF-8, and a locale such as "
                "LC_ALL=C.UTF-8, or PYTHONUTF8=1"
            ) from error
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise OutputError(f"no folder takes temporary files: {error.strerror}; wanted TMPDIR to name one") from error


def print_anything() -> None:
    """Lets standard output write letters that its encoding does not have, as standard error does: escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
