# SPDX-License-Identifier: Apache-2.0
"""What changes of a model's layers cost at first order, window by window, and measured rises that make use of it.

An error D of a weight raises the loss of a window by ⟨∂ loss / ∂ W, D⟩ at first order, and by how much depends on the
window far more than the rest does: it is the noise of what is measured on a few windows. One backward pass per window
tells it for any number of changes, measuring them takes a pass for each. So the rest is measured on a few windows and the
first order on many, which is the difference estimator of sampling from a finite population (Cochran, Sampling Techniques,
section 7.2), the coefficient being 1:

    rise = mean over few (rise − first order) + mean over many (first order).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from bench import Bench
from torch import nn
from torch.nn.functional import cross_entropy

from lord_quant.targets import LinearSite, dense_bias, dense_weight, is_conv1d


class Change(NamedTuple):
    """One layer replaced.

    Attributes:
        site: The layer.
        module: What stands in its place, in float.
    """

    site: LinearSite
    module: nn.Linear


def first_order(model: nn.Module, windows: torch.Tensor, changes: Sequence[Change]) -> torch.Tensor:
    """Returns ⟨∂ loss / ∂ W, ΔW⟩ + ⟨∂ loss / ∂ b, Δb⟩ in nats per token, float64, with shape (windows, changes).

    Args:
        model: The dense model in evaluation mode; left as it was.
        windows: Token windows with shape (windows, seq_len).
        changes: Of single layers, in any number.
    """
    layers = {change.site.name: model.get_submodule(change.site.name) for change in changes}
    errors = [_error(layers[change.site.name], change.module) for change in changes]
    lines = []
    with _gradients(layers) as inputs:
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            found = torch.autograd.grad(cross_entropy(logits.float(), window[1:]), list(inputs.values()))
            of = dict(zip(inputs, found, strict=True))
            lines.append(
                [
                    float((of[change.site.name, "weight"] * weight).sum() + of[change.site.name, "bias"] @ bias)
                    for change, (weight, bias) in zip(changes, errors, strict=True)
                ]
            )
    return torch.tensor(lines, dtype=torch.float64)


def _error(layer: nn.Module, made: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns by how much weight, in the layer's own layout, and bias change."""
    weight = made.weight.detach() - dense_weight(layer)
    before, after = (weight.new_zeros(len(weight)) if bias is None else bias for bias in map(dense_bias, (layer, made)))
    return weight.T if is_conv1d(layer) else weight, after - before


@contextmanager
def _gradients(layers: Mapping[str, nn.Module]) -> Iterator[dict[tuple[str, str], torch.Tensor]]:
    """Yields what to differentiate by: every layer's weight, and zeros that are added to its outputs for as long."""
    inputs: dict[tuple[str, str], torch.Tensor] = {}
    handles, wanted = [], {}
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        wanted[name] = weight.requires_grad
        zeros = torch.zeros(len(dense_weight(layer)), dtype=weight.dtype, requires_grad=True)
        inputs[name, "weight"], inputs[name, "bias"] = weight.requires_grad_(), zeros
        handles.append(layer.register_forward_hook(lambda _layer, _inputs, outputs, zeros=zeros: outputs + zeros))
    try:
        with torch.enable_grad():
            yield inputs
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.get_parameter("weight").requires_grad_(wanted[name])


class Estimate(NamedTuple):
    """A rise of the loss, in nats per token.

    Attributes:
        rest: What was measured less its first order, on a few windows, with shape (few,).
        slope: The first order on many, with shape (many,).
    """

    rest: torch.Tensor
    slope: torch.Tensor

    @classmethod
    def of(cls, rise: torch.Tensor, slope: torch.Tensor) -> Estimate:
        """Returns the estimate from a rise on the first windows and from the first order on all of them."""
        return cls(rise - slope[: len(rise)], slope)

    @property
    def mean(self) -> float:
        """What is estimated."""
        return float(self.rest.mean() + self.slope.mean())

    @property
    def error(self) -> float:
        """Its standard error; the few windows are some of the many."""
        few, many = len(self.rest), len(self.slope)
        both = torch.stack((self.rest, self.slope[:few])).cov()
        variance = float(both[0, 0]) / few + float(self.slope.var()) / many + 2 * float(both[0, 1]) / many
        return math.sqrt(max(variance, 0.0))

    def less(self, other: Estimate) -> Estimate:
        """Returns by how much it is more than another on the same windows."""
        return Estimate(self.rest - other.rest, self.slope - other.slope)


class Measured(NamedTuple):
    """What some changes cost together.

    Attributes:
        loss: The rise of the text's cross entropy.
        divergence: From the dense model's predictions, on few windows, with shape (few,).
    """

    loss: Estimate
    divergence: torch.Tensor


def measure(model: nn.Module, windows: torch.Tensor, few: int, together: Sequence[Sequence[Change]]) -> Iterator[Measured]:
    """Measures changes, each list of them at once; yields what was found, list by list.

    Args:
        model: The dense model in evaluation mode.
        windows: Token windows with shape (windows, seq_len), for the first order.
        few: On how many of them, the first, the rest is measured.
        together: What is changed at once.
    """
    every = list({id(change.module): change for own in together for change in own}.values())
    slopes = dict(zip((id(change.module) for change in every), first_order(model, windows, every).T, strict=True))
    bench = Bench(model, windows[:few])
    for own in together:
        rise = bench.rise({change.site: change.module for change in own})
        slope = torch.stack([slopes[id(change.module)] for change in own]).sum(dim=0)
        yield Measured(Estimate.of(rise.loss, slope), rise.divergence)
