# SPDX-License-Identifier: Apache-2.0
"""Pairs what the layers of one block see in the dense and in the compressed stream, and takes the moments of both."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from lord_quant.blocks.residual import watched
from lord_quant.blocks.stream import BlockCall, Ending, Replay, StopForward, first_of, returning
from lord_quant.errors import CalibrationError
from lord_quant.files.kept import Batches, Keep, Kept
from lord_quant.moments import PairedAccumulator, PairedMoments
from lord_quant.remedies import UNREACHED
from lord_quant.targets import dense_bias, dense_weight


class Runner(NamedTuple):
    """Runs one block on every batch of a stream; parts of it may be replayed, and what batches leave behind is kept."""

    stream: Sequence[BlockCall]
    kind: str
    replay: Replay
    keep: Keep = Kept

    def __call__(self, block: nn.Module, hidden: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for position, (batch, states) in enumerate(zip(self.stream, hidden, strict=True)):
            self.replay.at(position)
            try:
                yield batch.run(block, self.kind, states)
            except StopForward:
                continue


class Inputs:
    """What the dense stream leaves behind in a block: its layers' distinct inputs, in the order in which layers are called.

    Where an input feeds one layer alone and is wider than that layer's output (the second of an MLP), the output is kept
    instead, without its bias. Of a layer that makes up for what the residual stream lacks it is the stream behind it, again
    without that bias.

    Args:
        prefix: Path of the block and a dot; completes layer names in errors.
        keep: Keeps what is left of one batch while others are at work.
    """

    def __init__(self, prefix: str, keep: Keep = Kept) -> None:
        self.prefix, self.keep = prefix, keep
        self.leader: dict[str, str] = {}
        self.batches: dict[str, Batches] = {}
        self.num_values: Counter[str] = Counter()
        self.as_outputs: set[str] = set()
        self.writers: dict[str, str] = {}
        self.makes_up: set[str] = set()
        self.endings: dict[str, Ending] = {}

    def members(self, leader: str) -> list[str]:
        """Returns the layers fed the same tensor as `leader`."""
        return [name for name, first in self.leader.items() if first == leader]

    def add(self, leader: str, left: torch.Tensor) -> None:
        """Adds what the dense stream leaves behind of one more batch."""
        self.batches[leader].append(left)
        self.num_values[leader] += left.numel()

    def stages(self, true_sequential: bool) -> list[list[str]]:
        """Returns which inputs are handled at once."""
        leaders = list(self.batches)
        return [[leader] for leader in leaders] if true_sequential or not leaders else [leaders]

    def of_last(self, true_sequential: bool) -> list[str]:
        """Returns the layers of the last stage, which ran to their end in no stage."""
        return [name for stage in self.stages(true_sequential)[-1:] for leader in stage for name in self.members(leader)]

    def forget(self, leader: str) -> None:
        """Frees what is not needed any more."""
        self.batches[leader] = Batches(self.keep)


def record_inputs(
    dense: nn.Module,
    run: Runner,
    layers: Sequence[str],
    prefix: str,
    *,
    outputs: bool,
    residual: bool,
    agree: Callable[[dict[str, str]], dict[str, str]] = dict,
) -> Inputs:
    """Runs the dense block once, keeps what its layers are fed, and moves the dense stream on.

    Args:
        dense: The dense block.
        run: Runs it on the dense stream.
        layers: Layers to be compressed, by path inside the block.
        prefix: Path of the block and a dot.
        outputs: Whether outputs may be kept instead of inputs.
        residual: Whether layers that write to the residual stream make up for what it lacks (`residual.py`).
        agree: Returns which layers all processes take to do so, given those of this one; called once.

    Raises:
        CalibrationError: No token reached a layer, or one was not called once per batch with the same input.
    """
    inputs = Inputs(prefix, run.keep)
    entering: dict[str, torch.Tensor] = {}  # inputs of leaders in one forward pass, held so that identity means sameness
    leaving: dict[str, torch.Tensor] = {}
    calls: Counter[str] = Counter()
    parted: set[str] = set()
    endings: dict[str, Ending | None] = {}
    start = run.stream[0].hidden if run.stream else None

    def observe(name: str, x: torch.Tensor) -> None:
        leader = inputs.leader.setdefault(name, next((other for other, seen in entering.items() if seen is x), name))
        calls[name] += 1
        if leader == name:
            entering[name] = x
            inputs.batches.setdefault(name, Batches(run.keep))
        elif entering.get(leader) is not x:
            parted.add(name)

    narrowing = [name for name in layers if outputs and operator.lt(*dense_weight(dense.get_submodule(name)).shape)]
    with _watch(dense, layers, observe), _products(dense, narrowing, leaving), _endings(dense, layers, endings):
        for count, batch in enumerate(run.stream, start=1):
            looking = count == 1 and outputs and residual
            with watched(dense, None if looking else inputs.writers) as passed:
                batch.hidden = batch.run(dense, run.kind)
            if looking:
                inputs.writers = agree(passed.writers(batch.hidden))
            inputs.makes_up = {name for name in inputs.writers if inputs.members(name) == [name]}
            inputs.as_outputs = inputs.makes_up | {name for name in narrowing if inputs.members(name) == [name]}
            for name, x in entering.items():
                if name in inputs.makes_up:
                    bias = dense_bias(dense.get_submodule(name))
                    inputs.add(name, passed.behind(name) - (0.0 if bias is None else bias))
                else:
                    inputs.add(name, leaving[name] if name in inputs.as_outputs else x)
            parted |= {name for name in inputs.leader if calls[name] != count}
            entering.clear()
            leaving.clear()
    unseen = [prefix + name for name in layers if not inputs.num_values[inputs.leader.get(name, name)]]
    if unseen:
        raise CalibrationError(f"no calibration token reached {', '.join(unseen)}; {UNREACHED}")
    odd = [prefix + name for name in inputs.leader if name in parted]
    if odd:
        raise CalibrationError(
            f"{', '.join(odd)}: not called once per forward pass with the same input, so the two streams cannot be paired; "
            "use --stack naive"
        )
    for part, ending in endings.items():
        if ending and ending.layer in inputs.batches and (ending.whole or _suffices(dense, part, ending, run, start)):
            inputs.endings[part] = ending
    return inputs


def gather(
    block: nn.Module,
    run: Runner,
    ours: Sequence[torch.Tensor],
    inputs: Inputs,
    stage: Sequence[str],
    dtype: torch.dtype,
    paired: bool,
) -> dict[str, PairedMoments]:
    """Runs the compressed stream as far as the inputs of a stage and takes the moments of both streams there.

    Args:
        block: The block, compressed up to this stage.
        run: Runs it.
        ours: The compressed stream's hidden states in front of the block, per batch.
        inputs: What the dense stream left behind.
        stage: Leaders of the stage, in calling order.
        dtype: dtype of the moments.
        paired: Whether the dense stream counts; else the compressed one stands on both sides.

    Raises:
        CalibrationError: The streams differ in tokens.
    """
    accumulators: dict[str, PairedAccumulator] = {}
    counts = dict.fromkeys(stage, 0)

    def observe(name: str, x: torch.Tensor) -> None:
        batches = inputs.batches[name]
        dense = batches[counts[name]] if counts[name] < len(batches) else x[:0]
        if dense.shape[:-1] != x.shape[:-1]:
            raise CalibrationError(
                f"layer {inputs.prefix + name!r} saw {tuple(dense.shape[:-1])} tokens in the dense model, "
                f"{tuple(x.shape[:-1])} in the compressed one, so the two cannot be paired; use --stack naive"
            )
        if name not in accumulators:
            accumulators[name] = PairedAccumulator(x.shape[-1], dtype, x.device, dense.shape[-1])
        aim = dense - passed.in_front(name) if name in inputs.makes_up else dense
        accumulators[name].update(aim if paired else x, x)
        counts[name] += 1
        run.replay.leave(name, x)
        if name == stage[-1]:
            raise StopForward

    with _watch(block, stage, observe), watched(block, inputs.writers) as passed:
        for _ in run(block, ours):
            pass
    return {
        name: accumulator.result()._replace(of_outputs=name in inputs.as_outputs)
        for name, accumulator in accumulators.items()
    }


@contextmanager
def _products(block: nn.Module, layers: Sequence[str], kept: dict[str, torch.Tensor]) -> Iterator[None]:
    """Keeps W x of the layers' latest calls: their outputs without bias."""

    def hook(name: str, bias: torch.Tensor | None) -> Any:
        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            kept[name] = output.clone() if bias is None else output - bias  # a copy: the block may add into it

        return keep

    with ExitStack() as hooks:
        for name in layers:
            layer = block.get_submodule(name)
            hooks.callback(layer.register_forward_hook(hook(name, dense_bias(layer))).remove)
        yield


def _suffices(block: nn.Module, part: str, ending: Ending, run: Runner, start: torch.Tensor | None) -> bool:
    """Tells whether a block that was just run comes to the same without the tensors that `ending` leaves out.

    Attention that returns its probabilities too is common, and blocks that do not look at them.
    """

    def bare(module: nn.Module, args: Any, output: Any) -> Any:
        return ending.around(first_of(output))

    handle = block.get_submodule(part).register_forward_hook(bare)
    try:
        return torch.equal(run.stream[0].run(block, run.kind, start), run.stream[0].hidden)
    except (AttributeError, TypeError):  # it does look at them
        return False
    finally:
        handle.remove()


def _endings(block: nn.Module, layers: Sequence[str], found: dict[str, Ending | None]) -> AbstractContextManager[None]:
    """Notes which parts of the block return what one of their layers does, as it is; None of those that do not always."""

    def told(part: str, output: Any, ends: list[str]) -> None:
        own = [layer for layer in ends if layer.startswith(part + ".")] if type(output) in (tuple, torch.Tensor) else []
        ending = Ending.of(own[-1], output) if own else None
        found[part] = ending if found.get(part, ending) == ending else None

    return returning(block, layers, told)


@contextmanager
def _watch(block: nn.Module, layers: Sequence[str], observe: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Calls `observe` with every input of the layers, and removes exactly those hooks again, whatever happens."""

    def hook(name: str) -> Any:
        return lambda module, args: observe(name, args[0])

    with ExitStack() as hooks:
        for name in layers:
            hooks.callback(block.get_submodule(name).register_forward_pre_hook(hook(name)).remove)
        yield
