# SPDX-License-Identifier: Apache-2.0
"""What a compressed model may cost: the `budget` section of a configuration, and sizes as people write them."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from lord_quant.errors import BudgetError


BUDGETS = ("target_bpw", "target_size", "max_loss")
"""The kinds of budget, of which exactly one is given."""
UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class BudgetConfig:
    """What a compressed model may cost; exactly one of the first three is given.

    Attributes:
        target_bpw: Stored bits per weight of the linear layers, all in, at most.
        target_size: Tensors of the whole checkpoint at most: bytes, or a size such as 4GB.
        max_loss: Predicted loss in nats per token, at most; the smallest such model is wanted.
        min_param_ratio: Fraction of a layer's weights that its factors must hold, in (0, 1]; None sets no floor. That a
            truncation is harmless is predicted from the calibration text; a floor bounds how far this is trusted.
        statistics: File that `lord sensitivity` wrote; None measures first.
    """

    target_bpw: float | None = None
    target_size: int | str | None = None
    max_loss: float | None = None
    min_param_ratio: float | None = None
    statistics: str | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) != 1:
            raise BudgetError(f"{len(given)} budgets are given; wanted one of {', '.join(BUDGETS)}")
        for name, value in given.items():
            number = parse_size(value) if name == "target_size" and isinstance(value, str) else value
            if not _is_number(number) or not 0 < number < float("inf"):
                raise BudgetError(f"{name} is {value!r}; wanted a positive number")
        ratio = self.min_param_ratio
        if ratio is not None and (not _is_number(ratio) or not 0 < ratio <= 1):
            raise BudgetError(f"min_param_ratio is {ratio!r}; wanted a number in (0, 1], such as 0.75")
        if self.statistics is not None and (not isinstance(self.statistics, str) or not self.statistics):
            raise BudgetError(f"statistics is {self.statistics!r}; wanted a file that `lord sensitivity` wrote")

    @property
    def size(self) -> int | None:
        """`target_size` in bytes."""
        return parse_size(self.target_size) if isinstance(self.target_size, str) else self.target_size

    @property
    def asked(self) -> dict[str, Any]:
        """What is given, sizes in bytes, but for the place of the statistics."""
        values = dataclasses.asdict(self) | {"target_size": self.size}
        return {name: value for name, value in values.items() if name != "statistics" and value is not None}


def parse_size(text: str) -> int:
    """Reads a size such as 900MB, 4GB or 3.5GiB, in bytes.

    Raises:
        BudgetError: It is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS or len(match[1]) > 30:
        raise BudgetError(f"size {text!r}; wanted a number of bytes, or one with kB, MB, GB, KiB, MiB or GiB: 4GB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
