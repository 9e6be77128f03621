# SPDX-License-Identifier: Apache-2.0
"""Budgets run for real: what they were predicted to lose beside what they lose on held-out text.

Predictions come from the calibration text and from each layer alone. Whether they can be trusted on a model is a question
that few budgets answer: each is compressed in memory from the dense model, as `lord quantize` would, and measured in the
same process. Nothing is written, and every compressed model is thrown away after its first forward passes, so that it does
not matter that 4-bit CPU kernels rewrite their weights there. Weights, scales and codes are those of the checkpoint; the
few float tensors of a model stored in half precision are not rounded to it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tabulate import tabulate
from tqdm.auto import tqdm

from lord_quant.blocks.source import load_model
from lord_quant.budget_config import BudgetConfig
from lord_quant.budgets.budget import Planner
from lord_quant.budgets.plan_file import apply_plan
from lord_quant.calibration import windows_at_once
from lord_quant.config import LordConfig
from lord_quant.corpus import Corpus, load_corpus
from lord_quant.errors import EvaluationError
from lord_quant.evaluation.perplexity import DEFAULT_WINDOW, Perplexity, stream_perplexity, tokenize_stream
from lord_quant.runs.pipeline import Job, compress_model, prepare


if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class Point(NamedTuple):
    """One budget, run.

    Attributes:
        budget: Bits per weight allowed.
        bpw: Bits per weight taken.
        predicted_loss: What the plan was predicted to lose, in nats per token where the statistics are in nats.
        measured_loss: What the compressed model loses over the dense one on the held-out text, in nats per token.
        perplexity: Its perplexity there.
        seconds: Wall time of loading, compressing and measuring.
    """

    budget: float
    bpw: float
    predicted_loss: float
    measured_loss: float
    perplexity: float
    seconds: float


class Sweep(NamedTuple):
    """Budgets of one model, run.

    Attributes:
        dense: The dense model on the held-out text.
        points: The budgets, in the order given.
        in_nats: Whether predicted losses are in nats per token.
    """

    dense: Perplexity
    points: tuple[Point, ...]
    in_nats: bool

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "dense": dataclasses.asdict(self.dense),
            "in_nats": self.in_nats,
            "budgets": [point._asdict() for point in self.points],
        }


def sweep(
    planner: Planner,
    config: LordConfig,
    budgets: Sequence[float],
    heldout: Corpus,
    *,
    window: int | None = None,
    max_windows: int | None = None,
) -> Sweep:
    """Compresses a model for several budgets and measures each.

    Args:
        planner: Plans the model.
        config: The run that each budget stands in; its own budget and output do not matter.
        budgets: Bits per weight.
        heldout: Text that is not the calibration text.
        window: Tokens per held-out window; None is 1024 or the model's context, whichever is shorter.
        max_windows: Held-out windows at most; None for all.

    Raises:
        BudgetError: A budget is illegal or out of reach.
        EvaluationError: The held-out text is the calibration text, or the window does not fit.
        LordError: Whatever is wrong with the run. All of these before any weight is loaded.
    """
    chosen = [planner.choose(BudgetConfig(target_bpw=budget)) for budget in budgets]
    runs = [apply_plan(dataclasses.replace(config, output=None), planner.settings(each)) for each in chosen]
    measured_on, jobs = planner.statistics.origin.get("calibration_sha256"), list[Job]()
    for run in runs:  # all with the same text
        jobs.append(prepare(run, measured_on=measured_on, windows=jobs[0].windows if jobs else None))
    ids, window = _heldout_tokens(jobs[0], heldout, window, max_windows)
    for warning in dict.fromkeys(warning for job in jobs for warning in job.warnings):
        logger.warning(warning)

    def measure(model: Any) -> Perplexity:
        size = config.calibration.batch_size or windows_at_once(window)
        return stream_perplexity(model, ids, window=window, max_windows=max_windows, batch_size=size)

    dense = measure(load_model(jobs[0].source, jobs[0].device))
    dense = dataclasses.replace(dense, source=heldout.source, sha256=heldout.sha256)
    points = []
    for budget, allocation, job in zip(budgets, chosen, tqdm(jobs, desc="sweep", unit="budget", disable=None), strict=True):
        start = time.perf_counter()
        model = load_model(job.source, job.device)  # anew: compression works in place
        compress_model(model, job.plan, job.windows, job.config)
        found = measure(model)
        lost = found.nll / found.num_tokens - dense.nll / dense.num_tokens
        seconds = round(time.perf_counter() - start, 3)
        points.append(Point(budget, job.plan.bpw, allocation.loss, lost, found.perplexity, seconds))
        del model  # before the next one is loaded
    return Sweep(dense, tuple(points), planner.in_nats)


def sweep_table(found: Sweep) -> str:
    """Renders a sweep: one line per budget, the dense model's last."""
    unit = "nats" if found.in_nats else "output error"
    rows = [
        [
            f"{point.budget:g}",
            f"{point.bpw:.3f}",
            f"{point.predicted_loss:.4f}",
            f"{point.measured_loss:.4f}",
            f"{point.perplexity:.3f}" if math.isfinite(point.perplexity) else "inf",
        ]
        for point in found.points
    ]
    rows.append(["dense", "-", "-", "-", f"{found.dense.perplexity:.3f}"])
    headers = ["at most", "bits per weight", f"predicted loss ({unit})", "measured loss (nats)", "perplexity"]
    table = tabulate(rows, headers, disable_numparse=True, colalign=["right"] * len(headers))
    text = f"{found.dense.num_windows} windows of {found.dense.window} tokens of {found.dense.source}"
    return f"{table}\n\nmeasured loss: over the dense model, on {text}"


def _heldout_tokens(job: Job, heldout: Corpus, window: int | None, max_windows: int | None) -> tuple[torch.Tensor, int]:
    """Returns the held-out stream, no longer than it is needed, and the window."""
    settings, context = job.config.calibration, job.source.context
    if load_corpus(settings.dataset, text_key=settings.text_key).sha256 == heldout.sha256:
        raise EvaluationError(f"held-out text {heldout.source!r} is the calibration text; wanted other text")
    window = min(DEFAULT_WINDOW, context) if window is None else window
    if not 2 <= window <= context:
        raise EvaluationError(f"window is {window}; wanted 2 to the model's context of {context} tokens")
    if max_windows is not None and max_windows < 1:
        raise EvaluationError(f"max_windows is {max_windows}; wanted at least 1")
    ids = tokenize_stream(job.source.tokenizer, heldout.documents, None if max_windows is None else window * max_windows)
    if len(ids) < 2:
        raise EvaluationError(f"held-out text {heldout.source!r} has {len(ids)} tokens; wanted at least 2")
    return ids, window
