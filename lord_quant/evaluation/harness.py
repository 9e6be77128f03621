# SPDX-License-Identifier: Apache-2.0
"""Evaluates a model, optionally beside its baseline: lm-eval tasks, token perplexity, speed.

Task metrics are lm-eval's own numbers: the model is wrapped by lm-eval's `HFLM` as its command line does, with the same
seeds and defaults, so both give the same digits.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lord_quant.blocks.source import choose_device
from lord_quant.errors import EvaluationError, LordError, ModelError
from lord_quant.evaluation.memory import peak_process_memory
from lord_quant.evaluation.perplexity import Perplexity, corpus_perplexity
from lord_quant.evaluation.preflight import (
    build_task_manager,
    check_model,
    check_settings,
    check_tasks,
    check_tokenizers,
    check_window,
    shortest_context,
    speed_lengths,
    tasks_path,
)
from lord_quant.evaluation.speed import Speed, measure_speed
from lord_quant.silence import hush, import_hosts


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lord_quant.corpus import Corpus

__all__ = ["EvalResult", "ModelScores", "evaluate", "tasks_path"]

DEFAULT_MAX_WINDOWS = 64


@dataclass(frozen=True)
class ModelScores:
    """Scores of one model.

    Attributes:
        model: Folder or name; for a model in memory, its class and what it was loaded from.
        metrics: Values by task (or group) and metric, such as ``metrics["lord_humaneval"]["pass@1"]``.
        stderr: Standard errors likewise, where lm-eval computes one.
        perplexity: Token perplexity, if asked for.
        peak_memory_bytes: With the speed measurement, for a model given by path on the CPU: peak resident memory of a
            process of its own that loads it and generates (see `evaluation.memory`).
    """

    model: str
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    stderr: dict[str, dict[str, float]] = field(default_factory=dict)
    perplexity: Perplexity | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class EvalResult(ModelScores):
    """Scores of a model, its baseline's if there is one, and all that is needed to get them again.

    Attributes:
        baseline: The baseline's scores, with equal settings.
        speed: Speeds of both, measured in turns.
        higher_is_better: By task and metric.
        versions: Of the packages the numbers depend on.
        settings: The arguments of `evaluate`.
    """

    baseline: ModelScores | None = None
    speed: Speed | None = None
    higher_is_better: dict[str, dict[str, bool]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return asdict(self)


def evaluate(
    model: str | Path | PreTrainedModel,
    tasks: Sequence[str] = (),
    *,
    baseline: str | Path | PreTrainedModel | None = None,
    tokenizer: Any = None,
    batch_size: int | str = 1,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    limit: float | None = None,
    num_fewshot: int | None = None,
    confirm_run_unsafe_code: bool = False,
    perplexity_dataset: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = DEFAULT_MAX_WINDOWS,
    speed: bool = False,
    seed: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    on_part: Callable[[EvalResult], None] | None = None,
) -> EvalResult:
    """Evaluates `model`, and `baseline` in the same way.

    Args:
        model: Folder, hub name, or a loaded causal language model.
        tasks: Names of lm-eval's tasks, groups or tags, or of this package's (`lord_humaneval`, …).
        baseline: What to compare with, usually the model before compression.
        tokenizer: For loaded models, if it is not to be found where the model came from.
        batch_size: Sequences at a time, or ``auto``. In bfloat16 results may depend on it in the last digits.
        device: ``cpu``, ``cuda``, …; None takes CUDA if there is one, else the CPU.
        dtype: Floating-point type to load in; ``auto`` is the checkpoint's own. Ignored for loaded models.
        limit: Documents of each task (or a fraction below 1), for trying out.
        num_fewshot: Examples in the prompt, for tasks that do not fix it.
        confirm_run_unsafe_code: Consent to tasks that run code the model generates.
        perplexity_dataset: Also compute token perplexity on this text: ``python-stdlib``, a path, or a hub data set.
        window: Perplexity window in tokens; None is 1024 or the model's context, whichever is shorter.
        stride: Perplexity stride in tokens; None is `window`.
        max_windows: Perplexity windows at most; None for all.
        speed: Also measure speed and memory.
        seed: For all of lm-eval's random generators; None leaves it its own, 0 for Python's and 1234 for the others.
        metadata: Passed to the tasks, as lm-eval's ``--metadata``.
        gen_kwargs: Generation settings that replace those of the tasks.
        on_part: Called with what is known so far whenever a part is done (tasks or perplexity of a model): hours of
            tasks need not be lost to what fails behind them.

    Raises:
        EvaluationError: Nothing to do, an unknown task, an illegal setting, or a task's data set is not to be had.
        ConfigError: The device is unknown or not there.
        ConsentError: A task runs generated code and nobody consented. Raised before any model is loaded.
        HostError: The sandbox for generated code does not work here. Likewise, if it does not from the start.
        ModelError: A model is missing or cannot be loaded.
        CalibrationError: The perplexity text is missing or unreadable.
        ElsewhereError: The process that measures the peak of memory failed.
    """
    settings = {
        name: value for name, value in locals().items() if name not in {"model", "baseline", "tokenizer", "on_part"}
    }
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    settings = {**settings, "tasks": tasks, "metadata": dict(metadata or {}), "gen_kwargs": dict(gen_kwargs or {})}
    model, baseline = _expand(model), _expand(baseline)
    settings["device"] = str(choose_device(device or "auto"))  # lm-eval's own default is CUDA, there or not
    if not (tasks or perplexity_dataset or speed):
        raise EvaluationError("nothing to evaluate: wanted tasks, a perplexity data set or the speed measurement")
    check_settings(settings)
    import_hosts()
    versions, known = _versions(), list[ModelScores]()
    directions: dict[str, dict[str, bool]] = {}

    def result(scores: list[ModelScores], measured: Speed | None = None) -> EvalResult:
        theirs = scores[1] if len(scores) > 1 else None
        return EvalResult(
            **vars(scores[0]),
            baseline=theirs,
            speed=measured,
            higher_is_better=directions,
            versions=versions,
            settings=settings,
        )

    def tell(scores: ModelScores) -> None:
        if on_part is not None:
            on_part(result([*known, scores]))

    with hush("lm_eval", "transformers", "datasets"):
        ready = _preflight([model, baseline], tokenizer, settings)
        loaded: list[Any] = []
        for each in [model] if baseline is None else [model, baseline]:
            if not speed:
                loaded.clear()  # frees the memory before the next model is loaded
                gc.collect()
            lm = _load(each, tokenizer, settings)
            known.append(_evaluate_one(each, lm, ready, settings, directions, tell))
            loaded.append(lm)
            del lm
        measured = measure_speed(*(lm.model for lm in loaded), **ready.lengths) if speed else None
    return result(known, measured)


def _expand(model: Any) -> Any:
    """The folder or name of a model with a leading ``~`` replaced by the home folder; a loaded model as it is."""
    return os.path.expanduser(str(model)) if isinstance(model, str | Path) else model


class _Ready(NamedTuple):
    """What is known before a model is loaded.

    Attributes:
        manager: lm-eval's task manager, if there are tasks.
        corpus: The perplexity text, if it is asked for.
        window: Tokens of its windows, the same for both models.
        lengths: Prompt and new tokens of the speed measurement, which both models' contexts hold.
    """

    manager: Any
    corpus: Corpus | None
    window: int
    lengths: dict[str, int]


def _preflight(models: list[Any], tokenizer: Any, settings: dict[str, Any]) -> _Ready:
    """Checks all that can be checked without a model's weights."""
    manager = None
    if settings["tasks"]:
        # As on lm-eval's command line, tasks see the model's arguments; the baseline is measured on the same documents.
        own = {"pretrained": str(models[0])} if isinstance(models[0], str | Path) else {}
        manager = build_task_manager(settings["tasks"], own | settings["metadata"])
        check_tasks(manager, settings["tasks"], settings["confirm_run_unsafe_code"])
    for model in models:
        if isinstance(model, str | Path):
            check_model(str(model))
    context = shortest_context([model for model in models if model is not None])
    window = check_window(settings["window"], settings["stride"], context)
    lengths = speed_lengths(context)
    if settings["perplexity_dataset"] is None:
        return _Ready(manager, None, window, lengths)
    check_tokenizers([tokenizer or model for model in models if isinstance(tokenizer or model, str | Path)])
    from lord_quant.corpus import load_corpus

    return _Ready(manager, load_corpus(settings["perplexity_dataset"], split="heldout"), window, lengths)


def _evaluate_one(
    model: Any,
    lm: Any,
    ready: _Ready,
    settings: dict[str, Any],
    directions: dict[str, dict[str, bool]],
    tell: Callable[[ModelScores], None],
) -> ModelScores:
    """Returns the scores of the wrapped model; `directions` takes those of the metrics, `tell` the scores part by part."""
    name = str(model) if isinstance(model, str | Path) else f"{type(model).__name__} {model.name_or_path}".strip()
    scores = ModelScores(name)
    if settings["tasks"]:
        raw = _run_tasks(lm, ready.manager, settings)
        directions.update(raw.get("higher_is_better", {}))
        metrics, stderr = _split(raw.get("results", {}))
        scores = replace(scores, metrics=metrics, stderr=stderr)
        tell(scores)
    if ready.corpus is not None:
        batch_size = settings["batch_size"]
        found = corpus_perplexity(
            lm.model,
            lm.tokenizer,
            ready.corpus,
            window=ready.window,
            stride=settings["stride"],
            max_windows=settings["max_windows"],
            batch_size=int(batch_size) if str(batch_size).isdigit() else 1,
        )
        scores = replace(scores, perplexity=found)
        tell(scores)
    if settings["speed"] and settings["device"] == "cpu" and isinstance(model, str | Path):
        peak = peak_process_memory(str(model), settings["dtype"], **ready.lengths)
        scores = replace(scores, peak_memory_bytes=peak)
    return scores


def _load(model: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    """Wraps the model as lm-eval's own command line does."""
    from lm_eval.models.huggingface import HFLM
    from safetensors import SafetensorError

    arguments = {"batch_size": settings["batch_size"], "device": settings["device"], "tokenizer": tokenizer}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if not isinstance(model, str | Path):
        return HFLM(pretrained=model, **arguments)
    try:
        return HFLM(pretrained=str(model), dtype=settings["dtype"], **arguments)
    except LordError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"model {str(model)!r} could not be loaded: {error}") from error


def _run_tasks(lm: Any, manager: Any, settings: dict[str, Any]) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    seed, kinds = settings["seed"], ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        results = simple_evaluate(
            model=lm,
            tasks=settings["tasks"],
            task_manager=manager,
            num_fewshot=settings["num_fewshot"],
            batch_size=settings["batch_size"],
            device=settings["device"],
            limit=settings["limit"],
            gen_kwargs=settings["gen_kwargs"] or None,
            log_samples=False,
            confirm_run_unsafe_code=settings["confirm_run_unsafe_code"],
            **({} if seed is None else dict.fromkeys(kinds, seed)),
        )
    except OSError as error:  # a data set that is not there, or cannot be fetched
        raise EvaluationError(f"{', '.join(settings['tasks'])} cannot be evaluated: {error}") from error
    return results or {}  # None on all ranks but the first


def _split(results: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Turns lm-eval's rows, keyed ``metric,filter``, into values and standard errors keyed by metric.

    The first filter of a metric gives the bare name; further filters keep ``metric,filter``.
    """
    values: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for task, row in results.items():
        values[task], errors[task] = {}, {}
        for key, value in row.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or isinstance(value, str) or value is None:
                continue
            is_error = metric.endswith("_stderr")
            table = errors[task] if is_error else values[task]
            name = metric.removesuffix("_stderr")
            table[f"{name},{filter_name}" if name in table else name] = float(value)
    return values, errors


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from lord_quant.version import __version__

    return {"lord_quant": __version__, **{name: version(name) for name in ("lm_eval", "transformers", "torch")}}
