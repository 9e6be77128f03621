# SPDX-License-Identifier: Apache-2.0
"""Calibration text from files, folders, the standard library and the hub, and what is no text."""

import hashlib
import json
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import lord_quant.corpus
from lord_quant.corpus import STDLIB, Corpus, load_corpus
from lord_quant.errors import CalibrationError


DOCUMENTS = ["def f():\n    return 1\n", "größer ≠ kleiner\n", "line\u2028separator and \x85 next line"]


def digest(documents: list[str]) -> str:
    parts = [len(text.encode()).to_bytes(8, "little") + text.encode() for text in documents]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_bytes(DOCUMENTS[1].encode())
    corpus = load_corpus(str(path))
    assert corpus == Corpus((DOCUMENTS[1],), "code.py", digest([DOCUMENTS[1]]))


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl(tmp_path: Path, suffix: str, ascii_only: bool) -> None:
    path = tmp_path / f"data{suffix}"
    rows = [json.dumps({"id": i, "code": text}, ensure_ascii=ascii_only) for i, text in enumerate(DOCUMENTS)]
    path.write_text("\n\n".join(rows) + "\r\n", encoding="utf-8")
    corpus = load_corpus(str(path), text_key="code")
    assert corpus == Corpus(tuple(DOCUMENTS), path.name, digest(DOCUMENTS))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS, "n": [1, 2, 3]}), path)
    assert load_corpus(str(path)) == Corpus(tuple(DOCUMENTS), "data.parquet", digest(DOCUMENTS))


def test_a_folder_gives_its_source_files_in_order(tmp_path: Path) -> None:
    for name, text in {"b.py": "b", "a/z.md": "z", "a/image.png": "no", "empty.txt": " \n", "A.PY": "A"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    corpus = load_corpus(str(tmp_path))
    assert corpus.documents == ("A", "z", "b") and corpus.source == tmp_path.name
    assert corpus == load_corpus(str(tmp_path))


def test_the_digest_tells_documents_and_their_boundaries_apart(tmp_path: Path) -> None:
    digests = set()
    for number, documents in enumerate([["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"]]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
        digests.add(load_corpus(str(path)).sha256)
    assert len(digests) == 4


def test_lone_surrogates_do_not_reach_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert load_corpus(str(path)).documents == ("a?b 😀",)


@pytest.mark.slow
def test_standard_library_splits_are_disjoint_by_file_not_empty_and_deterministic() -> None:
    calibration, heldout = (load_corpus(STDLIB, split=split) for split in ("calibration", "heldout"))
    assert calibration == load_corpus(STDLIB)
    assert len(calibration.documents) > 2 * len(heldout.documents) > 40
    shared = {text for text in set(calibration.documents) & set(heldout.documents) if len(text) > 200}
    assert not shared
    assert calibration.source == "python-stdlib:calibration" and heldout.source == "python-stdlib:heldout"
    root = Path(sysconfig.get_paths()["stdlib"])
    assert not [text for text in (root / "test").glob("test_grammar.py") if text.read_text() in calibration.documents]


def test_standard_library_splits_partition_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"package{i % 7}/module{i}.py" for i in range(60)]
    for name in [*names, "site-packages/x.py", "test/y.py", "package0/tests/z.py", "data.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    calibration, heldout = (load_corpus(STDLIB, split=split).documents for split in ("calibration", "heldout"))
    assert sorted(calibration + heldout) == sorted(names)  # a partition, and nothing that was to be skipped
    assert len(calibration) > len(heldout) > 0
    # The split depends on the path alone: pinned, since moving a file would let calibration text into evaluation.
    assert heldout == PINNED


PINNED = (
    "package1/module43.py",
    "package1/module50.py",
    "package2/module30.py",
    "package3/module31.py",
    "package3/module45.py",
    "package4/module32.py",
    "package4/module39.py",
    "package4/module53.py",
    "package5/module19.py",
    "package5/module47.py",
    "package5/module54.py",
)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\t\n", "is empty"),
        ("image.txt", b"\x89PNG\r\n\x1a\n\xff\xfe", r"not UTF-8 text \(byte 0\)"),
        ("late.txt", b"abc\xff", r"not UTF-8 text \(byte 3\)"),
        ("nul.txt", b"abc\x00def", "NUL"),
        ("gone.jsonl", b"", "is empty"),
        ("broken.jsonl", b'{"text": "a"}\n\n{"text": \n', r"line 3: not JSON"),
        ("list.jsonl", b'{"text": "a"}\n["text"]\n', r"line 2: no key 'text'; found list"),
        ("key.jsonl", b'{"content": "a", "lang": "py"}\n', r"line 1: no key 'text'; found 'content', 'lang'"),
        ("type.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"line 2: 'text' is int, wanted str"),
        ("null.jsonl", b'{"text": null}\n', r"line 1: 'text' is NoneType, wanted str"),
        ("blank.jsonl", b'{"text": ""}\n{"text": " "}\n', "every document is empty"),
        ("fake.parquet", b"not parquet at all", "is not a parquet file"),
    ],
)
def test_unusable_files_are_named_with_the_reason(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(CalibrationError, match=f"{name}.*{message}"):
        load_corpus(str(path))


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "n": [1]}), path)
    with pytest.raises(CalibrationError, match="no column 'text'; found content, n"):
        load_corpus(str(path))
    with pytest.raises(CalibrationError, match="'n' is int, wanted str"):
        load_corpus(str(path), text_key="n")


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "/no/such/folder", "~/no/such/folder"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(CalibrationError, match=r"no such file or folder.*python-stdlib"):
        load_corpus(name)


def test_a_folder_without_source_files(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(CalibrationError, match="holds no source file"):
        load_corpus(str(tmp_path))


def test_every_binary_file_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "nul.py").write_bytes(b"a\x00b")
    (tmp_path / "picture.txt").write_bytes(b"abc\xff\xd8")
    with pytest.raises(CalibrationError) as caught:
        load_corpus(str(tmp_path))
    message = str(caught.value)
    assert "nul.py' holds NUL bytes" in message and "picture.txt' is not UTF-8 text (byte 3)" in message
    assert "good.py" not in message and "more" not in message


def test_at_most_ten_files_of_a_folder_are_named(tmp_path: Path) -> None:
    for number in range(13):
        (tmp_path / f"bad{number:02}.c").write_bytes(b"\xff")
    with pytest.raises(CalibrationError, match="… and 3 more") as caught:
        load_corpus(str(tmp_path))
    assert str(caught.value).count("is not UTF-8") == 10


@pytest.mark.parametrize("skipped", [".git", ".venv/lib", "node_modules/x", "a/__pycache__", "lib/site-packages/p", "venv"])
def test_hidden_folders_and_installed_packages_are_skipped(tmp_path: Path, skipped: str) -> None:
    root = tmp_path / ".hidden" / "venv"  # only names below the folder asked for count
    for name in ("a.py", f"{skipped}/b.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    assert load_corpus(str(root)).documents == ("a.py",)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfx = 1\r\n")
    (tmp_path / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert load_corpus(str(tmp_path / "a.py")).documents == ("x = 1\r\n",)
    assert load_corpus(str(tmp_path / "data.jsonl")).documents == ("a",)
    (tmp_path / "data.jsonl").unlink()
    assert load_corpus(str(tmp_path)).documents == ("x = 1\n",)


class Hub(types.ModuleType):
    """Stands in for the `datasets` library: endless rows, and how it was asked and how many were taken."""

    def __init__(self, row: dict[str, object], fail_at: int = -1) -> None:
        super().__init__("datasets")
        self.row, self.fail_at, self.taken = row, fail_at, 0
        self.asked: list[tuple[object, ...]] = []

    def load_dataset(
        self, path: str, name: str | None = None, *, split: str, streaming: bool = False
    ) -> Iterator[dict[str, object]]:
        self.asked.append((path, name, split, streaming))
        return self.rows()

    def rows(self) -> Iterator[dict[str, object]]:
        while True:
            if self.taken == self.fail_at:
                raise OSError("connection lost")
            self.taken += 1
            assert self.taken < 1000, "reads on and on"
            yield self.row


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("teknium/OpenHermes-2.5", ("teknium/OpenHermes-2.5", None, "train", True)),
        ("org/data.v1:python:test", ("org/data.v1", "python", "test", True)),
        ("wikitext", ("wikitext", None, "train", True)),
    ],
)
def test_hub_datasets_are_streamed_up_to_a_limit(
    name: str, asked: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({"text": "x" * 10})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr(lord_quant.corpus, "HUB_CHARACTERS", 95)
    corpus = load_corpus(name)
    assert hub.asked == [asked] and corpus.source == name
    assert len(corpus.documents) == hub.taken == 10


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (Hub({"text": "x"}, fail_at=3), "org/name.*connection lost"),
        (Hub({"content": "x"}), "^dataset 'org/name': no key 'text'; found 'content'"),
    ],
    ids=["network", "key"],
)
def test_hub_errors_are_calibration_errors(hub: Hub, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(CalibrationError, match=message):
        load_corpus("org/name")


@pytest.mark.parametrize("name", ["org/data.parquet", "code.py", "../x", "~nobody-here/x", "notes.TXT"])
def test_what_is_written_like_a_file_never_reaches_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no such file, nor beside it
    hub = Hub({"text": "x"})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(CalibrationError, match="no such file or folder"):
        load_corpus(name)
    assert not hub.asked


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    assert load_corpus(".").source == load_corpus(str(tmp_path)).source == tmp_path.name
