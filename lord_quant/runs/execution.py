# SPDX-License-Identifier: Apache-2.0
"""From a job to a checkpoint folder, which appears by one rename when everything is in it.

A joint run streams its blocks from the model's files to files of its own and continues an unfinished run (`streaming.py`);
several processes can do that together. Where it cannot be, and in the naive stack, the whole model is loaded.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lord_quant.artifact.fingerprint import TOLERANCE, Fingerprint
from lord_quant.artifact.manifest import all_there, write_manifest
from lord_quant.artifact.model_card import model_card
from lord_quant.artifact.verification import verify_afresh
from lord_quant.backends import gptq as backend
from lord_quant.blocks.residency import Streamed
from lord_quant.blocks.source import load_model, local_files, stream_source
from lord_quant.checkpoint import (
    REPORT_NAME,
    atomic_folder,
    cast_floats,
    check_output,
    quantization_config,
    write_model,
)
from lord_quant.config import FLOAT_BITS, LordConfig
from lord_quant.distributed import ALONE, World
from lord_quant.errors import CheckpointError, ConfigError, ModelError, OutputError, SpoiltError, reason_of
from lord_quant.files.claim import claimed, folder_of, forget_sensed
from lord_quant.files.digests import companions_digest, digest_of_values, model_digest
from lord_quant.files.headers import read_headers, weight_files
from lord_quant.files.reading import parse_json
from lord_quant.outcomes import plan_as_run
from lord_quant.progress import Progress
from lord_quant.report import build_report, package_versions, to_json
from lord_quant.runs.joint import minded_layers
from lord_quant.runs.journal import Journal, Unfinished
from lord_quant.runs.pipeline import (
    Job,
    Phases,
    backward_batches,
    compress_model,
    fisher_windows,
    host_arguments,
    solvers_of,
)
from lord_quant.runs.streaming import Finished, Settings, stream_model, write_weights
from lord_quant.sensitivity import Sensitivity
from lord_quant.version import __version__


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TO_CONTINUE = "put that right, and the same command goes on"
TO_WRITE_ANYWAY = "nothing was put in place, finished blocks are kept: with --no-verify the same command writes it anyway"


class _Streaming(NamedTuple):
    """A job that goes from file to file, and all it is run with."""

    job: Job
    output: Path
    model: PreTrainedModel
    residency: Streamed
    phases: Phases
    progress: Progress
    world: World
    verify: bool


def execute(job: Job, progress: Progress | None = None, world: World = ALONE, *, verify: bool = True) -> dict[str, Any]:
    """Runs a job and writes its checkpoint; returns the report.

    A joint run that writes streams its blocks from file to file, and continues an unfinished one. The output folder appears
    by one rename when everything is in it.

    Args:
        job: The run.
        progress: Where it is told how far the run is; None shows bars on a terminal and writes no log.
        world: The processes that run it together; all of them call this with the same job.
        verify: Whether a fresh process has to load what was written first, see `artifact/verification.py`.

    Raises:
        CheckpointError: What was written is not what was compressed.
        ElsewhereError: Another process failed.
        OutputError: Another run is writing the output, or it cannot be written.
        LordError: Whatever else goes wrong. A streamed run keeps the blocks that are finished.
    """
    phases, progress = Phases(), progress or Progress()
    if job.planned is not None and "seconds" in job.planned:
        phases.seconds["budget"] = job.planned["seconds"]  # measuring and choosing belong to what the run took
    refuse_several(job.config, world)
    with world.together():
        if world.first and job.output is not None:  # something may have appeared there since it was prepared
            check_output(job.output, overwrite=job.overwrite)
    if job.config.stack == "joint" and job.output is not None:
        with phases.measure("load"), progress.phase("load"), world.together():
            streamed = stream_source(job.source, job.device)
            if streamed is None and world.size > 1:
                raise ModelError(
                    f"model {job.source.path!r} names its tensors otherwise than transformers does, so one process has "
                    "to load all of it; wanted a start without torchrun, or the model as save_pretrained writes it"
                )
        if streamed is not None:
            report = _execute_streamed(_Streaming(job, job.output, *streamed, phases, progress, world, verify))
            if world.first:
                forget_sensed(job.output)
            return report
    with contextlib.nullcontext() if job.output is None else claimed(job.output):
        return _execute_whole(job, phases, progress, verify)


def _execute_whole(job: Job, phases: Phases, progress: Progress, verify: bool) -> dict[str, Any]:
    """Runs a job on a model that is loaded whole."""
    made = digest_of_values(made_of(job, 1))  # before the run adds to the model's configuration
    with phases.measure("load"), progress.phase("load"):
        model = load_model(job.source, job.device)
    done = compress_model(model, job.plan, job.windows, job.config, itemsize=job.source.dtype.itemsize, progress=progress)
    cast_floats(model, job.source.dtype)
    seconds = phases.seconds | done.seconds
    report = build_report(job.config, done.plan, job.windows, done.decomposed, done.quantized, seconds, job.warnings)
    report |= {"made_of_sha256": made, **_planned(job)}
    if job.output is None:
        return report
    with progress.phase("write"):
        told: dict[str, Any] = {"fingerprint": done.fingerprint, "verify": verify, "overwrite": job.overwrite}
        report = write_checkpoint(model, job.source.tokenizer, job.output, report, **told)
    forget_sensed(job.output)
    return report


def refuse_several(config: LordConfig, world: World) -> None:
    """Refuses a run that several processes cannot share.

    Raises:
        ConfigError: It is one of the naive stack, writes nothing, has fewer windows than processes or names a GPU.
    """
    if world.size == 1:
        return
    own = "wanted a start without torchrun"
    if config.stack != "joint":
        raise ConfigError(f"stack is {config.stack!r} in {world.size} processes; {own}, or --stack joint")
    if config.output is None:
        raise ConfigError(f"a run in {world.size} processes writes its blocks, and output is not given; {own}, or a folder")
    refuse_unshared(config, world)


def refuse_unshared(config: LordConfig, world: World) -> None:
    """Refuses windows and devices that several processes cannot share.

    Raises:
        ConfigError: There are fewer windows than processes, or a GPU is named.
    """
    if world.size == 1:
        return
    if config.calibration.num_samples < world.size:
        raise ConfigError(
            f"num_samples is {config.calibration.num_samples} in {world.size} processes, each with windows of its own: "
            f"nearest legal value {world.size}"
        )
    if ":" in config.device:
        raise ConfigError(f"device is {config.device!r} in {world.size} processes, each with one of its own; wanted 'auto'")


def _execute_streamed(run: _Streaming) -> dict[str, Any]:
    residency, world = run.residency, run.world
    made = made_of(run.job, world.size)  # before the run adds to the model's configuration
    with world.together():
        journal = _open(run, made)
    residency.scratch = journal.folder
    try:
        with world.together():
            report = _stream(run, journal, digest_of_values(made))
    except BaseException as error:
        journal.close(keep=bool(journal.blocks))
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"{error}; {TO_WRITE_ANYWAY}") from error
        if isinstance(error, SpoiltError):
            raise
        if isinstance(error, ModelError | OutputError):  # a full disk, a file that is gone: nothing that was done was wrong
            kept = f"; {len(journal.blocks)} of {len(residency.blocks.modules)} blocks are finished and kept"
            raise type(error)(f"{error}{kept * bool(journal.blocks)}; {TO_CONTINUE}") from error
        raise
    journal.close()
    return report


def clear_away(job: Job, output: Path, processes: int = 1) -> None:
    """Removes what a finished run left beside its output because it was killed before it could; not what is another's."""
    with contextlib.suppress(OutputError):
        if folder_of(output).is_dir():
            Journal(output, made_of(job, processes), go_on=False).close()
        with claimed(output):
            forget_sensed(output)


def _open(run: _Streaming, made: Mapping[str, Any]) -> Unfinished:
    """Opens the journal in the first process, which tells the others what is finished.

    Raises:
        ConfigError: The processes do not have the same run before them.
        OutputError: Whatever `Journal` has to say.
    """
    world = run.world
    for rank, other in enumerate(world.gather(made)):
        odd = [name for name in made if other[name] != made[name]]
        if odd:
            raise ConfigError(f"processes {world.rank} and {rank} differ in {', '.join(odd)}; wanted the same run in all")
    if world.first:
        journal = Journal(run.output, made, restart=run.job.overwrite)
        world.broadcast(journal.blocks)
        return journal
    return Unfinished(run.output, world.broadcast(None))


def _stream(run: _Streaming, journal: Unfinished, made_of_sha256: str) -> dict[str, Any]:
    """Compresses what is not finished and, in the first process, writes the checkpoint; returns the report in all."""
    job, output, model, residency, phases, progress, world, verify = run
    config, plan = job.config, job.plan
    solve, quantizer, sensitivity = None, None, None
    if plan.bits != FLOAT_BITS:
        solve = functools.partial(solvers_of, gptq=config.gptq, num_tokens=job.windows.num_tokens)
        if world.first:
            quantizer = backend.make_quantizer(**host_arguments(config, plan, model, job.windows))
            quantizer.format = backend.PACKED_FORMAT
    others = {
        "true_sequential": config.gptq.true_sequential,
        "seed": config.calibration.seed,
        "dtype": torch.float64 if config.lowrank.float64 else torch.float32,
    }
    names = minded_layers(model, plan, config.joint)
    left = len(journal.blocks) <= max(layer.block for layer in plan.layers)  # or all that is to be compressed is finished
    if left and len(fisher_windows(job.windows, config)) and any(names):
        with phases.measure("sensitivity"):
            batches, seed = backward_batches(job.windows, config), config.calibration.seed
            asked: dict[str, Any] = {"names": names, "dtype": others["dtype"]}
            sensitivity = Sensitivity.measure(
                model, batches, seed=seed, **asked, residency=residency, progress=progress, world=world
            )
    elif world.first and not journal.blocks:  # the backward pass would have come upon all of them
        residency.look_through()
    batches = world.share(job.windows.batches(config.calibration.batch_size))
    settings = Settings(plan, batches, solve, config.joint, sensitivity, quantizer, job.source.dtype, world, others)
    with phases.measure("stack"):
        done = stream_model(model, residency, journal, settings, progress)
    if done.resumed:
        phases.seconds["resumed"] = done.resumed_seconds  # of the runs that were cut off, what was not for nothing
    tokens = world.gather(sum(batch.numel() for batch in batches))
    report: dict[str, Any] = {}
    if world.first:
        plan = plan_as_run(plan, done.records, job.source.dtype.itemsize)
        model.config.quantization_config = quantization_config(plan, config.gptq, quantizer.format if quantizer else "")
        report = build_report(config, plan, job.windows, done.records, done.quantized, phases.seconds, job.warnings)
        report |= {"blocks_resumed": done.resumed, "made_of_sha256": made_of_sha256, **_planned(job)}
        if world.size > 1:
            report["processes"] = _processes(tokens, done)
        write = functools.partial(write_weights, model, residency.blocks, journal, dtype=job.source.dtype)
        with progress.phase("write"):
            told: dict[str, Any] = {"fingerprint": done.fingerprint, "verify": verify, "overwrite": job.overwrite}
            report = write_checkpoint(model, job.source.tokenizer, output, report, write=write, **told)
    return world.broadcast(report)


def _processes(tokens: Sequence[int], done: Finished) -> list[dict[str, Any]]:
    """Returns what every process did: calibration tokens it ran, layers it compressed and the seconds that took."""
    owners = {record.name: record.process for record in done.records}
    found = [{"tokens": count, "layers": 0, "seconds": 0.0} for count in tokens]
    for record in done.records:
        found[record.process]["layers"] += 1
        found[record.process]["seconds"] += record.seconds
    for part in done.quantized:
        owner = owners.get(part.name, owners.get(part.name.rpartition(".")[0], 0))
        found[owner]["seconds"] += part.seconds
    return [own | {"seconds": round(own["seconds"], 4)} for own in found]


def _planned(job: Job) -> dict[str, Any]:
    return {} if job.planned is None else {"planned": dict(job.planned)}


def is_finished(job: Job, output: Path, processes: int = 1, *, verified: bool = False) -> bool:
    """Tells whether a folder is what a run of this job by so many processes wrote, and if it has to be, verified."""
    try:
        report = parse_json((output / REPORT_NAME).read_text(encoding="utf-8"))
        same = isinstance(report, dict) and report.get("made_of_sha256") == digest_of_values(made_of(job, processes))
        return same and all_there(output) and ("verified" in report or not verified)
    except (CheckpointError, OSError, ValueError):
        return False


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, output: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizer backends raise whatever they like
        raise OutputError(f"output {str(output)!r} cannot be written: {reason_of(error)}") from error


def made_of(job: Job, processes: int) -> dict[str, Any]:
    """Returns what must be the same for a run to continue another."""
    config = {name: value for name, value in job.config.to_dict().items() if name not in ("output", "model")}
    model = model_digest(job.source.config.to_dict(), local_files(job.source.path))
    return {
        **config,
        "model_sha256": model,
        "stored_dtype": str(job.source.dtype).removeprefix("torch."),
        "tokenizer_sha256": companions_digest(job.source.path),
        "calibration_sha256": job.windows.sha256,
        "processes": processes,
        "device": str(job.device),
        "versions": package_versions() | {"lord-quant": __version__},
    }


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output: Path,
    report: dict[str, Any],
    *,
    overwrite: bool = False,
    write: Callable[[Path], None] | None = None,
    fingerprint: Fingerprint | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """Writes a folder that stands alone: weights, tokenizer, report and model card. It appears by one rename.

    Args:
        model: The compressed model, before its first forward pass.
        tokenizer: Its tokenizer, or None.
        output: The folder, checked by `check_output`.
        report: What `build_report` made.
        overwrite: Whether an existing checkpoint there may be replaced.
        write: Writes configuration and weights into a folder; None saves those that `model` holds.
        fingerprint: What the compressed model said before it was packed, or None.
        verify: Whether a fresh process has to load the folder, and the model in it to say the same.

    Returns:
        The report as written, with the bytes on disk and the seconds of writing.

    Raises:
        CheckpointError: What was written is not what was compressed; nothing is left behind.
        OutputError: It cannot be written; nothing is left behind.
    """
    phases = Phases()
    with atomic_folder(output, overwrite=overwrite) as folder:
        with phases.measure("write"):
            (write or functools.partial(write_model, model))(folder)
            if tokenizer is not None:
                _save_tokenizer(tokenizer, folder, output)
        if verify:
            with phases.measure("verify"):
                found = verify_afresh(folder, fingerprint)
            told = {"tensors": found.tensors, "difference": found.difference, "tolerance": TOLERANCE}
            report = report | {"verified": told}
        files = weight_files(folder)
        sizes = {
            "tensor_bytes_on_disk": sum(size for _, _, size in read_headers(files).values()),
            "file_bytes_on_disk": sum(Path(file).stat().st_size for file in files),
        }
        seconds = {key: value for key, value in report["seconds"].items() if key != "total"} | phases.seconds
        seconds["total"] = round(sum(seconds.values()), 3)
        report = report | {"totals": report["totals"] | sizes, "seconds": seconds}
        (folder / REPORT_NAME).write_text(to_json(report), encoding="utf-8")
        (folder / "README.md").write_text(model_card(report), encoding="utf-8")
        write_manifest(folder, fingerprint)
    return report
