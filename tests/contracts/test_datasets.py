# SPDX-License-Identifier: Apache-2.0
"""What the product takes for granted about datasets, huggingface_hub and pyarrow, which bring it text and files."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_rows_become_a_split_of_a_dataset() -> None:
    """lord_quant/evaluation/documents.py hands tasks their documents like that."""
    from datasets import Dataset, DatasetDict

    rows = [{"text": "one", "check": "x"}, {"text": "two\n", "check": ""}]
    split = DatasetDict({"test": Dataset.from_list(rows)})["test"]
    assert list(split) == rows and split.num_rows == 2


def test_a_dataset_is_streamed_by_configuration_and_split(tmp_path: Path) -> None:
    """lord_quant/corpus.py reads datasets of the hub with `load_dataset(…, streaming=True)`, here one of local files."""
    from datasets import load_dataset

    (tmp_path / "test.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    rows = load_dataset(str(tmp_path), None, split="test", streaming=True)
    assert [row["text"] for row in rows] == ["one", "two"]


def test_a_parquet_files_column_is_read_by_name(tmp_path: Path) -> None:
    """lord_quant/corpus.py reads the names from the schema, then one column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one", None], "other": [1, 2]}), tmp_path / "rows.parquet")
    assert pq.read_schema(tmp_path / "rows.parquet").names == ["text", "other"]
    assert pq.read_table(tmp_path / "rows.parquet", columns=["text"])["text"].to_pylist() == ["one", None]


def test_what_the_hub_cannot_give_is_an_os_error_or_a_value_error(tmp_path: Path) -> None:
    """lord_quant/blocks/source.py turns both into its own; tests run offline."""
    from huggingface_hub import snapshot_download

    with pytest.raises((OSError, ValueError)):
        snapshot_download("nobody/nothing", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises((OSError, ValueError)):
        snapshot_download("no name at all", cache_dir=tmp_path)
