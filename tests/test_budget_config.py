# SPDX-License-Identifier: Apache-2.0
"""Budgets and sizes as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from lord_quant.budget_config import BudgetConfig, parse_size
from lord_quant.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "size"),
    [("1234", 1234), ("900MB", 900_000_000), ("4GB", 4 * 10**9), ("3.5 GiB", int(3.5 * 2**30)), ("2kib", 2048)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 TB", "-1GB", "1e9", "4GB or so", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="wanted a number of bytes"):
        parse_size(text)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({}, "0 budgets are given"),
        ({"target_bpw": 3.0, "max_loss": 0.1}, "2 budgets are given"),
        ({"target_bpw": 0.0}, "target_bpw is 0.0; wanted a positive number"),
        ({"max_loss": float("nan")}, "max_loss is nan"),
        ({"target_size": True}, "target_size is True"),
        ({"target_size": "0GB"}, "target_size is '0GB'; wanted a positive number"),
        ({"target_size": "four"}, "size 'four'; wanted a number of bytes"),
        ({"target_bpw": "3"}, "target_bpw is '3'; wanted a positive number"),
        ({"target_bpw": 3, "min_param_ratio": 0}, r"min_param_ratio is 0; wanted a number in \(0, 1\]"),
        ({"target_bpw": 3, "min_param_ratio": 1.01}, "min_param_ratio is 1.01"),
        ({"target_bpw": 3, "statistics": 3}, "statistics is 3; wanted a file"),
        ({"statistics": "model.stats"}, "0 budgets are given"),
    ],
)
def test_a_budget_is_one_positive_number(values: dict[str, Any], error: str) -> None:
    with pytest.raises(BudgetError, match=error):
        BudgetConfig(**values)


def test_a_size_is_bytes_however_it_is_written() -> None:
    assert BudgetConfig(target_size="4GB").size == BudgetConfig(target_size=4_000_000_000).size == 4 * 10**9
    assert BudgetConfig(target_bpw=3).size is None
