# SPDX-License-Identifier: Apache-2.0
"""Rounding in a metric on both sides: what one output has missed, the outputs still open take back.

The problem. With a metric H on the inputs and G on the outputs, an error D of a weight W (m, n) costs tr G D H Dᵀ. GPTQ
passes the error of a column on to later columns, as H says, and takes outputs as independent. The model's loss does not:
what follows a layer mixes its outputs, and so its metric couples them.

The solution. For rows as for columns. With some rows fixed and wrong by E₁, the best place of the others is

    W₂ − N₂₂⁻¹ N₂₁ E₁,     N = G with rows 1 first,

whatever H is: the derivative of the cost by D₂ is 2 (G₂₁ E₁ + G₂₂ D₂) H. So rows are quantized a few at a time, the
costliest first, each few by a solver that knows how errors of these rows add up (`coupling.py`), and then the others move.
With N⁻¹ = UᵀU this is what U does to columns in `solver.py`, and U is made in the same way. A few rows have the metric
(U_ffᵀ U_ff)⁻¹ of their own part of U: what is left of G once later rows have moved. All of their columns are done before
others move, so that they are polished before others rely on them.

Beside a GPU, and in a solver that takes rows as independent, those quantized together do not hear of each other; more steps
make up for most of that. A solver that prepares its Hessian does so once.

Compare YAQA (Tseng, Sun, Hou, De Sa: Model-Preserving Adaptive Rounding, arXiv 2505.22988), where both sides of a Kronecker
product are factored and rows and columns are fed back together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from lord_quant.rounding.coupling import Coupling
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.solver import Feedback, Rounding, Solver, prepared


STEPS = 8
"""In how many steps rows are quantized, at least. Those of a step know of each other; more steps gain a few percent."""
STEP_ROWS = 256
"""Rows per step, at most: what it takes that they know of each other grows with their square."""
GPU_STEPS = 16
"""Steps on a GPU. Its processor would be what all waits for if it took rows that know of each other one by one; so many
steps of rows that do not lose some 2 % more by rounding, four would lose 11 %."""
DAMPING = 1e-7
"""Fraction of the mean diagonal added to the outputs' metric, which comes damped already: for its factor alone."""


def num_steps(rows: int, on_gpu: bool = False) -> int:
    """Returns in how many steps so many rows are quantized."""
    return min(rows, GPU_STEPS if on_gpu else max(STEPS, -(-rows // STEP_ROWS)))


def round_rows(
    solve: Solver,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    outputs: torch.Tensor | None,
    steps: int | None = None,
) -> Quantized:
    """Quantizes a weight in the metric `outputs` ⊗ `hessian`.

    Args:
        solve: Quantizes rows in the metric of the inputs, and coupled ones if it can (`solver.prepared`).
        weight: W with shape (m, n).
        hessian: H with shape (n, n).
        outputs: G with shape (m, m), symmetric positive definite; None counts outputs alike and quantizes all rows at once.
        steps: In how many steps, as many as there are rows at most; None: `num_steps`.

    Returns:
        What the solver makes; ``loss`` is tr G D H Dᵀ over its tokens, before polishing.

    Raises:
        NumericsError: The solver raises it, or G is not positive definite.
    """
    return next(round_each([solve], weight, hessian, outputs, steps))


def round_each(
    solvers: Sequence[Solver],
    weight: torch.Tensor,
    hessian: torch.Tensor,
    outputs: torch.Tensor | None,
    steps: int | None = None,
) -> Iterator[Quantized]:
    """Does what `round_rows` does with one solver after another; those that differ in bits alone factor H once."""
    if outputs is None or len(weight) == 1:
        yield from (solve(weight, hessian) for solve in solvers)
        return
    start, steps = time.perf_counter(), steps or num_steps(len(weight), on_gpu=weight.device.type != "cpu")
    cost = outputs.diagonal() * (weight.square() @ hessian.diagonal())
    order = torch.argsort(cost, descending=True, stable=True)
    size = outputs.diagonal().double().mean()
    feedback, _ = Feedback.of(outputs, size, order, DAMPING, weight.dtype)
    back, quantize = torch.argsort(order), None
    for solve in solvers:
        quantize = prepared(solve, hessian, quantize)
        found = _by_rows(quantize, weight[order], feedback, steps)
        yield found._replace(
            codes=found.codes[back],
            scales=found.scales[back],
            zeros=found.zeros[back],
            loss=None if found.loss is None else float(size) * found.loss,
            seconds=time.perf_counter() - start,
        )
        start = time.perf_counter()


def _by_rows(quantize: Rounding, rest: torch.Tensor, feedback: Feedback, steps: int) -> Quantized:
    """Quantizes rows in their order, with shape (m, n), which are overwritten; ``loss`` is in units of the feedback."""
    parts, losses = list[Quantized](), list[float | None]()
    on_cpu = rest.device.type == "cpu"
    for chosen in torch.arange(len(rest)).tensor_split(min(steps, len(rest))):
        first, last = int(chosen[0]), int(chosen[-1]) + 1
        own, later = feedback.rows(first, last)
        coupling = Coupling.of(own) if on_cpu and len(own) > 1 else None
        parts.append(quantize(rest[first:last], coupling))
        # A row alone counts by what is left of its own weight; several that do not hear of each other by the mean of that.
        weight_left = 1.0 if coupling is not None else float(own.diagonal().double().pow(-2).mean())
        losses.append(None if parts[-1].loss is None else weight_left * parts[-1].loss)
        missed = torch.linalg.solve_triangular(own.T, parts[-1].weight() - rest[first:last], upper=False)
        rest[last:].addmm_(later.T, missed)
    return parts[0]._replace(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat([part.zeros for part in parts]),
        loss=None if None in losses else sum(loss for loss in losses if loss is not None),
        damp_percent=max(part.damp_percent for part in parts),
    )
