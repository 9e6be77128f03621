# SPDX-License-Identifier: Apache-2.0
"""A joint run of a model that need not fit in memory, and that goes on where it was cut off.

Blocks are read, compressed, packed, written and dropped one after another; embeddings, norms and head are there all the
time. After every block a journal says so (`journal.py`): the same command continues behind the last one, from where both
streams stood then, and makes the same bytes as a run that was never cut off.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from lord_quant.backends import gptq as backend
from lord_quant.checkpoint import cast_floats
from lord_quant.distributed import World
from lord_quant.joint import JointRun, StackRecord
from lord_quant.journal import Unfinished
from lord_quant.residency import Streamed
from lord_quant.shards import join_shards, outside, write_shard
from lord_quant.targets import Blocks


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from lord_quant.config import JointConfig
    from lord_quant.plan import LayerPlan, Plan
    from lord_quant.sensitivity import Sensitivity
    from lord_quant.solver import Solvers


class Settings(NamedTuple):
    """What a streamed run is told beside its model.

    Attributes:
        plan: What becomes of every layer.
        batches: Token windows of this process with shape (batch, seq_len).
        solve: Gives a layer's solvers, or None.
        options: Which ideas of the joint stack are on.
        sensitivity: How much the loss minds errors in outputs; used up.
        quantizer: The host's quantizer, or None where factors stay in float; only the first process needs it.
        dtype: dtype in which floats are stored.
        world: The processes of the run.
        others: Further arguments of `JointRun`.
    """

    plan: Plan
    batches: Sequence[torch.Tensor]
    solve: Callable[[LayerPlan], Solvers] | None
    options: JointConfig
    sensitivity: Sensitivity | None
    quantizer: Any
    dtype: torch.dtype
    world: World
    others: dict[str, Any]


class Finished(NamedTuple):
    """What a streamed run did.

    Attributes:
        records: One per layer.
        quantized: One per packed linear layer.
        resumed: Blocks that an earlier run had finished.
    """

    records: list[StackRecord]
    quantized: list[backend.GptqRecord]
    resumed: int


def stream_model(model: PreTrainedModel, residency: Streamed, journal: Unfinished, settings: Settings) -> Finished:
    """Compresses a skeleton's blocks into files of the journal's folder, from the first that is not there.

    Of several processes the first packs and writes the blocks; only it knows what was packed.

    Raises:
        NumericsError: Something holds NaN or inf; the layer is named.
        CalibrationError: No token reached a layer, or streams differ.
        OutputError: A file cannot be written; finished blocks are kept.
    """
    run = JointRun(
        model,
        settings.plan,
        settings.batches,
        settings.solve,
        settings.options,
        sensitivity=settings.sensitivity,
        residency=residency,
        world=settings.world,
        **settings.others,
    )
    resumed, world = len(journal.blocks), settings.world
    quantized = [backend.GptqRecord(**values) for block in journal.blocks for values in block["quantized"]]
    _restore(run, journal, _streams(resumed, world))
    bar = tqdm(initial=resumed, total=len(run.blocks.modules), desc="stack", unit="block", disable=world.quiet)
    for index in range(resumed, len(run.blocks.modules)):
        before = len(run.done.records)
        with residency.of(index):
            if index <= run.last:
                run.step(index)
            packed = _pack(run, index, settings) if world.first else []
            if world.first:
                write_shard(run.blocks.modules[index], f"{run.blocks.path}.{index}.", journal.shard(index))
        journal.save(_streams(index + 1, world), _state(run))
        world.wait()  # a block counts when every process can go on behind it,
        journal.finish(
            {
                "records": [record._asdict() for record in run.done.records[before:]],
                "quantized": [dataclasses.asdict(record) for record in packed],
            }
        )
        world.wait()  # and only then nobody needs to go back to where the streams stood before
        journal.drop(_streams(index, world))
        quantized += packed
        bar.update()
    bar.close()
    return Finished(run.done.records, quantized, resumed)


def write_weights(model: PreTrainedModel, blocks: Blocks, journal: Unfinished, folder: Path, dtype: torch.dtype) -> None:
    """Writes configuration and weights of a finished run into an existing folder."""
    cast = {name: tensor.to(dtype) for name, tensor in outside(model, blocks.path).items() if tensor.is_floating_point()}
    model.save_pretrained(folder, state_dict=outside(model, blocks.path) | cast)
    join_shards(folder, [journal.shard(index) for index in range(len(blocks.modules))])


def _streams(block: int, world: World) -> str:
    return f"streams-{block:05}" + (f"-{world.rank}" if world.size > 1 else "")


def _state(run: JointRun) -> dict[str, torch.Tensor]:
    """Returns where both streams stand, in front of the next block."""
    dense = {f"dense.{at}": call.hidden for at, call in enumerate(run.stream)}
    return dense | {f"ours.{at}": hidden for at, hidden in enumerate(run.ours)}


def _restore(run: JointRun, journal: Unfinished, streams: str) -> None:
    """Puts a run behind the blocks that are finished. The sensitivity pass has no state but what it computes again."""
    if not journal.blocks:
        return
    state = journal.load(streams)
    for at, call in enumerate(run.stream):
        call.hidden = state[f"dense.{at}"].to(call.hidden)
        run.ours[at] = state[f"ours.{at}"].to(call.hidden)
    for index, block in enumerate(journal.blocks):
        run.done.records += [StackRecord(**values | {"remedies": tuple(values["remedies"])}) for values in block["records"]]
        if run.sensitivity is not None and index <= run.last:
            with run.residency.of(index):
                run.sensitivity.of_block(index, run.blocks.modules[index], run.kinds[index], [], run.dtype)


def _pack(run: JointRun, index: int, settings: Settings) -> list[backend.GptqRecord]:
    """Packs a block's layers and casts its floats to what is stored."""
    block, prefix = run.blocks.modules[index], f"{run.blocks.path}.{index}."
    packed: list[backend.GptqRecord] = []
    if settings.quantizer is not None:
        own = {name.removeprefix(prefix): item for name, item in run.done.quantized.items() if name.startswith(prefix)}
        packings = {name.removeprefix(prefix): packing for name, packing in settings.plan.packings.items()}
        found = backend.pack_model(block, settings.quantizer, own, packings)
        packed = [dataclasses.replace(record, name=prefix + record.name) for record in found]
        run.done.quantized.clear()
    cast_floats(block, settings.dtype)
    return packed
