# SPDX-License-Identifier: Apache-2.0
"""Every contract says where the product relies on it, in a file that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path


FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def test_every_contract_names_the_file_that_relies_on_it() -> None:
    """tests/contracts is read when a host breaks: the first line must lead to the code."""
    wrong = []
    for path in sorted(FOLDER.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                first = (ast.get_docstring(node) or "").split("\n")[0]
                named = re.match(r"((?:lord_quant|tests)/[\w/.]+|README\.md)\b", first)
                if named is None or not (ROOT / named[1]).exists():
                    wrong.append(f"{path.name}: {node.name}")
    assert not wrong, "\n".join(wrong)
