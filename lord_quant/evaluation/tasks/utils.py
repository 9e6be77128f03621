# SPDX-License-Identifier: Apache-2.0
"""What the task files of this folder call. lm-eval loads this file by its path; the work is done in lord_quant."""

from __future__ import annotations

from typing import Any

from lord_quant.evaluation import documents, humaneval


load_code = documents.load_code


def load_humaneval(**_: Any) -> Any:
    """The 164 problems as the split `test`; lm-eval passes all metadata and model arguments, none of which matter."""
    rows = [{**problem._asdict(), "check": problem.check} for problem in humaneval.load_problems().values()]
    return documents.as_test_split(rows)


def text(doc: dict[str, Any]) -> str:
    return doc["text"]


def stripped_prompt(doc: dict[str, Any]) -> str:
    return doc["prompt"].strip()


def run_completions(responses: list[list[str]], docs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs all completions of all documents, several at a time, in sandboxes; one verdict for each."""
    return _run([doc["prompt"] for doc in docs], responses, docs)


def run_completions_stripped(responses: list[list[str]], docs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return _run([stripped_prompt(doc) for doc in docs], responses, docs)


def _run(prompts: list[str], responses: list[list[str]], docs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    checks = [_problem(doc).check_of(p + r) for p, rs, doc in zip(prompts, responses, docs, strict=True) for r in rs]
    verdicts = iter(zip(checks, humaneval.run_checks(checks), strict=True))
    return [[_verdict(*next(verdicts)) for _ in rs] for rs in responses]


def _problem(doc: dict[str, Any]) -> humaneval.Problem:
    return humaneval.Problem(**{field: doc[field] for field in humaneval.Problem._fields})


def _verdict(check: Any, result: Any) -> dict[str, Any]:
    return {"program": check.program, "passed": result.passed, "reason": result.reason}


def pass_at_k(references: list[str], predictions: list[list[dict[str, Any]]], k: list[int]) -> dict[str, float]:
    """pass@k of one document from its verdicts. A k above the number of samples is left out."""
    verdicts = predictions[0]
    correct = sum(verdict["passed"] for verdict in verdicts)
    return {f"pass@{n}": humaneval.pass_at_k(len(verdicts), correct, n) for n in k if n <= len(verdicts)}
