# SPDX-License-Identifier: Apache-2.0
"""Quantizing the factors of one layer, each form in its own way; why so is said in `stack.py`, steps 3 to 6 and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lord_quant.config import JointConfig
from lord_quant.decompose import Factors
from lord_quant.halves import seen_through, symmetric_product
from lord_quant.linalg import Note, damped_right_solve, random_orthogonal
from lord_quant.rounding.coupling import Coupling
from lord_quant.rounding.refine import Quantized, refine
from lord_quant.rounding.solver import Rounding, Solver, Solvers, prepared
from lord_quant.rounding.two_sided import round_each, round_rows


REFIT_DAMPING = 0.01
DEFLATED_SHARE = 0.1
"""μ: how much of H stays in the metric of a factor whose errors will be absorbed."""


def refit_up(
    target: torch.Tensor,
    covariance: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    damping: float = REFIT_DAMPING,
    note: Note | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the `up` that minimises ‖up · down − T‖_H for this `down`, and its metric, down · H · downᵀ.

    Damping pulls towards the given `up`.
    """
    seen = down @ covariance
    metric = symmetric_product(seen, down.T)
    return up + damped_right_solve((target - up @ down) @ seen.T, metric, damping, note), metric


def deflated(
    covariance: torch.Tensor, down: torch.Tensor, share: float = DEFLATED_SHARE, note: Note | None = None
) -> torch.Tensor:
    """Returns H_⊥ + μ H: the second moment of what the bottleneck cannot predict of its input, and a little of H."""
    seen = down @ covariance
    known = damped_right_solve(seen.T, symmetric_product(seen, down.T), 1e-6, note)
    metric = symmetric_product(known, seen).mul_(share - 1).add_(covariance)  # in place: these are large
    return (metric + metric.T).div_(2)


class Objective(NamedTuple):
    """What rounded factors are to be near: tr G (up · down − T) H (up · down − T)ᵀ.

    Attributes:
        target: T with shape (m, n).
        covariance: H with shape (n, n).
        metric: G with shape (m, m); None counts outputs alike.
    """

    target: torch.Tensor
    covariance: torch.Tensor
    metric: torch.Tensor | None


def stack_factors(
    objective: Objective, factors: Factors, quantize: Solvers, options: JointConfig, seed: int, note: Note | None = None
) -> dict[str, Quantized]:
    """Quantizes factors in the form they are in.

    Args:
        objective: What they are to be near.
        factors: The factors.
        quantize: Solvers for `down` and for `up`.
        options: Which ideas are on.
        seed: Of the rotation.
        note: Is told of remedies.
    """
    if factors.pivots is None:
        return stack_two_factor(objective, factors, quantize, options, seed, note)
    if factors.of_inputs:
        return stack_column_pivoted(objective, factors, quantize, options, note)
    return stack_pivoted(objective, factors, quantize, options)


class Part(NamedTuple):
    """A matrix that is to be rounded.

    Attributes:
        weight: What it should be, with shape (m, n).
        hessian: What errors cost by its inputs, with shape (n, n).
        outputs: What they cost by its outputs, with shape (m, m); None counts them alike.
    """

    weight: torch.Tensor
    hessian: torch.Tensor
    outputs: torch.Tensor | None

    def rounded(self, *solvers: Solver) -> Iterator[Quantized]:
        """Yields what each of some solvers makes of it."""
        return round_each(solvers, *self)


class Stages(NamedTuple):
    """Two factors of which the second is rounded for what the first has become.

    Attributes:
        first: Name of the factor that goes first, as in a module: ".down" or ".up".
        part: That factor.
        then: Returns the other one for the first as it was rounded.
    """

    first: str
    part: Part
    then: Callable[[Quantized], Part]

    @property
    def second(self) -> str:
        """Name of the factor that goes second."""
        return ".up" if self.first == ".down" else ".down"

    def rounded(self, quantize: Solvers) -> dict[str, Quantized]:
        """Rounds both."""
        solvers = {".down": quantize.down, ".up": quantize.up}
        first = next(self.part.rounded(solvers[self.first]))
        second = next(self.then(first).rounded(solvers[self.second]))
        return {".down": first, ".up": second} if self.first == ".down" else {".down": second, ".up": first}


def stack_two_factor(
    objective: Objective, factors: Factors, quantize: Solvers, options: JointConfig, seed: int, note: Note | None = None
) -> dict[str, Quantized]:
    """Quantizes two plain factors."""
    return two_factor_stages(objective, factors, options, seed, note).rounded(quantize)


def two_factor_stages(
    objective: Objective, factors: Factors, options: JointConfig, seed: int, note: Note | None = None
) -> Stages:
    """Chooses gauge, order and metrics of two plain factors, which do not depend on how they are rounded."""
    target, covariance, metric = objective
    down, up, rank = factors.down, factors.up, len(factors.down)
    if options.rotate:
        rotation = random_orthogonal(rank, seed, down)
        down, up = rotation.T @ down, up @ rotation
    size = down.square().mean().clamp_min(torch.finfo(down.dtype).tiny)
    balance = (up.square().mean() / size).pow(0.25).clamp(1e-3, 1e3)
    down, up = down * balance, up / balance
    outputs, inputs = target.shape
    coupled, absorbing = metric if options.two_sided else None, options.deflate and options.refit
    up_has_fewer = outputs < inputs or (outputs == inputs and coupled is not None)
    if options.order == "up_first" or (options.order == "auto" and up_has_fewer):
        outside = deflated(coupled, up.T, note=note) if absorbing and coupled is not None else coupled

        def refitted(first: Quantized) -> Part:
            grid = first.weight() if options.refit else up
            seen = grid if metric is None else metric @ grid
            weights = grid.T @ seen
            # A backward stable solve with a metric whose damping bounds its condition: near the optimum in what it costs.
            best = damped_right_solve(target.T @ seen, weights, 1e-7, note).T if options.refit else down
            return Part(best, covariance, None if coupled is None else weights)

        return Stages(".up", Part(up, seen_through(down, covariance), outside), refitted)
    left = deflated(covariance, down, note=note) if absorbing else covariance
    rows = None if coupled is None else symmetric_product(up.T @ coupled, up)
    return _down_first(target, covariance, up, Part(down, left, rows), coupled, options.refit, note)


def _down_first(
    target: torch.Tensor,
    covariance: torch.Tensor,
    up: torch.Tensor,
    down: Part,
    outputs: torch.Tensor | None,
    refit: bool,
    note: Note | None = None,
) -> Stages:
    """Has `down` go first, then `up`, or its optimum for the quantized `down`, in the metric of the bottleneck."""

    def refitted(first: Quantized) -> Part:
        grid = first.weight()
        if refit:
            return Part(*refit_up(target, covariance, grid, up, note=note), outputs)
        return Part(up, seen_through(grid, covariance), outputs)

    return Stages(".down", down, refitted)


def stack_pivoted(objective: Objective, factors: Factors, quantize: Solvers, options: JointConfig) -> dict[str, Quantized]:
    """Quantizes factors with pivots among the outputs."""
    target, covariance, metric = objective
    down, up, pivots, others = factors.down, factors.up, factors.pivots, factors.others()
    spread = target.new_zeros(len(target), len(down))
    spread[pivots], spread[others] = torch.eye(len(down)).to(spread), up
    coupled = rows = metric if options.two_sided else None
    if coupled is not None:
        if options.order != "down_first" and options.deflate and options.refit:
            coupled = deflated(coupled, spread.T)
        coupled = coupled[others[:, None], others]
    if options.order == "down_first":
        rows = None if rows is None else symmetric_product(spread.T @ rows, spread)
        first_down = Part(down, covariance, rows)
        return _down_first(target[others], covariance, up, first_down, coupled, options.refit).rounded(quantize)
    first = round_rows(quantize.up, up, seen_through(down, covariance), coupled)
    if not options.refit:
        return {".down": quantize.down(down, covariance), ".up": first}
    # What `down` computes enters all outputs: itself, and those predicted from it.
    spread[others] = first.weight()
    seen = spread if metric is None else metric @ spread
    rows = spread.T @ seen
    down = torch.linalg.solve(rows, seen.T @ target)
    return {".down": round_rows(quantize.down, down, covariance, rows), ".up": first}


def stack_column_pivoted(
    objective: Objective, factors: Factors, quantize: Solvers, options: JointConfig, note: Note | None = None
) -> dict[str, Quantized]:
    """Quantizes factors with pivots among the inputs; `down` goes first, whatever the order."""
    target, covariance, metric = objective
    up, others, down = factors.up, factors.others(), factors.full_down()
    rows = symmetric_product(up.T if metric is None else up.T @ metric, up)
    left = deflated(covariance, down, note=note) if options.deflate and options.refit else covariance
    first = round_rows(quantize.down, factors.down, left[others[:, None], others], rows)
    down[:, others] = first.weight()
    if options.refit:
        up, seen = refit_up(target, covariance, down, up, note=note)
    else:
        seen = seen_through(down, covariance)
    return {".down": first, ".up": round_rows(quantize.up, up, seen, metric if options.two_sided else None)}


def refined(solve: Solver | Solvers, sweeps: int) -> Solvers:
    """Returns solvers whose results are refined by so many sweeps; one alone stands for both factors."""
    both = solve if isinstance(solve, Solvers) else Solvers(solve, solve)
    return Solvers(Polished(both.down, sweeps), Polished(both.up, sweeps))


@dataclass(frozen=True)
class Polished:
    """A solver whose results are refined by so many sweeps."""

    solve: Solver
    sweeps: int

    def __call__(self, weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
        """Quantizes a weight."""
        return refine(weight, hessian, self.solve(weight, hessian).to(weight), self.sweeps)

    def of(self, hessian: torch.Tensor, like: Rounding | None = None) -> Rounding:
        """Returns what quantizes several weights in one metric; `like` is what another one returned for it."""
        inner = like.rounded if isinstance(like, _Polishing) else None
        return _Polishing(prepared(self.solve, hessian, inner), hessian, self.sweeps)


@dataclass(frozen=True)
class _Polishing:
    """What a solver has prepared in one metric, and how its results are refined there."""

    rounded: Rounding
    hessian: torch.Tensor
    sweeps: int

    def __call__(self, weight: torch.Tensor, coupling: Coupling | None = None) -> Quantized:
        """Quantizes a weight."""
        return refine(weight, self.hessian, self.rounded(weight, coupling).to(weight), self.sweeps, coupling)
