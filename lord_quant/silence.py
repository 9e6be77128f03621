# SPDX-License-Identifier: Apache-2.0
"""Importing and calling hosts that print banners, turn loggers on and change environment variables."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator


CACHE_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Runs the body with standard streams, logging and warnings muted, and undoes what it does to them.

    Also undone: changes to the Hugging Face cache variables. Exceptions pass through untouched.
    """
    saved = {key: os.environ.get(key) for key in CACHE_VARIABLES}
    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), logging.root.manager.disable
    if not handlers:
        root.addHandler(logging.NullHandler())  # logging.basicConfig does nothing when there is a handler
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
        for key, value in saved.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextlib.contextmanager
def lent_caches() -> Iterator[None]:
    """Lends hosts a temporary folder, while the body runs, for every cache of theirs that cannot be made.

    One makes all of them as soon as it is imported, whether anything is to be cached or not. Inside `silence`, which gives
    the variables their values back.
    """
    home = os.environ.get("HF_HOME")
    usual = {} if home is None else {"HF_HUB_CACHE": f"{home}/hub", "HF_MODULES_CACHE": f"{home}/modules"}
    with tempfile.TemporaryDirectory(prefix="lord-quant-") as lent:
        for name in CACHE_VARIABLES:
            place = os.environ.get(name, usual.get(name))
            try:
                if place is not None:
                    os.makedirs(place, exist_ok=True)
            except OSError:
                os.environ[name] = lent
        yield


@contextlib.contextmanager
def unheld() -> Iterator[None]:
    """Lets no module that the body imports hold on to whoever asked for it.

    One that keeps the error of an optional import keeps its traceback, and with that the frames of everybody who was
    waiting for the import: their models would stay in memory as long as the process runs.
    """
    known = set(sys.modules)
    yield
    for name in sys.modules.keys() - known:
        for value in list(getattr(sys.modules[name], "__dict__", {}).values()):
            # Asked of the type: proxies answer for what they stand for, and import it.
            error = value if issubclass(type(value), BaseException) else None
            while error is not None:
                error.__traceback__ = None
                error = error.__cause__ or error.__context__


@contextlib.contextmanager
def hush(*loggers: str) -> Iterator[None]:
    """Keeps the named loggers below errors, and deprecation warnings of hosts, off the console while the body runs."""
    named = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in named]
    for logger in named:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # lm-eval always passes one; that a checkpoint's own is used instead is what everybody wants.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            yield
    finally:
        for logger, level in zip(named, levels, strict=True):
            logger.setLevel(level)


def import_hosts() -> None:
    """Imports transformers' modelling parts quietly: their optional dependencies complain about missing GPUs."""
    with silence(), unheld():
        import transformers.modeling_utils
        import transformers.quantizers.auto  # noqa: F401
