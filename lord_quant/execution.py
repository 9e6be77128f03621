# SPDX-License-Identifier: Apache-2.0
"""From a job to a checkpoint folder, which appears by one rename when everything is in it.

A joint run streams its blocks from the model's files to files of its own and continues an unfinished run (`streaming.py`).
Where that cannot be, and in the naive stack, the whole model is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lord_quant.backends import gptq as backend
from lord_quant.checkpoint import (
    REPORT_NAME,
    atomic_folder,
    cast_floats,
    quantization_config,
    read_headers,
    weight_files,
    write_model,
)
from lord_quant.config import FLOAT_BITS
from lord_quant.errors import ModelError, OutputError, reason_of
from lord_quant.journal import Journal, folder_of
from lord_quant.pipeline import (
    Job,
    Phases,
    backward_batches,
    compress_model,
    fisher_windows,
    host_arguments,
    solvers_of,
)
from lord_quant.progress import Progress
from lord_quant.report import build_report, model_card, package_versions, to_json
from lord_quant.residency import Streamed
from lord_quant.sensitivity import Sensitivity
from lord_quant.source import load_model, local_files, stream_source
from lord_quant.statistics import model_digest
from lord_quant.streaming import Settings, stream_model, write_weights


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TO_CONTINUE = "put that right, and the same command goes on"


def execute(job: Job, progress: Progress | None = None) -> dict[str, Any]:
    """Runs a job and writes its checkpoint; returns the report.

    A joint run that writes streams its blocks from file to file, and continues an unfinished one. The output folder appears
    by one rename when everything is in it.

    Args:
        job: The run.
        progress: Where it is told how far the run is; None shows bars on a terminal and writes no log.

    Raises:
        LordError: Whatever goes wrong. A streamed run keeps the blocks that are finished.
    """
    phases, progress = Phases(), progress or Progress()
    if job.config.stack == "joint" and job.output is not None:
        with phases.measure("load"), progress.phase("load"):
            streamed = stream_source(job.source, job.device)
        if streamed is not None:
            return _execute_streamed(job, *streamed, phases, progress)
    with phases.measure("load"), progress.phase("load"):
        model = load_model(job.source, job.device)
    done = compress_model(model, job.plan, job.windows, job.config, progress=progress)
    cast_floats(model, job.source.dtype)
    seconds = phases.seconds | done.seconds
    report = build_report(job.config, job.plan, job.windows, done.decomposed, done.quantized, seconds, job.warnings)
    if job.output is None:
        return report
    with progress.phase("write"):
        return write_checkpoint(model, job.source.tokenizer, job.output, report, overwrite=job.overwrite)


def _execute_streamed(
    job: Job, model: PreTrainedModel, residency: Streamed, phases: Phases, progress: Progress
) -> dict[str, Any]:
    config, plan, output = job.config, job.plan, job.output
    assert output is not None  # `execute` looked
    solve, quantizer, sensitivity = None, None, None
    if plan.bits != FLOAT_BITS:
        solve = functools.partial(solvers_of, gptq=config.gptq, num_tokens=job.windows.num_tokens)
        quantizer = backend.make_quantizer(**host_arguments(config, plan, model, job.windows))
        quantizer.format = backend.PACKED_FORMAT
    others = {
        "true_sequential": config.gptq.true_sequential,
        "seed": config.calibration.seed,
        "dtype": torch.float64 if config.lowrank.float64 else torch.float32,
    }
    made = made_of(job)  # before the run adds to the model's configuration
    journal = Journal(output, made, restart=job.overwrite)
    residency.scratch = journal.folder
    try:
        if len(fisher_windows(job.windows, config)) and plan.rank_pattern:
            with phases.measure("sensitivity"):
                batches, seed = backward_batches(job.windows, config), config.calibration.seed
                sensitivity = Sensitivity.measure(model, batches, seed=seed, residency=residency, progress=progress)
        batches = job.windows.batches(config.calibration.batch_size)
        settings = Settings(plan, batches, solve, config.joint, sensitivity, quantizer, job.source.dtype, others)
        with phases.measure("stack"):
            done = stream_model(model, residency, journal, settings, progress)
        model.config.quantization_config = quantization_config(plan, config.gptq, quantizer.format if quantizer else "")
        report = build_report(config, plan, job.windows, done.records, done.quantized, phases.seconds, job.warnings)
        report |= {"blocks_resumed": done.resumed, "made_of_sha256": digest(made)}
        write = functools.partial(write_weights, model, residency.blocks, journal, dtype=job.source.dtype)
        with progress.phase("write"):
            report = write_checkpoint(model, job.source.tokenizer, output, report, overwrite=job.overwrite, write=write)
    except BaseException as error:
        journal.close(keep=bool(journal.blocks))
        if isinstance(error, ModelError | OutputError):  # a full disk, a file that is gone: nothing that was done was wrong
            kept = f"; {len(journal.blocks)} of {len(residency.blocks.modules)} blocks are finished and kept"
            raise type(error)(f"{error}{kept * bool(journal.blocks)}; {TO_CONTINUE}") from error
        raise
    journal.close()
    return report


def clear_away(job: Job, output: Path) -> None:
    """Removes what a finished run left beside its output because it was killed before it could; not what is another's."""
    if folder_of(output).is_dir():
        with contextlib.suppress(OutputError):
            Journal(output, made_of(job)).close()


def is_finished(job: Job, output: Path) -> bool:
    """Tells whether a folder is what a streamed run of this job wrote."""
    try:
        report = json.loads((output / REPORT_NAME).read_text(encoding="utf-8"))
        return isinstance(report, dict) and report.get("made_of_sha256") == digest(made_of(job))
    except (OSError, ValueError):
        return False


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, output: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizer backends raise whatever they like
        raise OutputError(f"output {str(output)!r} cannot be written: {reason_of(error)}") from error


def digest(values: Mapping[str, Any]) -> str:
    """Returns a SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def made_of(job: Job) -> dict[str, Any]:
    """Returns what must be the same for a run to continue another."""
    config = {name: value for name, value in job.config.to_dict().items() if name not in ("output", "model")}
    model = model_digest(job.source.config.to_dict(), local_files(job.source.path))
    return {
        **config,
        "model_sha256": model,
        "calibration_sha256": job.windows.sha256,
        "device": str(job.device),
        "versions": package_versions(),
    }


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output: Path,
    report: dict[str, Any],
    *,
    overwrite: bool = False,
    write: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Writes a folder that stands alone: weights, tokenizer, report and model card. It appears by one rename.

    Args:
        model: The compressed model, before its first forward pass.
        tokenizer: Its tokenizer, or None.
        output: The folder, checked by `check_output`.
        report: What `build_report` made.
        overwrite: Whether an existing checkpoint there may be replaced.
        write: Writes configuration and weights into a folder; None saves those that `model` holds.

    Returns:
        The report as written, with the bytes on disk and the seconds of writing.

    Raises:
        OutputError: It cannot be written; nothing is left behind.
    """
    phases = Phases()
    with atomic_folder(output, overwrite=overwrite) as folder:
        with phases.measure("write"):
            (write or functools.partial(write_model, model))(folder)
            if tokenizer is not None:
                _save_tokenizer(tokenizer, folder, output)
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
    return report
