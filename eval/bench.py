# SPDX-License-Identifier: Apache-2.0
"""A dense model of which one layer at a time, or a few, are compressed, everything else staying as it is.

What compressing a layer needs (moments of its inputs, sensitivities of its outputs) is collected once, from the dense
model. What blocks in front of the first compressed one return is remembered, so that only the rest of the model runs
again, and so are the dense model's predictions: windows × tokens × vocabulary values, for models and samples that are
small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import nll_loss

from lord_quant.blocks.stream import Replay, block_kinds, capture
from lord_quant.config import FLOAT_BITS, GptqConfig, JointConfig
from lord_quant.engine import gather
from lord_quant.losses.crossfit import Half
from lord_quant.losses.probe import LayerLoss, probe
from lord_quant.moments import Moments, PairedMoments
from lord_quant.rounding.solver import Gptq
from lord_quant.sensitivity import Expansion, Steepness
from lord_quant.stack import stack_layer
from lord_quant.targets import LinearSite, dense_bias, dense_weight, find_blocks, find_linears
from lord_quant.truncation import unit_metric


ALL_IDEAS = JointConfig()


class Layer(NamedTuple):
    """One linear layer of the dense model.

    Attributes:
        site: Where it is.
        module: The layer.
        moments: Of its inputs.
        sensitivity: G with shape (out_features, out_features), in nats² per unit of output².
        slope: Of the text's loss.
        num_labels: Tokens of the backward pass.
    """

    site: LinearSite
    module: nn.Module
    moments: Moments
    sensitivity: torch.Tensor
    slope: Steepness
    num_labels: int

    @property
    def kind(self) -> str:
        """Its path inside the block."""
        return self.site.name.partition(f".{self.site.block}.")[2]

    def half(self, fisher: bool = True) -> Half:
        """Returns what it says of the layer if it is of half the text."""
        return Half(self.moments, self.sensitivity, self.slope, self.num_labels) if fisher else Half(self.moments, None)

    @torch.no_grad()
    def predict(self, seed: int, *, fisher: bool = True, halves: tuple[Half, Half] | None = None) -> LayerLoss:
        """Returns what it would lose, in nats per token, or in squared output error without the Fisher metric.

        With the same of either half of the text, truncation also as it is on the half it was not chosen on.
        """
        return probe(
            dense_weight(self.module),
            halves or (self.half(fisher), self.half(fisher)),
            has_bias=self.site.has_bias,
            gptq=GptqConfig(),
            options=JointConfig(),
            seed=seed,
        )

    @torch.no_grad()
    def compress(
        self, form: str, rank: int | None, bits: int, group_size: int, seed: int, options: JointConfig = ALL_IDEAS
    ) -> nn.Linear:
        """Returns the layer compressed alone, in float: what the joint stack makes of it where both streams are dense.

        Args:
            form: `two_factor`, `pivoted` or `column_pivoted`; of no meaning without a rank.
            rank: Rank of the factors, or None for a layer that stays dense.
            bits: Of its weights; 16 leaves factors in float.
            group_size: Inputs per scale.
            seed: Of the rotation.
            options: Which ideas of the joint stack are on.
        """
        mean, covariance, count = self.moments
        solve = None if bits == FLOAT_BITS else Gptq(GptqConfig(bits=bits), group_size, count)
        stacked = stack_layer(
            dense_weight(self.module),
            dense_bias(self.module),
            PairedMoments(mean, mean, covariance, covariance, count),
            rank,
            form,
            solve,
            options,
            metric=unit_metric(self.sensitivity, self.num_labels),
            seed=seed,
        )
        weight = stacked.weight if stacked.factors is None else stacked.factors.product()
        assert weight is not None  # without factors there is a weight
        made = nn.Linear(self.site.in_features, self.site.out_features, bias=stacked.bias is not None)
        made.weight.copy_(weight)
        if stacked.bias is not None:
            made.bias.copy_(stacked.bias)
        return made


@torch.no_grad()
def collect(model: nn.Module, batches: Sequence[torch.Tensor], backward: Sequence[torch.Tensor], seed: int) -> list[Layer]:
    """Collects all linear layers of the blocks, in registration order.

    Args:
        model: A loaded dense model in evaluation mode.
        batches: Calibration windows with shape (batch, seq_len).
        backward: Those of the backward pass.
        seed: Of its labels.
    """
    blocks, sites = find_blocks(model), find_linears(model)
    kinds = block_kinds(model, len(blocks.modules))
    expansion = Expansion.measure(model, backward, seed=seed)
    stream = capture(model, blocks.modules, kinds, batches)
    layers = []
    for index, block in enumerate(blocks.modules):
        prefix = f"{blocks.path}.{index}."
        own = {site.name.removeprefix(prefix): site for site in sites if site.block == index}
        minded = expansion.of_block(index, block, kinds[index], list(own))
        with gather({name: block.get_submodule(name) for name in own}, torch.float32) as gathered:
            for batch in stream:
                batch.hidden = batch.run(block, kinds[index])
        moments = gathered.results(prefix)
        layers += [
            Layer(site, block.get_submodule(name), moments[name], *minded[name], expansion.num_labels)
            for name, site in own.items()
        ]
    return layers


class Rise(NamedTuple):
    """What a change of the model costs, in nats per token, float64, with shape (windows,).

    Attributes:
        loss: Cross entropy of the text over the dense model's.
        divergence: Kullback-Leibler divergence from the dense model's predictions.
    """

    loss: torch.Tensor
    divergence: torch.Tensor


class Bench:
    """Measures a model with some layers replaced.

    Args:
        model: The dense model in evaluation mode.
        windows: Token windows with shape (windows, seq_len).
    """

    def __init__(self, model: nn.Module, windows: torch.Tensor) -> None:
        self.model, self.windows, self.path = model, windows, find_blocks(model).path
        self.replay = Replay(model)
        self.dense = list(self._predictions(0))

    @torch.no_grad()
    def rise(self, replaced: Mapping[LinearSite, nn.Module]) -> Rise:
        """Returns what it costs to replace layers by others; the model is left as it was."""
        losses, divergences = [], []
        with _swapped(self.model, {site.name: module for site, module in replaced.items()}):
            found = self._predictions(min(site.block for site in replaced))
            for window, before, after in zip(self.windows, self.dense, found, strict=True):
                risen = nll_loss(after, window[1:], reduction="none") - nll_loss(before, window[1:], reduction="none")
                losses.append(risen.double().mean())
                divergences.append((before.exp() * (before - after)).sum(dim=-1).double().mean())
        return Rise(torch.stack(losses), torch.stack(divergences))

    @torch.no_grad()
    def _predictions(self, first: int) -> Iterator[torch.Tensor]:
        """Yields log-probabilities per window; blocks in front of the one at `first` are the dense model's."""
        for position, window in enumerate(self.windows):
            with self.replay.of([f"{self.path}.{index}" for index in range(first)]):
                self.replay.at(position)
                logits = self.model(input_ids=window[None], use_cache=False).logits[0, :-1]
            yield logits.float().log_softmax(dim=-1)


@contextmanager
def _swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts modules into the model while the body runs."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
