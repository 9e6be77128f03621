# SPDX-License-Identifier: Apache-2.0
"""From a run to what its model's layers would lose: what the sensitivity pass takes, how long, what it is told apart by."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lord_quant.blocks.residency import RESIDENT, Residency
from lord_quant.blocks.source import build_skeleton, commit_of, load_model, read_config, stream_source
from lord_quant.calibration import TokenWindows, windows_at_once
from lord_quant.checkpoint import whole_path
from lord_quant.config import LordConfig
from lord_quant.distributed import ALONE, World
from lord_quant.errors import CheckpointError, OutputError
from lord_quant.files.claim import claimed, sensed_beside, sensing_beside
from lord_quant.files.digests import model_digest
from lord_quant.files.headers import weight_files
from lord_quant.losses.probe_work import count_sensing
from lord_quant.losses.probing import measure_statistics
from lord_quant.losses.statistics import SoFar, Statistics, load_statistics, save_statistics
from lord_quant.progress import Progress
from lord_quant.runs.estimate import seconds_of
from lord_quant.runs.operations import Workload, total
from lord_quant.runs.pipeline import Job, fisher_windows, in_batches, prepare
from lord_quant.sensitivity import Expansion
from lord_quant.version import __version__


SENSED_TOKENS = 2**16
"""Tokens of the backward pass of a sensitivity pass: G and slopes of few fit these more than the text they stand for."""


def unplanned(config: LordConfig) -> LordConfig:
    """Returns a run without a budget and without what one chooses: dense layers, 4 bits."""
    lowrank = dataclasses.replace(config.lowrank, rank_ratio=1, param_ratio=None, rank_pattern=None, form_pattern=None)
    gptq = dataclasses.replace(config.gptq, bits=4, group_size=None, bits_pattern=None, group_size_pattern=None)
    return dataclasses.replace(config, lowrank=lowrank, gptq=gptq, budget=None)


def statistics_of(
    config: LordConfig,
    progress: Progress | None = None,
    world: World = ALONE,
    *,
    keep: bool = False,
    windows: TokenWindows | None = None,
) -> Statistics:
    """Reads the statistics that a run's budget names; measures them where it names none.

    Args:
        config: The run.
        progress: Where it is told how far the pass is.
        world: The processes that share the pass. Files are the first one's.
        keep: Keep them beside the run's output until it is finished, and use those of one that was cut off.
        windows: Its calibration tokens, where they are read already.

    Raises:
        OutputError: They are to be kept, and another run is writing the output.
        LordError: Whatever is wrong with the file, the model or the calibration.
    """
    if config.budget is not None and config.budget.statistics:
        return world.broadcast(load_statistics(config.budget.statistics) if world.first else None)
    if not keep or config.output is None:
        return sense(config, progress, dense_job(config, windows), world=world)
    job, output = dense_job(config, windows), whole_path(config.output)
    with claimed(output) if world.first else contextlib.nullcontext():
        return _kept_or_sensed(config, job, output, progress, world)


def _kept_or_sensed(config: LordConfig, job: Job, output: Path, progress: Progress | None, world: World) -> Statistics:
    """Returns what a run that was cut off kept beside its output; measures it, and keeps it, where there is none."""
    pass_sha256 = told_apart(config, job)
    kept, so_far = sensed_beside(output, pass_sha256), sensing_beside(output, pass_sha256)
    found = None
    if world.first:
        with contextlib.suppress(CheckpointError):  # there is none, or it is spoilt
            found = load_statistics(kept)
    found = world.broadcast(found)
    if found is not None:
        return found
    statistics = sense(config, progress, job, so_far, world)
    if world.first:
        with contextlib.suppress(OSError, OutputError):  # it serves a run that is cut off; this one has what it needs
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_statistics(statistics, kept)
            so_far.unlink(missing_ok=True)
    return statistics


def dense_job(config: LordConfig, windows: TokenWindows | None = None) -> Job:
    """Prepares the run of a sensitivity pass, perhaps with tokens that are read already: layers stay dense, nothing is
    written.

    Raises:
        LordError: Whatever is wrong with model or calibration.
    """
    return prepare(dataclasses.replace(unplanned(config), output=None), windows=windows)


def told_apart(config: LordConfig, job: Job) -> str:
    """Returns a SHA-256 of all that statistics depend on, and of what they do not but for the budget."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("output", "model", "budget")}
    made_of = [settings, digest_of(config.model), job.windows.sha256, __version__]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def sense(
    config: LordConfig,
    progress: Progress | None = None,
    job: Job | None = None,
    so_far: Path | None = None,
    world: World = ALONE,
) -> Statistics:
    """Runs the sensitivity pass of a model.

    Args:
        config: Model, calibration and solver; ranks and bits in it do not matter.
        progress: Where it is told how far the pass is.
        job: The run prepared for dense layers, where it is already.
        so_far: Where what is measured waits for a pass that goes on; whoever has it all removes the file.
        world: The processes that share the pass; all end with the same statistics.

    Raises:
        LordError: Whatever is wrong with model or calibration.
    """
    job = job or dense_job(config)
    streamed = stream_source(job.source, job.device)
    model, residency = streamed or (load_model(job.source, job.device), RESIDENT)
    return sense_model(model, job.windows, config, residency, progress, so_far=so_far, world=world)


def sense_model(
    model: torch.nn.Module,
    windows: TokenWindows,
    config: LordConfig,
    residency: Residency = RESIDENT,
    progress: Progress | None = None,
    commit: str | None = None,
    so_far: Path | None = None,
    world: World = ALONE,
) -> Statistics:
    """Runs the sensitivity pass of a dense model, which is left as it was.

    Args:
        model: The model.
        windows: Calibration tokens.
        config: Where the model came from, and the solver; ranks and bits in it do not matter.
        residency: Which blocks have their weights.
        progress: Where it is told how far the pass is.
        commit: That of a hub model; None is the one its name stands for.
        so_far: Where what is measured waits, as for `sense`.
        world: The processes, likewise.
    """
    samples = _sensed(windows, config)
    config = dataclasses.replace(config, joint=dataclasses.replace(config.joint, fisher_samples=samples))
    expansions, seed = None, config.calibration.seed
    before = SoFar(so_far if world.first else None, _origin(config, windows, commit))
    before.statistics, before.blocks = world.broadcast((before.statistics, before.blocks))
    dtype = torch.float64 if config.lowrank.float64 else torch.float32
    shared: dict[str, Any] = {"residency": residency, "progress": progress, "world": world}
    if config.joint.fisher:
        passed = fisher_windows(windows, config)
        one, other = in_batches(passed[::2]), in_batches(passed[1::2]) or in_batches(passed)
        asked: dict[str, Any] = {"names": before.probed_layers(model), "dtype": dtype, **shared}
        expansions = (
            Expansion.measure(model, one, seed=2 * seed, **asked),
            Expansion.measure(model, other, seed=2 * seed + 1, **asked),
        )
    # By windows, so that both passes cut the text alike however they batch it.
    size = config.calibration.batch_size or windows_at_once(windows.input_ids.shape[1])
    return measure_statistics(
        model,
        (in_batches(windows.input_ids[::2], size), in_batches(windows.input_ids[1::2], size)),
        expansions,
        gptq=unplanned(config).gptq,
        options=config.joint,
        so_far=before,
        mean_correction=config.lowrank.mean_correction,
        seed=seed,
        dtype=dtype,
        **shared,
    )


def _sensed(windows: TokenWindows, config: LordConfig) -> int:
    """Returns how many windows go through the backward pass."""
    return min(config.joint.fisher_samples or sensed_samples(windows.input_ids.shape[1]), len(windows.input_ids))


def sensing_seconds(job: Job) -> float:
    """Predicts how long the sensitivity pass of a run takes, in seconds, as roughly as `runs/estimate.py` does."""
    head, seq_len = build_skeleton(job.source).get_output_embeddings(), job.windows.input_ids.shape[1]
    load = Workload(
        num_tokens=job.windows.num_tokens,
        itemsize=job.source.dtype.itemsize,
        joint=True,
        seq_len=seq_len,
        fisher_tokens=_sensed(job.windows, job.config) * seq_len if job.config.joint.fisher else 0,
        head_weights=0 if head is None else head.weight.numel(),
    )
    return seconds_of(total(count_sensing(job.plan, load).values()), job.device)


def sensed_samples(seq_len: int) -> int:
    """Returns how many windows the backward pass of a sensitivity pass takes if nobody says so, and there are as many."""
    return -(-SENSED_TOKENS // seq_len)


def digest_of(model: str, commit: str | None = None) -> str:
    """Returns what tells a model apart from others: see `model_digest`; a hub model is told by name and commit.

    Args:
        model: Folder or hub name.
        commit: Of a hub model; None is that which its name stands for now.

    Raises:
        ModelError: There is no such model, or its configuration cannot be read.
    """
    path, config = read_config(model, commit)
    if Path(path).is_dir():
        return model_digest(config.to_dict(), weight_files(path))
    named = {"hub": path, "commit": commit or commit_of(path)}
    return model_digest(config.to_dict() | named, [])


def _origin(config: LordConfig, windows: TokenWindows, commit: str | None) -> dict[str, Any]:
    return {
        "model_sha256": digest_of(config.model, commit),
        "calibration_sha256": windows.sha256,
        "num_tokens": windows.num_tokens,
        "fisher_samples": config.joint.fisher_samples if config.joint.fisher else 0,
        "seed": config.calibration.seed,
        "solver": _solver(config),
        "lord_quant_version": __version__,
    }


def _solver(config: LordConfig) -> dict[str, Any]:
    """Returns the settings that change what rounding loses."""
    gptq = {name: getattr(config.gptq, name) for name in ("sym", "desc_act", "act_group_aware", "damp_percent", "mse")}
    joint = {name: getattr(config.joint, name) for name in ("rotate", "refit", "order", "deflate", "refine", "two_sided")}
    return gptq | joint | {"mean_correction": config.lowrank.mean_correction}


def other_settings(origin: Mapping[str, Any], config: LordConfig) -> str:
    """Tells which settings of a run lose otherwise than those that losses were measured with; empty if none does."""
    found, now = origin.get("solver"), _solver(config) | {"fisher": config.joint.fisher}
    measured = {**(found if isinstance(found, Mapping) else {}), "fisher": bool(origin.get("fisher_samples"))}
    return ", ".join(f"{name} {measured.get(name)!r}, now {now[name]!r}" for name in now if measured.get(name) != now[name])
