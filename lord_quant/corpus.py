# SPDX-License-Identifier: Apache-2.0
"""Text documents from a file, a folder, a dataset name or the interpreter's own standard library.

The embedded default `python-stdlib` reads the source files of the running interpreter's standard library, so nothing is
downloaded. Files are dealt to the two splits by a hash of their path: calibration and held-out text are disjoint by
file, on every machine and Python version. A model may well have been trained on these files: held-out here means
"not used for calibration", nothing more.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from lord_quant.errors import CalibrationError, reason_of


Split = Literal["calibration", "heldout"]

STDLIB = "python-stdlib"
HELDOUT_ONE_IN = 5
TEXT_KEY = "text"
HUB_CHARACTERS = 64_000_000
"""A hub dataset is read from its start until this many characters: far more than any run samples from."""
DATA_SUFFIXES = frozenset({".jsonl", ".ndjson", ".parquet"})
SOURCE_SUFFIXES = frozenset(
    [
        ".py",
        ".pyi",
        ".js",
        ".jsx",
        ".ts",
        ".tsx",
        ".java",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".go",
        ".rs",
        ".rb",
        ".php",
        ".cs",
        ".scala",
        ".kt",
        ".swift",
        ".lua",
        ".pl",
        ".r",
        ".jl",
        ".sh",
        ".sql",
        ".html",
        ".css",
        ".md",
        ".rst",
        ".txt",
        ".json",
        ".yaml",
        ".yml",
        ".toml",
    ]
)
_STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3"})
_FOLDERS_SKIPPED = frozenset({"node_modules", "__pycache__", "site-packages", "venv"})
_MAX_NAMED = 10


class Corpus(NamedTuple):
    """Documents with their origin.

    Attributes:
        documents: Non-empty texts, in a reproducible order.
        source: What was asked for, with absolute paths reduced to their last part (it is published with checkpoints).
        sha256: Digest of the documents in order, with their lengths.
    """

    documents: tuple[str, ...]
    source: str
    sha256: str


def load_corpus(dataset: str, *, split: Split = "calibration", text_key: str = TEXT_KEY) -> Corpus:
    """Reads the documents of `dataset`.

    Args:
        dataset: `python-stdlib`; a path to a text, ``.jsonl`` or ``.parquet`` file or to a folder of source files; or the
            name of a dataset on the hub, optionally ``name:config:split`` (streamed with the `datasets` library, and
            only its first `HUB_CHARACTERS` characters). In a folder, hidden folders and installed packages are skipped.
        split: For `python-stdlib`, which of the two disjoint parts. Other sources have one part only.
        text_key: The field that holds the text in jsonl, parquet and hub datasets.

    Raises:
        CalibrationError: The source does not exist, holds no text, or is binary.
    """
    path = Path(os.path.expanduser(dataset))
    if dataset == STDLIB:
        documents, source = tuple(_stdlib(split)), f"{STDLIB}:{split}"
    elif os.path.isdir(path):  # which a name that is too long does not break
        documents, source = tuple(_folder(path)), Path(os.path.abspath(path)).name  # that of "." is empty
    elif os.path.isfile(path):
        documents, source = tuple(_file(path, text_key)), path.name
    elif dataset.startswith((".", "/", "~")) or path.suffix.lower() in SOURCE_SUFFIXES | DATA_SUFFIXES:
        raise CalibrationError(
            f"dataset {dataset!r}: no such file or folder; wanted a text, jsonl or parquet file, a folder of source "
            f"files, a hub dataset name, or {STDLIB!r}"
        )
    else:
        documents, source = tuple(_hub(dataset, text_key)), dataset
    documents = tuple(text for text in documents if text.strip())
    if not documents:
        raise CalibrationError(f"dataset {dataset!r} holds no text: every document is empty")
    return Corpus(documents, source, _digest(documents))


def _digest(documents: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in documents:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _is_heldout(relative: str) -> bool:
    return hashlib.sha256(relative.encode()).digest()[0] % HELDOUT_ONE_IN == 0


def _stdlib(split: Split) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _STDLIB_SKIPPED.isdisjoint(relative.parts) and _is_heldout(relative.as_posix()) == (split == "heldout"):
            yield path.read_text(encoding="utf-8", errors="replace")


def _folder(root: Path) -> Iterator[str]:
    files = sorted(_source_files(root))
    if not files:
        raise CalibrationError(f"dataset folder {str(root)!r} holds no source file (known suffixes: .py, .js, .java, …)")
    problems = []
    for path in files:
        try:
            text = _read_text(path)
        except CalibrationError as error:
            problems.append(str(error))
            continue
        yield text.replace("\r\n", "\n").replace("\r", "\n")
    if problems:
        more = [f"… and {len(problems) - _MAX_NAMED} more"] if len(problems) > _MAX_NAMED else []
        lines = "\n  ".join([*problems[:_MAX_NAMED], *more])
        raise CalibrationError(f"dataset folder {str(root)!r} holds files that are not text:\n  {lines}")


def _source_files(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:  # a folder that is left out would be text that is left out
        raise CalibrationError(f"dataset folder {error.filename!r} cannot be read: {error.strerror}") from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _FOLDERS_SKIPPED]
        for path in (Path(folder, name) for name in names):
            if path.suffix.lower() in SOURCE_SUFFIXES and path.is_file():
                yield path


def _read_text(path: Path) -> str:
    """Reads UTF-8 text, less a byte-order mark; anything else is a CalibrationError."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CalibrationError(f"dataset {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"dataset {str(path)!r} is not UTF-8 text (byte {error.start}): is it binary?") from error
    if "\x00" in text:
        raise CalibrationError(f"dataset {str(path)!r} holds NUL bytes: is it binary?")
    return text.removeprefix("\ufeff")


def _file(path: Path, text_key: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, text_key)
        return
    text = _read_text(path)
    if not text.strip():
        raise CalibrationError(f"dataset {str(path)!r} is empty; wanted at least one document")
    yield from _jsonl(path, text, text_key) if suffix in {".jsonl", ".ndjson"} else (text,)


def _jsonl(path: Path, text: str, text_key: str) -> Iterator[str]:
    # Not splitlines: it also splits at U+2028 and its like, which are legal inside JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets nested deeply
            raise CalibrationError(f"dataset {str(path)!r}, line {number}: not JSON ({reason_of(error)})") from error
        yield _text_of(record, text_key, f"{str(path)!r}, line {number}")


def _text_of(record: object, text_key: str, where: str) -> str:
    if not isinstance(record, dict) or text_key not in record:
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise CalibrationError(f"dataset {where}: no key {text_key!r}; found {found}")
    value = record[text_key]
    if not isinstance(value, str):
        raise CalibrationError(f"dataset {where}: {text_key!r} is {type(value).__name__}, wanted str")
    return value.encode("utf-8", "replace").decode("utf-8")  # JSON may hold lone surrogates, which tokenizers refuse


def _parquet(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        values = pq.read_table(path, columns=[text_key])[text_key].to_pylist() if text_key in names else []
    except Exception as error:
        raise CalibrationError(f"dataset {str(path)!r} is not a parquet file: {error}") from error
    if text_key not in names:
        raise CalibrationError(f"dataset {str(path)!r}: no column {text_key!r}; found {', '.join(names)}")
    for value in values:
        yield _text_of({text_key: value}, text_key, repr(str(path)))


def _hub(name: str, text_key: str) -> Iterator[str]:
    from datasets import load_dataset

    parts = name.split(":")
    config, hub_split = (parts[1] or None if len(parts) > 1 else None), (parts[2] if len(parts) > 2 else "train")
    try:
        rows = load_dataset(parts[0], config, split=hub_split, streaming=True)
        read = 0
        for row in rows:
            text = _text_of(row, text_key, repr(name))
            yield text
            read += len(text)
            if read >= HUB_CHARACTERS:
                return
    except CalibrationError:
        raise
    except Exception as error:  # the library and its network layers raise whatever they like, also between rows
        raise CalibrationError(
            f"dataset {name!r} is neither a file, a folder nor a dataset the hub would give: {error}"
        ) from error
