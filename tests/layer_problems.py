# SPDX-License-Identifier: Apache-2.0
"""One layer with the inputs it sees in the dense and in the compressed model, and solvers to compress it with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from lord_quant.config import JointConfig
from lord_quant.decompose import Factors
from lord_quant.moments import PairedMoments
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.solver import Solver
from lord_quant.stack import Stacked, stack_layer
from lord_quant.truncation import unit_metric


F64 = torch.float64
PLAIN = JointConfig(anchor=False, rotate=False, refit=False, order="down_first", deflate=False, refine=0)
FORMS = ["two_factor", "pivoted", "column_pivoted"]


class Problem(NamedTuple):
    """A layer and the inputs it sees in the dense model (x) and in the compressed one (y)."""

    weight: torch.Tensor
    bias: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    moments: PairedMoments

    def lost(self, weight: torch.Tensor) -> float:
        """Mean squared error of a weight's outputs from y, means apart."""
        x, y = self.x - self.x.mean(0), self.y - self.y.mean(0)
        return float((x @ self.weight.T - y @ weight.double().T).square().sum() / len(x))


def moments_of(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype = F64) -> PairedMoments:
    left, right = x - x.mean(0), y - y.mean(0)
    tensors = x.mean(0), y.mean(0), right.T @ right / len(y), left.T @ right / len(x)
    return PairedMoments(*(tensor.to(dtype) for tensor in tensors), num_tokens=len(x))


def problem(m: int, n: int, seed: int = 0, tokens: int | None = None, drift: float = 0.3) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    mix = draw(n, n) / n**0.5 * torch.logspace(0.5, -0.5, n, dtype=F64)
    x = draw(tokens or 12 * n, n) @ mix + draw(n)
    y = x @ (torch.eye(n, dtype=F64) + drift * draw(n, n) / n**0.5) + drift * draw(len(x), n) @ mix + drift * draw(n)
    return Problem(draw(m, n), draw(m), x, y, moments_of(x, y))


def layer_of(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs of uneven loudness."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6 * n, n, generator=generator) @ torch.randn(n, n, generator=generator) / n**0.5
    x *= torch.logspace(-0.5, 0.5, n)[torch.randperm(n, generator=generator)]
    weight, hessian = torch.randn(m, n, generator=generator), x.T @ x / len(x)
    return weight, (hessian + hessian.T) / 2  # a product need not be symmetric to the last bit


def perturbed(factors: Factors, seed: int) -> Iterator[torch.Tensor]:
    """Yields products of factors one of which was moved at random, a little and more."""
    generator = torch.Generator().manual_seed(seed)
    for part in ("down", "up"):
        for step in (1e-3, 1e-1):
            old = getattr(factors, part)
            noise = step * old.abs().max() * torch.randn(old.shape, generator=generator, dtype=F64)
            yield factors._replace(**{part: old + noise}).product()


def full_rank(m: int, n: int, form: str) -> int:
    """The largest rank that a layer of m outputs and n inputs can have in a form."""
    return min(m - (form == "pivoted"), n - (form == "column_pivoted"))


def squared(difference: torch.Tensor, covariance: torch.Tensor) -> float:
    """‖D‖²_H."""
    return float(((difference @ covariance) * difference).sum())


def exact(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
    """A solver that loses nothing: its codes are the weight."""
    scales = weight.new_ones(len(weight), 1)
    return Quantized(weight.clone(), scales, 0 * scales, torch.zeros(weight.shape[1], dtype=torch.int32), 8)


def crude(bits: int = 3, group: int = 8) -> Solver:
    """Round to nearest between each group's least and largest weight; blind to the metric."""

    def solve(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
        g_idx = torch.arange(weight.shape[1], dtype=torch.int32) // group
        parts = weight.split(group, dim=1)
        low = torch.stack([part.amin(dim=1).clamp_max(0) for part in parts], dim=1)
        high = torch.stack([part.amax(dim=1).clamp_min(0) for part in parts], dim=1)
        scales = ((high - low) / (2**bits - 1)).clamp_min(1e-6)
        zeros = (-low / scales).round()
        groups = g_idx.long()
        codes = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, 2**bits - 1)
        return Quantized(codes, scales, zeros, g_idx, bits)

    return solve


def run(p: Problem, rank: int | None, form: str, solve: Solver | None, options: JointConfig, **rest: Any) -> Stacked:
    bias, sensitivity = rest.pop("bias", p.bias), rest.pop("sensitivity", None)
    if sensitivity is not None:
        rest["metric"] = unit_metric(sensitivity)
    return stack_layer(p.weight, bias, p.moments, rank, form, solve, options, **rest)


def product(stacked: Stacked) -> torch.Tensor:
    if stacked.factors is None:
        assert stacked.weight is not None
        return stacked.weight
    return stacked.factors.product()
