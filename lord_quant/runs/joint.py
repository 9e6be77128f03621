# SPDX-License-Identifier: Apache-2.0
"""The joint stack over a whole model: two streams side by side, one transformer block at a time.

The dense stream carries what the dense model computes, the other what the compressed model computes so far. In every
block the dense stream runs once and leaves each layer's input behind. Then the layers are compressed in the order in which
they are called, those fed the same tensor (q, k and v) together: the compressed stream runs as far as their input, the
moments of both inputs are taken in one pass over the batches, and `stack.stack_layer` does the rest. Parts of the block
whose layers are all compressed (a layer, then the attention) run once and are replayed. Only what one block's layers are
fed and one layer's moments exist at a time.

Grouped layers are compressed as the one layer that all their outputs make; with sensitivities G_i its own is their block
diagonal.

Several processes hold the same model and each its own windows: they pool the moments, and layers fed the same tensor are
dealt out among them and sent around once they are done.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lord_quant.blocks.pairing import Inputs, Runner, gather, record_inputs
from lord_quant.blocks.residency import RESIDENT, Residency
from lord_quant.blocks.stream import Replay, block_kinds, capture
from lord_quant.config import FLOAT_BITS, JointConfig
from lord_quant.distributed import ALONE, World
from lord_quant.errors import CalibrationError, NumericsError
from lord_quant.files.kept import Batches
from lord_quant.linalg import is_finite, require_finite
from lord_quant.moments import PairedMoments, pooled
from lord_quant.outcomes import Outcome, StackRecord, outcome_of
from lord_quant.plan import LayerPlan, Plan
from lord_quant.progress import Progress
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.solver import Solvers
from lord_quant.runs.operations import relative_cost
from lord_quant.sensitivity import Sensitivity
from lord_quant.surgery import replace_group, replace_layer, set_dense
from lord_quant.targets import dense_bias, dense_weight, find_blocks
from lord_quant.truncation import unit_metric


@dataclass
class StackedModel:
    """What a run did: a record per layer, and what the first process is to pack, by full module path."""

    records: list[StackRecord] = field(default_factory=list)
    quantized: dict[str, Quantized] = field(default_factory=dict)


class JointRun:
    """A joint run, block by block, in order; layers of `plan` are compressed in place.

    Quantized layers hold their weights in float, ready to be packed.

    Args:
        model: A dense model in evaluation mode; changed in place.
        plan: What becomes of every layer.
        batches: Token windows of this process with shape (batch, seq_len), all without padding.
        solve: Gives a layer's solvers, which quantize a weight in a metric; None leaves factors in float and other layers
            alone.
        options: Which ideas are on.
        sensitivity: How much the loss minds errors in outputs; used up. None counts all outputs alike.
        true_sequential: Whether later layers of a block see what was done to earlier ones, or only later blocks do.
        seed: Of the rotations.
        dtype: dtype of statistics and algebra.
        residency: Which blocks have their weights.
        progress: Where it is told how far the run is.
        world: The processes of the run. All have the same arguments, but for their windows.

    Attributes:
        done: What was done so far.
        stream: The dense stream in front of the next block, per batch.
        ours: The compressed stream's hidden states there.
        last: The last block in which something is planned; -1 if none is.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        batches: Sequence[torch.Tensor],
        solve: Callable[[LayerPlan], Solvers] | None,
        options: JointConfig,
        *,
        sensitivity: Sensitivity | None = None,
        true_sequential: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        residency: Residency = RESIDENT,
        progress: Progress | None = None,
        world: World = ALONE,
    ) -> None:
        self.model, self.plan, self.solve, self.options, self.sensitivity = model, plan, solve, options, sensitivity
        self.true_sequential, self.seed, self.dtype, self.residency = true_sequential, seed, dtype, residency
        self.num_labels = None if sensitivity is None else sensitivity.num_labels
        self.world, self.done, self.progress = world, StackedModel(), progress or Progress()
        changed = (layer for layer in plan.layers if layer.rank is not None or (solve is not None and layer.packed))
        self.planned = {layer.name: layer for layer in changed}
        self.last = max((layer.block for layer in self.planned.values()), default=-1)
        self.blocks = find_blocks(model)
        self.kinds = block_kinds(model, len(self.blocks.modules))
        self.stream = capture(model, self.blocks.modules, self.kinds, batches, residency) if self.planned else []
        self.ours = Batches(residency.keep, (batch.hidden for batch in self.stream))

    @torch.no_grad()
    def step(self, index: int) -> None:
        """Compresses one block, which has its weights; both streams go on to the next one.

        Raises:
            NumericsError: Activations, moments or factors hold NaN or inf; the layer is named.
            CalibrationError: No token reached a layer, the streams differ in tokens, or grouped layers in their input.
        """
        block, kind, prefix = self.blocks.modules[index], self.kinds[index], f"{self.blocks.path}.{index}."
        layers = {name: self.planned[prefix + name] for name, _ in block.named_modules() if prefix + name in self.planned}
        # Other modules, the same weights: a layer's own are changed only after they were used for the last time.
        dense = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
        minded = {}
        if self.sensitivity is not None:
            asked = [name for name, layer in layers.items() if minds(layer, self.options)]
            minded = self.sensitivity.of_block(index, dense, kind, asked, self.dtype)
        keep = self.residency.keep
        run = Runner(self.stream, kind, Replay(block, keep), keep)
        anchor, residual = self.options.anchor, self.options.residual and self.true_sequential
        inputs = record_inputs(dense, run, list(layers), prefix, outputs=anchor, residual=residual, agree=self._agreed)
        run.replay.endings = inputs.endings
        groups = _groups(layers, inputs)
        sources = {name: dense.get_submodule(name) for name in layers}  # each is let go once it was compressed
        del dense
        open_layers = set(layers)
        for stage in inputs.stages(self.true_sequential):
            with run.replay.of(_finished(layers, open_layers)):
                moments = self._moments(block, run, inputs, stage)
            tasks, costs, units, number = [], [], list[list[str]](), len(self.done.records)
            for leader in stage:
                inputs.forget(leader)
                for names in groups[leader]:
                    together = [layers[name] for name in names]
                    own = {name: sources.pop(name) for name in names}
                    tasks.append(functools.partial(self._compress, together, own, moments[leader], minded, number))
                    costs.append(relative_cost(together))
                    units.append([prefix + name for name in names])
                    number += len(names)
                    open_layers.difference_update(names)
            device = next(block.parameters()).device
            outcomes = self.world.share_out(tasks, costs, len(self.done.records), device)
            for names in units:
                with self.progress.layers(*names):
                    self._put(next(outcomes))
        if index < self.last:
            with run.replay.of(_finished(layers, inputs.of_last(self.true_sequential))):
                for batch, leaving in enumerate(run(block, self.ours)):
                    self.ours[batch] = leaving

    def _agreed(self, writers: dict[str, str]) -> dict[str, str]:
        """Returns the layers that write to the residual stream if all processes see the same ones, else none."""
        return writers if all(seen == writers for seen in self.world.gather(writers)) else {}

    def _moments(self, block: nn.Module, run: Runner, inputs: Inputs, stage: Sequence[str]) -> dict[str, PairedMoments]:
        """Returns the moments of a stage's inputs over all processes, in float64 where their squares leave `dtype`.

        Raises:
            NumericsError: They hold NaN or inf even so; the layer is named.
            CalibrationError: The streams differ in tokens.
        """
        found: dict[str, PairedMoments] = {}
        for dtype in dict.fromkeys((self.dtype, torch.float64)):
            own = gather(block, run, self.ours, inputs, stage, dtype, self.options.anchor)
            found = {leader: pooled(own[leader], self.world) for leader in stage}
            if all(is_finite(tensor) for moments in found.values() for tensor in moments[:4]):
                return found
        for leader, moments in found.items():
            _require_finite(moments, inputs.prefix + leader)
        return found

    def _compress(
        self,
        layers: Sequence[LayerPlan],
        dense: Mapping[str, nn.Module],
        moments: PairedMoments,
        minded: dict[str, torch.Tensor],
        number: int,
    ) -> Outcome:
        """Compresses one layer, or several as one.

        Args:
            layers: What becomes of them.
            dense: The dense layers, likewise, by path inside the block.
            moments: Of their input.
            minded: Sensitivities of the block's layers; theirs are used up.
            number: Layers of the model compressed before.
        """
        first, sources = layers[0], list(dense.values())
        weights, bias = [dense_weight(source) for source in sources], _bias_of(sources)
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        metric = _together([minded.pop(name, None) for name in dense], sources)
        try:
            require_finite(weight, "weight")
            if bias is not None:
                require_finite(bias, "bias")
            metric = None if metric is None else unit_metric(metric.to(moments.covariance), self.num_labels)
        except NumericsError as error:
            raise NumericsError(f"layer {first.name!r}: {error}") from error
        arguments = {
            "metric": metric,
            "mean_correction": self.plan.mean_correction,
            "seed": self.seed * len(self.plan.layers) + number,
        }
        solve = None if self.solve is None else self.solve(first)
        done = outcome_of(layers, weight, bias, moments, solve, self.options, self.dtype, **arguments)
        return done._replace(records=[record._replace(process=self.world.rank) for record in done.records])

    def _put(self, outcome: Outcome) -> None:
        """Puts what layers have become into the model and notes what was done."""
        names = [record.name for record in outcome.records]
        if outcome.factors is not None and len(names) > 1:
            replace_group(self.model, names, outcome.factors)
        elif outcome.factors is not None:
            replace_layer(self.model, names[0], outcome.factors)
        elif outcome.weight is not None:
            set_dense(self.model, names[0], outcome.weight, outcome.bias)
        if self.world.first:
            self.done.quantized |= outcome.quantized
        self.done.records += outcome.records


def stack_model(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[torch.Tensor],
    solve: Callable[[LayerPlan], Solvers] | None,
    options: JointConfig,
    **settings: Any,
) -> StackedModel:
    """Runs all of a `JointRun` on a model that is in memory; takes the same arguments.

    Raises:
        NumericsError: Activations, moments or factors hold NaN or inf; the layer is named.
        CalibrationError: No token reached a layer, the streams differ in tokens, or grouped layers in their input.
    """
    run = JointRun(model, plan, batches, solve, options, **settings)
    with run.progress.phase("stack", run.last + 1):
        for index in range(run.last + 1):
            run.step(index)
            run.progress.block(f"{run.blocks.path}.{index}")
    return run.done


def minded_layers(model: nn.Module, plan: Plan, options: JointConfig) -> list[list[str]]:
    """Returns the layers whose sensitivities a run asks for, per block, by path inside it."""
    blocks = find_blocks(model)
    found: list[list[str]] = [[] for _ in blocks.modules]
    for layer in plan.layers:
        if minds(layer, options):
            found[layer.block].append(layer.name.removeprefix(f"{blocks.path}.{layer.block}."))
    return found


def minds(layer: LayerPlan, options: JointConfig) -> bool:
    """Tells whether what a layer becomes depends on how much the loss minds errors in its outputs."""
    return layer.rank is not None or (options.two_sided and layer.bits != FLOAT_BITS)


def _groups(layers: Mapping[str, LayerPlan], inputs: Inputs) -> dict[str, list[list[str]]]:
    """Returns what is compressed as one, in calling order, by the input it is fed.

    Raises:
        CalibrationError: Grouped layers are not fed the same tensor.
    """
    groups: dict[str, list[list[str]]] = {}
    for leader in inputs.batches:
        together: dict[str, list[str]] = {}
        for name in inputs.members(leader):
            together.setdefault(layers[name].leader or name, []).append(name)
        # The one that holds `down` first, as the plan has it; calling order is the model's.
        groups[leader] = [
            sorted(names, key=lambda name: layers[name].name != layers[name].leader) for names in together.values()
        ]
    known = [{layers[name].leader for name in names} for found in groups.values() for names in found]
    split = sorted(own for own in set().union(*known) if own and sum(own in names for names in known) > 1)
    if split:
        raise CalibrationError(
            f"the layers grouped with {', '.join(split)} are not fed the same input; wanted another form"
        )
    return groups


def _together(metrics: Sequence[torch.Tensor | None], sources: Sequence[nn.Module]) -> torch.Tensor | None:
    """Returns the sensitivity of layers on top of each other; None if none has one."""
    known = [metric for metric in metrics if metric is not None]
    if not known:
        return None
    if len(sources) == 1:
        return known[0]
    blocks = [known[0].new_zeros(len(dense_weight(source)), len(dense_weight(source))) for source in sources]
    return torch.block_diag(*(block if metric is None else metric for metric, block in zip(metrics, blocks, strict=True)))


def _finished(layers: Iterable[str], still_open: Container[str]) -> list[str]:
    """Names the parts of a block, layers or what holds them, all of whose planned layers are compressed."""
    waiting = {part for name in layers if name in still_open for part in _holders(name)}
    return sorted({part for name in layers for part in _holders(name)} - waiting)


def _holders(name: str) -> Iterator[str]:
    """Names a layer and the modules that hold it inside its block."""
    return itertools.accumulate(name.split("."), "{}.{}".format)


def _bias_of(dense: Sequence[nn.Module]) -> torch.Tensor | None:
    """Returns the biases of layers on top of each other, zeros for those that have none; None if none has one."""
    biases = [dense_bias(source) for source in dense]
    if all(bias is None for bias in biases):
        return None
    empty = [dense_weight(source).new_zeros(len(dense_weight(source))) for source in dense]
    return torch.cat([zeros if bias is None else bias for bias, zeros in zip(biases, empty, strict=True)])


def _require_finite(moments: PairedMoments, name: str) -> None:
    fine = [is_finite(tensor) for tensor in moments[:4]]
    if moments.of_outputs and fine == [False, True, True, False]:  # overflow, or a weight or bias that is not finite
        raise NumericsError(
            f"layer {name!r}: its outputs in the dense model, or the residual stream they are added to, hold NaN or inf, "
            "its inputs do not"
        )
    if not all(fine):
        raise NumericsError(f"inputs of layer {name!r} hold NaN or inf; wanted finite activations")
