# SPDX-License-Identifier: Apache-2.0
"""Scores of HumanEval samples: pass@k, and right and wrong solutions in the sandbox."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lord_quant.errors import EvaluationError, HostError
from lord_quant.evaluation import sandbox
from lord_quant.evaluation.humaneval import load_problems, pass_at_k, run_checks, score_samples
from lord_quant.evaluation.sandbox import Check


@given(st.integers(1, 9), st.data())
def test_pass_at_k_counts_all_draws(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


@given(st.integers(1, 300), st.data())
def test_pass_at_k_equals_the_published_product(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    wrong = 1.0
    for i in range(n - c + 1, n + 1):
        wrong *= 1 - k / i
    assert pass_at_k(n, c, k) == pytest.approx(1.0 if n - c < k else 1 - wrong, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 6), (5, 2, 0), (5, 6, 1), (5, -1, 1), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(EvaluationError):
        pass_at_k(n, c, k)


@pytest.mark.slow
def test_canonical_solutions_all_pass() -> None:
    score = score_samples([(p.task_id, p.canonical_solution) for p in load_problems().values()])
    assert [r.reason for r in score.results] == ["passed"] * 164
    assert score.pass_at_k == {1: 1.0}


@pytest.mark.slow
def test_empty_completions_all_fail() -> None:
    score = score_samples([(name, "") for name in load_problems()])
    assert score.pass_at_k == {1: 0.0}
    assert not any(score.correct.values())
    assert {r.reason for r in score.results} <= {"failed: AssertionError", "failed: TypeError", "failed: SyntaxError"} | {
        "failed: IndentationError"
    }


def test_one_right_one_wrong() -> None:
    problem = load_problems()["HumanEval/0"]
    score = score_samples([(problem.task_id, problem.canonical_solution), (problem.task_id, "    return None\n")], k=(1, 2))
    assert score.pass_at_k == {1: 0.5, 2: 1.0}
    assert score.correct == {"HumanEval/0": 1}
    assert [r.passed for r in score.results] == [True, False]


def test_unknown_problem_names_the_nearest() -> None:
    with pytest.raises(EvaluationError, match=r"HumanEva/1'; did you mean 'HumanEval/1"):
        score_samples([("HumanEva/1", "")])


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(EvaluationError, match="pass@10"):
        score_samples([("HumanEval/0", "")], k=(1, 10))


def test_a_sandbox_that_does_not_start_is_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "none.py")
    with pytest.raises(HostError, match="did not start for 2 of 2"):
        run_checks([Check(""), Check("")], workers=1)
