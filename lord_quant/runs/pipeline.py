# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a compressed model.

`prepare` checks everything that can be checked without weights and returns a `Job` (this is what a dry run prints).
`compress_model` compresses a model that is loaded. What leads from a job to a checkpoint is in `execution.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lord_quant.artifact.fingerprint import Fingerprint, fingerprint_of
from lord_quant.backends import gptq as backend
from lord_quant.blocks.source import (
    Source,
    build_skeleton,
    choose_device,
    inspect_source,
    local_files,
    own_memory,
)
from lord_quant.calibration import PASS_TOKENS, TokenWindows, require_known, sample_windows
from lord_quant.checkpoint import (
    check_output,
    quantization_config,
)
from lord_quant.config import FLOAT_BITS, GptqConfig, LordConfig
from lord_quant.corpus import Corpus, load_corpus
from lord_quant.engine import DecompositionRecord, decompose_model
from lord_quant.errors import ConfigError, GroupSizeError, ModelError
from lord_quant.files.places import refuse_unread, tensor_bytes
from lord_quant.linalg import require_finite
from lord_quant.outcomes import StackRecord, plan_as_run
from lord_quant.plan import LayerPlan, Plan, build_plan
from lord_quant.progress import Progress
from lord_quant.rounding.solver import Gptq, Solvers
from lord_quant.runs.cautions import run_cautions
from lord_quant.runs.estimate import Estimate, estimate
from lord_quant.runs.joint import minded_layers, minds, stack_model
from lord_quant.runs.operations import Workload
from lord_quant.runs.weight_reads import refuse_weight_reads
from lord_quant.sensitivity import Sensitivity
from lord_quant.surgery import is_compressed
from lord_quant.targets import find_blocks, find_linears


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_SEQ_LEN = 2048
FISHER_SAMPLES = 8
"""Windows of the backward pass where nothing else is said: what a run with given ranks can spare the time for."""


@dataclass(frozen=True)
class Job:
    """A run that was found possible.

    Attributes:
        config: What was asked for.
        source: The dense model.
        plan: What becomes of every layer.
        windows: Calibration tokens.
        device: Where the run computes.
        output: Folder to write, or None.
        overwrite: Whether an existing checkpoint there may be replaced.
        estimate: Predicted time and memory.
        warnings: What the user should know before starting.
        planned: Of a run with a budget, what its plan was chosen for and what it is predicted to lose, for the report.
    """

    config: LordConfig
    source: Source
    plan: Plan
    windows: TokenWindows
    device: torch.device
    output: Path | None
    overwrite: bool
    estimate: Estimate
    warnings: tuple[str, ...]
    planned: Mapping[str, Any] | None = None


class Phases:
    """Wall time per phase of a run, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Times the body as phase `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


@dataclass(frozen=True)
class Compressed:
    """What a run did to a model.

    Attributes:
        decomposed: One record per decomposed layer; of a joint run, one per layer.
        quantized: One record per packed linear layer.
        seconds: Wall time per phase.
        plan: What became of every layer.
        fingerprint: Of the compressed model before packing; None in the naive stack, which packs as it goes.
    """

    decomposed: list[DecompositionRecord] | list[StackRecord]
    quantized: list[backend.GptqRecord]
    seconds: dict[str, float]
    plan: Plan
    fingerprint: Fingerprint | None = None


def make_plan(config: LordConfig) -> tuple[Source, Plan]:
    """Plans a run from shapes alone: no weights, no calibration text.

    Raises:
        LordError: Whatever is wrong with model, patterns, ranks or group size.
    """
    source = inspect_source(config.model, config.dtype)
    return source, plan_model(build_skeleton(source), config, source.dtype.itemsize)


def plan_model(model: torch.nn.Module, config: LordConfig, itemsize: int) -> Plan:
    """Plans a model that is at hand, loaded or on the meta device.

    Raises:
        ConfigError: The run has a budget and nothing was chosen for it yet, see `budgets/budget.py`.
        ModelError: It is decomposed or packed already.
        LordError: Whatever is wrong with patterns, ranks or group size.
    """
    if config.budget is not None:
        raise ConfigError("the run has a budget, and nothing was chosen for it; wanted the run that `apply_plan` returns")
    done = [name for name, module in model.named_modules() if is_compressed(module)]
    if done:
        raise ModelError(f"the model is already compressed (layer {done[0]!r}); wanted the dense model it was made from")
    sites = find_linears(model)
    planned = {f"{site.name}.{leaf}" for site in sites for leaf in ("weight", "bias")}
    sizes = tensor_bytes(model, itemsize)
    other = sum(size for name, size in sizes.items() if name not in planned)
    plan = build_plan(sites, config.lowrank, config.gptq, itemsize=itemsize, other_bytes=other)
    odd = plan.unpackable
    if odd and config.stack == "naive":
        raise GroupSizeError(
            f"the naive stack packs every layer, and cannot {odd[0].name} ({odd[0].shape}), whose sizes are no "
            "multiples of 32; wanted the joint stack, which leaves such layers in float"
        )
    return plan


def prepare(
    config: LordConfig, *, overwrite: bool = False, measured_on: str | None = None, windows: TokenWindows | None = None
) -> Job:
    """Checks a run and reads its calibration text, before any weight is loaded.

    Args:
        config: The run.
        overwrite: Whether an existing checkpoint at its output may be replaced.
        measured_on: Digest of the tokens on which the losses were measured that its plan rests on, if it does.
        windows: Those of another job with the same model and calibration settings, whose text is not read again.

    Raises:
        LordError: Whatever is wrong; nothing was written.
    """
    output = None
    if config.output is not None:
        output = check_output(config.output, overwrite=overwrite, model=config.model, dataset=config.calibration.dataset)
    device = choose_device(config.device)
    source = inspect_source(config.model, config.dtype)
    skeleton = build_skeleton(source)
    plan = plan_model(skeleton, config, source.dtype.itemsize)
    refuse_weight_reads(skeleton, plan)
    left_out = _left_out(skeleton, source)
    windows = windows or calibrate(config, source.tokenizer, source.context, vocabulary_of(skeleton))
    joint = config.stack == "joint"
    backward = joint and any(minds(layer, config.joint) for layer in plan.layers)
    head = skeleton.get_output_embeddings()
    load = Workload(
        num_tokens=windows.num_tokens,
        itemsize=source.dtype.itemsize,
        joint=joint,
        seq_len=windows.input_ids.shape[1],
        fisher_tokens=fisher_windows(windows, config).numel() if backward else 0,
        head_weights=0 if head is None else head.weight.numel(),
    )
    guess = estimate(plan, load, device)
    cautions = run_cautions(skeleton, plan, windows, device, config.stack, measured_on)
    return Job(config, source, plan, windows, device, output, overwrite, guess, (*left_out, *cautions))


def _left_out(skeleton: PreTrainedModel, source: Source) -> tuple[str, ...]:
    """Says which weights of the files are no part of the model; refuses files that hold another one."""
    try:
        files = local_files(source.path, fetch=False)
    except ModelError:
        return ()  # a plan needs no weights
    try:
        names = refuse_unread(skeleton, files)
    except ModelError as error:
        raise ModelError(f"model {source.path!r}: {error}") from error
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (f"the files hold weights that are no part of {type(skeleton).__name__} and are left out: {some}",) * bool(names)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Returns how many tokens a model has embeddings for, perhaps more than its tokenizer has names."""
    return len(cast(Any, model.get_input_embeddings()).weight)


def calibrate(
    config: LordConfig,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    vocabulary: int,
    corpus: Corpus | None = None,
    fewer: bool = False,
) -> TokenWindows:
    """Reads (unless a corpus is given) and tokenizes the calibration text of a run.

    Raises:
        CalibrationError: No text, or too little of it, or the model does not know the tokenizer's tokens.
        ConfigError: Windows are to be longer than the model's context.
    """
    settings = config.calibration
    seq_len = settings.seq_len or min(context, DEFAULT_SEQ_LEN)
    if seq_len > context:
        raise ConfigError(f"seq_len is {seq_len}; the model's context is {context}: nearest legal value {context}")
    corpus = corpus or load_corpus(settings.dataset, text_key=settings.text_key)
    windows = sample_windows(
        corpus, tokenizer, num_samples=settings.num_samples, seq_len=seq_len, seed=settings.seed, fewer=fewer
    )
    require_known(windows.input_ids, vocabulary, "calibration windows")
    return windows


def compress_model(
    model: PreTrainedModel,
    plan: Plan,
    windows: TokenWindows,
    config: LordConfig,
    *,
    quantizer: Any = None,
    run: Callable[[], Any] | None = None,
    itemsize: int | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Runs a plan on a loaded dense model, in place: decompose and quantize, jointly or one after the other.

    Args:
        model: The dense model.
        plan: What becomes of every layer.
        windows: Calibration tokens.
        config: The run.
        quantizer: The host quantizer to use; None makes Optimum's own.
        run: How to start it in the naive stack; None calls its `quantize_model`.
        itemsize: Bytes of a float value in the checkpoint; None takes those of the model's.
        progress: Where it is told how far the joint stack is.

    Afterwards `model.config.quantization_config` says what was done, and `save_pretrained` writes a checkpoint that
    `from_pretrained` loads. Save before the first forward pass: 4-bit CPU kernels rewrite their weights in place.
    """
    own_memory(model)
    for name, parameter in model.named_parameters():
        require_finite(parameter.detach(), f"weight {name!r}")
    model.eval()
    packed = plan.bits != FLOAT_BITS
    if packed and quantizer is None:
        quantizer = backend.make_quantizer(**host_arguments(config, plan, model, windows))
    size = itemsize or next(model.parameters()).element_size()
    jointly = functools.partial(_compress_jointly, itemsize=size, progress=progress)
    steps = jointly if config.stack == "joint" else functools.partial(_compress_naively, run=run)
    done = steps(model, plan, windows, config, quantizer)
    model.config.quantization_config = quantization_config(done.plan, config.gptq, quantizer.format if packed else "")
    return done


def _compress_jointly(
    model: PreTrainedModel,
    plan: Plan,
    windows: TokenWindows,
    config: LordConfig,
    quantizer: Any,
    itemsize: int,
    progress: Progress | None = None,
) -> Compressed:
    phases, quantized = Phases(), list[backend.GptqRecord]()
    solve = None
    if plan.bits != FLOAT_BITS:
        solve = functools.partial(solvers_of, gptq=config.gptq, num_tokens=windows.num_tokens)
    dtype = torch.float64 if config.lowrank.float64 else torch.float32
    batches, sensitivity = windows.batches(config.calibration.batch_size), None
    few = fisher_windows(windows, config)
    names = minded_layers(model, plan, config.joint)
    if len(few) and any(names):
        with phases.measure("sensitivity"):
            passed, seed = backward_batches(windows, config), config.calibration.seed
            sensitivity = Sensitivity.measure(model, passed, seed=seed, names=names, dtype=dtype, progress=progress)
    with phases.measure("stack"):
        stacked = stack_model(
            model,
            plan,
            batches,
            solve,
            config.joint,
            sensitivity=sensitivity,
            true_sequential=config.gptq.true_sequential,
            seed=config.calibration.seed,
            dtype=dtype,
            progress=progress,
        )
    as_run, fingerprint = plan_as_run(plan, stacked.records, itemsize), fingerprint_of(model)
    if solve is not None:
        with phases.measure("pack"):
            quantized = backend.pack_model(model, quantizer, stacked.quantized, plan.packings)
    return Compressed(stacked.records, quantized, phases.seconds, as_run, fingerprint)


def solvers_of(layer: LayerPlan, gptq: GptqConfig, num_tokens: int) -> Solvers:
    packings = ((layer.bits, layer.group_size), (layer.up_bits, layer.up_group_size))
    down, up = (Gptq(dataclasses.replace(gptq, bits=bits), size, num_tokens) for bits, size in packings)
    return Solvers(down, up)


def fisher_windows(windows: TokenWindows, config: LordConfig) -> torch.Tensor:
    """Returns the windows of the joint stack's backward pass, with shape (≤ fisher_samples, seq_len); none without it."""
    samples = config.joint.fisher_samples or FISHER_SAMPLES
    return windows.input_ids[: samples if config.joint.fisher else 0]


def backward_batches(windows: TokenWindows, config: LordConfig) -> list[torch.Tensor]:
    """Returns the windows of the backward pass in batches of about `PASS_TOKENS`."""
    return in_batches(fisher_windows(windows, config))


def in_batches(input_ids: torch.Tensor, size: int | None = None) -> list[torch.Tensor]:
    """Splits windows into batches of so many, None: of about `PASS_TOKENS`; none if there are no windows."""
    return list(input_ids.split(size or max(1, PASS_TOKENS // input_ids.shape[1]))) if len(input_ids) else []


def _compress_naively(
    model: PreTrainedModel,
    plan: Plan,
    windows: TokenWindows,
    config: LordConfig,
    quantizer: Any,
    run: Callable[[], Any] | None = None,
) -> Compressed:
    phases, quantized = Phases(), list[backend.GptqRecord]()
    with phases.measure("decompose"):
        dtype = torch.float64 if config.lowrank.float64 else torch.float32
        decomposed = decompose_model(model, plan, windows.batches(config.calibration.batch_size), dtype=dtype)
    if plan.bits != FLOAT_BITS:
        quantizer.quantizeConfig.mse = config.gptq.mse  # Optimum has no argument for it
        with phases.measure("quantize"):
            expected = sum(len(layer.factor_shapes()) for layer in plan.layers)
            run = run or functools.partial(quantizer.quantize_model, model)
            quantized = backend.quantize_model(model, quantizer, expected, run)
    return Compressed(decomposed, quantized, phases.seconds, plan)


def host_arguments(config: LordConfig, plan: Plan, model: torch.nn.Module, windows: TokenWindows) -> dict[str, Any]:
    """Returns the arguments for Optimum's `GPTQQuantizer`; everything not named here stays at its default."""
    return {
        "bits": plan.bits,
        "group_size": plan.group_size,
        "dataset": windows.as_samples(),
        "damp_percent": config.gptq.damp_percent,
        "desc_act": config.gptq.desc_act,
        "act_group_aware": config.gptq.act_group_aware and not config.gptq.desc_act,
        "sym": config.gptq.sym,
        "true_sequential": config.gptq.true_sequential,
        "model_seqlen": windows.input_ids.shape[1],
        "block_name_to_quantize": find_blocks(model).path,
    }
