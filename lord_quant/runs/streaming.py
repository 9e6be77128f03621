# SPDX-License-Identifier: Apache-2.0
"""A joint run of a model that need not fit in memory, and that goes on where it was cut off.

Blocks are read, compressed, packed, written and dropped one after another; embeddings, norms and head are there all the
time. After every block a journal says so (`journal.py`): the same command continues, from where both streams stood when
they were last written, and makes the same bytes as a run that was never cut off.

The streams of a large model take longer to write than its blocks. They are written after a block if a twentieth
(`SAVING`) of the time since the last writing is as long as that took. So a run that is cut off does again what it did since
then: about twenty times what a writing takes at most, and the block it was at. Finished blocks behind the streams are
compressed again; merely running them would not do, since what they are stored as is rounded and packed.

Each block is run once more before it is packed, on a few fixed tokens: what comes out in the end is what the files must say
(`artifact/fingerprint.py`).
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lord_quant.artifact.fingerprint import Fingerprint, Passenger
from lord_quant.backends import gptq as backend
from lord_quant.blocks.residency import Streamed
from lord_quant.checkpoint import cast_floats
from lord_quant.distributed import World
from lord_quant.errors import CheckpointError, OutputError, SpoiltError
from lord_quant.outcomes import StackRecord
from lord_quant.runs.joint import JointRun
from lord_quant.runs.journal import Unfinished
from lord_quant.runs.shards import join_shards, outside, write_shard
from lord_quant.targets import Blocks


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel

    from lord_quant.config import JointConfig
    from lord_quant.plan import LayerPlan, Plan
    from lord_quant.progress import Progress
    from lord_quant.rounding.solver import Solvers
    from lord_quant.sensitivity import Sensitivity


SAVING = 0.05
"""Most of a run's time that writing streams may take."""
PASSENGER = "fingerprint-"
"""What the names begin with of where the tokens stood whose logits are compared in the end; a few kB per block."""


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
        resumed: Blocks that an earlier run had finished, and this one did not do again.
        resumed_seconds: How long the earlier run was at them.
        fingerprint: Of the compressed model before packing; only the first process has it.
    """

    records: list[StackRecord]
    quantized: list[backend.GptqRecord]
    resumed: int
    resumed_seconds: float
    fingerprint: Fingerprint | None


def stream_model(
    model: PreTrainedModel, residency: Streamed, journal: Unfinished, settings: Settings, progress: Progress
) -> Finished:
    """Compresses a skeleton's blocks into files of the journal's folder, from the first that is not there.

    Of several processes the first packs and writes the blocks; only it knows what was packed.

    Raises:
        ModelError: A file of the model cannot be read.
        NumericsError: Something holds NaN or inf; the layer is named.
        CalibrationError: No token reached a layer, or streams differ.
        OutputError: A file cannot be written; finished blocks are kept.
    """
    world = settings.world
    run = JointRun(
        model,
        settings.plan,
        settings.batches,
        settings.solve,
        settings.options,
        sensitivity=settings.sensitivity,
        residency=residency,
        progress=progress,
        world=world,
        **settings.others,
    )
    passenger = Passenger(model, residency) if world.first else None
    resumed = _restore(run, journal)
    if passenger is not None and resumed:
        passenger.restore(journal.load(_named(PASSENGER, resumed)))
    quantized = [record for block in journal.blocks for record in _told(block, journal)[1]]
    resumed_seconds = sum(block["seconds"] for block in journal.blocks)
    saved, cost = time.perf_counter(), 0.0
    with progress.phase("stack", len(run.blocks.modules), resumed):
        for index in range(resumed, len(run.blocks.modules)):
            before, start = len(run.done.records), time.perf_counter()
            with residency.of(index, then=index + 1):
                if index <= run.last:
                    run.step(index)
                packed = []
                if passenger is not None:
                    passenger.through(index)
                    journal.save(_named(PASSENGER, index + 1), passenger.state())
                    packed = _pack(run, index, settings)
                    write_shard(run.blocks.modules[index], f"{run.blocks.path}.{index}.", journal.shard(index))
            began = time.perf_counter()
            # Behind the last planned block nobody needs the streams.
            due = world.broadcast(index < run.last and (began - saved) * SAVING >= cost)
            if due:
                _save(run, journal, index + 1)
                saved = time.perf_counter()
                cost = saved - began
            world.wait()  # a block counts when every process can go on behind it,
            journal.finish(
                {
                    "records": [record._asdict() for record in run.done.records[before:]],
                    "quantized": [dataclasses.asdict(record) for record in packed],
                    "seconds": round(time.perf_counter() - start, 3),
                }
            )
            if due:
                world.wait()  # and only then nobody needs to go back to where the streams stood before
                _drop_but(journal, _streams(world), index + 1)
            quantized += packed
            progress.block(f"{run.blocks.path}.{index}")
    fingerprint = None if passenger is None else passenger.arrive()
    return Finished(run.done.records, quantized, resumed, round(resumed_seconds, 3), fingerprint)


def write_weights(model: PreTrainedModel, blocks: Blocks, journal: Unfinished, folder: Path, dtype: torch.dtype) -> None:
    """Writes configuration and weights of a finished run into an existing folder.

    Parameters outside the blocks end in the stored dtype: it is theirs that the configuration will name.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not name.startswith(f"{blocks.path}."):
            parameter.data = parameter.data.to(dtype)
    cast = {name: tensor.to(dtype) for name, tensor in outside(model, blocks.path).items() if tensor.is_floating_point()}
    model.save_pretrained(folder, state_dict=outside(model, blocks.path) | cast)
    try:
        join_shards(folder, [journal.shard(index) for index in range(len(blocks.modules))])
    except CheckpointError as error:  # not of what is written, but of what it is made from
        raise OutputError(f"a finished block cannot be read: {error}") from error


def _streams(world: World) -> str:
    """Returns what the names begin with of where this process's streams stood."""
    return f"streams-{world.rank}-"


def _named(prefix: str, block: int) -> str:
    """Names where something stood in front of a block."""
    return f"{prefix}{block:05}"


def _drop_but(journal: Unfinished, prefix: str, block: int) -> None:
    """Removes where something stood in front of all blocks but one."""
    for name in journal.saved(prefix):
        if name.partition(".")[0] != _named(prefix, block):
            journal.drop(name)


def _parts(run: JointRun, block: int) -> list[str]:
    """Names the files of where both streams stood in front of a block, one per batch: the last is written last."""
    whole = _named(_streams(run.world), block)
    return [*(f"{whole}.{at:05}" for at in range(len(run.stream) - 1)), whole]


def _save(run: JointRun, journal: Unfinished, block: int) -> None:
    """Writes where both streams stand, in front of a block; a batch at a time, as all together may not fit in memory."""
    for at, name in enumerate(_parts(run, block)):
        journal.save(name, {"dense": run.stream[at].hidden, "ours": run.ours[at]})


def _load(run: JointRun, journal: Unfinished, block: int) -> None:
    """Puts both streams in front of a block, as they were saved there."""
    for at, name in enumerate(_parts(run, block)):
        state, call = journal.load(name), run.stream[at]
        call.hidden, run.ours[at] = state["dense"].to(call.hidden), state["ours"].to(call.hidden)


def _can_go_on(run: JointRun, journal: Unfinished, block: int) -> bool:
    """Tells whether all is there, and whole, that this process needs to go on in front of a block."""
    whole = not run.world.first or {"hidden", "way"} <= journal.shapes(_named(PASSENGER, block)).keys()
    if not whole or block > run.last:  # where nobody needs the streams
        return whole
    shapes = [dict.fromkeys(("dense", "ours"), tuple(call.hidden.shape)) for call in run.stream]
    return all(journal.shapes(name) == wanted for name, wanted in zip(_parts(run, block), shapes, strict=True))


def _restore(run: JointRun, journal: Unfinished) -> int:
    """Puts a run behind finished blocks, as many as all its processes can go on from.

    Returns:
        How many; the others do not count any more. The sensitivity pass has no state but what it computes again.
    """
    possible = {block for block in range(1, len(journal.blocks) + 1) if _can_go_on(run, journal, block)}
    resumed = max({0}.union(set.intersection(*run.world.gather(possible))))
    if resumed < len(journal.blocks):
        journal.go_back(resumed)
    _drop_but(journal, _streams(run.world), resumed)
    if 0 < resumed <= run.last:
        _load(run, journal, resumed)
    for index, block in enumerate(journal.blocks):
        run.done.records += _told(block, journal)[0]
        if run.sensitivity is not None and index <= run.last:
            with run.residency.of(index, then=index + 1):
                run.sensitivity.of_block(index, run.blocks.modules[index], run.kinds[index], [], run.dtype)
    return resumed


def _told(block: Mapping[str, Any], journal: Unfinished) -> tuple[list[StackRecord], list[backend.GptqRecord]]:
    """Returns what the journal says of a block's layers.

    Raises:
        SpoiltError: It says something else.
    """
    try:
        records = [StackRecord(**values | {"remedies": tuple(values["remedies"])}) for values in block["records"]]
        float(block["seconds"])
        return records, [backend.GptqRecord(**values) for values in block["quantized"]]
    except (LookupError, TypeError, ValueError) as error:
        raise _spoilt(journal, "the journal") from error


def _spoilt(journal: Unfinished, what: str) -> SpoiltError:
    return SpoiltError(
        f"{what} of the unfinished run in {str(journal.folder)!r} is spoilt; to start again, remove that folder"
    )


def _pack(run: JointRun, index: int, settings: Settings) -> list[backend.GptqRecord]:
    """Packs a block's layers and casts its floats to what is stored."""
    block, prefix = run.blocks.modules[index], f"{run.blocks.path}.{index}."
    packed: list[backend.GptqRecord] = []
    if settings.quantizer is not None:
        own = {name.removeprefix(prefix): item for name, item in run.done.quantized.items() if name.startswith(prefix)}
        packings = {name.removeprefix(prefix): packing for name, packing in settings.plan.packings.items()}
        found = backend.pack_model(block, settings.quantizer, own, packings, ready=False)
        packed = [dataclasses.replace(record, name=prefix + record.name) for record in found]
        run.done.quantized.clear()
    cast_floats(block, settings.dtype, prefix)
    return packed
