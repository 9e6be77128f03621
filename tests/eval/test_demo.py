# SPDX-License-Identifier: Apache-2.0
"""The demo's table and plot, on canned rows; the rows themselves are made by `make demo`."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest


EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import demo

    yield demo
    for name in ("demo", "variants"):
        sys.modules.pop(name, None)


def rows() -> list[dict[str, Any]]:
    base = {"bytes_on_disk": 10_900_000, "bits_per_byte": 1.25, "perplexity": 10.0, "pass@1": 0.9939, "bpw": 16.0}
    return [
        base | {"label": "dense", "seconds_to_compress": None},
        base | {"label": "GPTQ 4-bit", "bpw": 4.4, "seconds_to_compress": 21.6},
    ]


def test_table_has_a_line_per_row_and_rounds_to_shown_digits(demo: Any) -> None:
    lines = demo.markdown(rows()).splitlines()
    assert len(lines) == 4
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == [
        "GPTQ 4-bit", "10.90 MB", "4.40", "1.2500", "10.000", "0.994", "22",
    ]  # fmt: skip
    assert lines[2].rstrip("| ").endswith("-")


def test_plot_is_a_png_of_readable_size(demo: Any, tmp_path: Path) -> None:
    demo.draw(rows(), tmp_path / "demo.png")
    data = (tmp_path / "demo.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 1000 and height > 600


def test_rows_cover_what_the_comparison_needs(demo: Any) -> None:
    table = demo.variants(0.75)
    assert [variant.label for variant in table] == [
        "dense", "GPTQ 4-bit", "LoRD float", "naive 4-bit", "joint 4-bit",
    ]  # fmt: skip
    assert table[0].flags is None
    assert table[1].flags == ("--stack", "naive", "--rank-ratio", "1", "--bits", "4")
    assert "naive" not in table[4].flags
