# SPDX-License-Identifier: Apache-2.0
"""What is checked before a model is loaded: task names, consent to run generated code, the sandbox, the model folder.

Loading a large model takes minutes; a mistyped task or a missing consent must not cost them. lm-eval itself asks for
consent only afterwards.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lord_quant.errors import ConsentError, EvaluationError, HostError, ModelError, nearest_name


logger = logging.getLogger(__name__)

CONSENT_FLAG = "--confirm-run-unsafe-code"


def tasks_path() -> Path:
    """The folder of this package's tasks: lm-eval's ``--include_path``."""
    return Path(__file__).parent / "tasks"


def build_task_manager(tasks: Sequence[str], metadata: Mapping[str, Any]) -> Any:
    """lm-eval's task manager over this package's tasks and, if `tasks` names any other, over lm-eval's own.

    Indexing lm-eval's thousands of task files takes ten seconds and more.
    """
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=str(tasks_path()), include_defaults=False, metadata=dict(metadata))
    if all(name in own.task_index for name in tasks):
        return own
    return TaskManager(include_path=str(tasks_path()), metadata=dict(metadata))


def check_tasks(manager: Any, tasks: Sequence[str], confirmed: bool) -> None:
    """Checks names and consent from the task files alone; no data set and no code of a task is loaded.

    With consent the sandbox is tried out, if a selected task is to run in it.

    Raises:
        EvaluationError: A name that is no task, group or tag; all such names in one message. Or a task needs the
            sandbox on a system that has none.
        ConsentError: A selected task runs generated code, and `confirmed` is false.
        HostError: The sandbox does not work here.
    """
    unknown = [name for name in tasks if name not in manager.task_index]
    if unknown:
        # Near names among our own tasks first: lm-eval knows thousands.
        own = [name for name in manager.task_index if name.startswith("lord_")]
        lines = [f"  {name!r}{nearest_name(name, own) or nearest_name(name, manager.task_index)}" for name in unknown]
        raise EvaluationError("unknown task:\n" + "\n".join(lines) + f"\nown tasks: {', '.join(sorted(own))}")
    unsafe = sorted({found for name in tasks for found in _unsafe(manager.task_index, name, set())})
    # lm-eval's own unsafe tasks bring their own way to run code.
    sandboxed = [name for name in unsafe if name.startswith("lord_")]
    if sandboxed and os.name != "posix":
        raise EvaluationError(
            f"{', '.join(sandboxed)}: runs Python code that the model generates, and the sandbox for it needs a POSIX "
            f"system (Linux for full protection); found {os.name!r}"
        )
    if unsafe and not confirmed:
        raise ConsentError(
            f"{', '.join(unsafe)}: runs Python code that the model generates. It runs in a sandbox, which limits the harm "
            f"but is no guarantee. If you accept that, pass {CONSENT_FLAG} (confirm_run_unsafe_code=True)"
        )
    if sandboxed:
        check_sandbox()


def check_sandbox() -> None:
    """Runs one right program, as completions will be run: where that fails, every completion would count as wrong.

    Logs a warning that names what this machine's kernel leaves uncovered, if anything.

    Raises:
        HostError: It did not pass.
    """
    from lord_quant.evaluation.sandbox import Check, gaps, run_program

    try:
        result = run_program(Check("def twice(x):\n    return 2 * x\n", "assert twice(21) == 42\n", ("twice",)))
    except OSError as error:
        raise HostError(f"the sandbox for generated code does not work here: {error}") from error
    if not result.passed:
        raise HostError(
            f"the sandbox for generated code does not work here: a program known to be right ended with "
            f"{result.reason!r} after {result.seconds:.1f} s. No model was loaded"
        )
    uncovered = gaps(result.protections)
    if uncovered:
        logger.warning(
            "the sandbox for generated code is weaker on this machine than it could be. A program in it\n%s",
            "\n".join(f"  - {gap}" for gap in uncovered),
        )


def _unsafe(index: Any, name: str, seen: set[str]) -> Iterator[str]:
    """Names of the tasks marked unsafe in the task, group or tag `name`."""
    entry = index.get(name)
    if entry is None or name in seen:
        return
    seen.add(name)
    config = entry.cfg or {}
    if config.get("unsafe_code"):
        yield name
    yield from _unsafe_members(index, config.get("task"), seen)
    for member in sorted(entry.tags) if entry.kind.name == "TAG" else ():
        yield from _unsafe(index, member, seen)


def _unsafe_members(index: Any, members: Any, seen: set[str]) -> Iterator[str]:
    for member in members if isinstance(members, list) else ():
        if isinstance(member, str):
            yield from _unsafe(index, member, seen)
        elif isinstance(member, dict):
            name = member.get("group") or member.get("task")
            if member.get("unsafe_code"):
                yield str(name)
            if isinstance(name, str):
                yield from _unsafe(index, name, seen)
            yield from _unsafe_members(index, member.get("task"), seen)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses settings with which no model can be evaluated.

    Raises:
        EvaluationError: One is illegal (all are named).
    """
    import torch  # late: `--print-include-path` is asked for by scripts

    problems = []
    if not re.fullmatch(r"[1-9]\d{0,8}|auto(:[1-9]\d{0,8})?", str(settings["batch_size"])):
        problems.append(f"batch_size is {settings['batch_size']!r}; wanted a number of sequences, or 'auto'")
    limit = settings["limit"]
    if limit is not None and not 0 < limit < math.inf:
        problems.append(f"limit is {limit!r}; wanted a number of documents, or a fraction of them in (0, 1)")
    for name, least in {"window": 2, "stride": 1, "max_windows": 1, "num_fewshot": 0, "seed": 0}.items():
        value = settings[name]
        if value is not None and (not isinstance(value, int) or value < least):
            problems.append(f"{name} is {value!r}; wanted an integer of at least {least}")
    dtype = settings["dtype"]
    known = getattr(torch, str(dtype), None)
    computes = isinstance(known, torch.dtype) and known.is_floating_point and known.itemsize > 1  # those of 8 bits do not
    if dtype != "auto" and not computes:
        problems.append(f"dtype is {dtype!r}; wanted 'auto' or floats such as 'bfloat16'")
    if isinstance(settings["seed"], int) and settings["seed"] >= 2**32:
        problems.append(f"seed is {settings['seed']}; wanted an integer from 0 to {2**32 - 1}")
    if problems:
        raise EvaluationError("\n  ".join(["illegal evaluation settings:", *problems]))


def check_model(model: str) -> None:
    """Refuses a model folder that does not exist or holds no model. A name like ``org/model`` is left to the hub.

    A leading ``~`` is not expanded here: the caller has done it, for what is checked must be what is loaded.

    Raises:
        ModelError: No such folder or hub model, or no `config.json` or no weights in it.
    """
    path = Path(model)
    if not path.exists():
        if model.startswith((".", "/", "~")) or model.count("/") > 1 or not model:
            raise ModelError(f"model {model!r}: no such folder")
        from lord_quant.blocks.source import read_config  # late: `--print-include-path` is asked for by scripts

        read_config(model)
        return
    if not path.is_dir():
        raise ModelError(f"model {model!r} is a file; wanted the folder that holds config.json and the weights")
    if not (path / "config.json").is_file():
        raise ModelError(f"model {model!r}: no config.json in the folder; wanted a saved transformers model")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise ModelError(f"model {model!r}: no weights in the folder (*.safetensors or *.bin)")


def shortest_context(models: Sequence[Any]) -> int | None:
    """Returns the shortest context of models, in tokens, by their configurations; None where none says.

    Raises:
        ModelError: A configuration cannot be read, or transformers does not know what it is of.
    """
    from transformers import AutoConfig

    from lord_quant.evaluation.perplexity import context_of

    found = []
    for model in models:
        try:
            config = (
                AutoConfig.from_pretrained(str(model)) if isinstance(model, str | Path) else getattr(model, "config", None)
            )
        except Exception as error:  # hosts raise whatever they like
            raise ModelError(f"model {str(model)!r}: its configuration cannot be used: {error}") from error
        found.append(context_of(config))
    return min((context for context in found if context is not None), default=None)


def check_window(window: int | None, stride: int | None, context: int | None) -> int:
    """Returns how many tokens perplexity windows have; by default `DEFAULT_WINDOW`, or a context if it is shorter.

    Raises:
        EvaluationError: They do not fit the shortest context, or the stride is longer.
    """
    from lord_quant.evaluation.perplexity import DEFAULT_WINDOW

    if window is None:
        window = DEFAULT_WINDOW if context is None else min(DEFAULT_WINDOW, context)
    if context is not None and window > context:
        raise EvaluationError(f"window {window} is longer than the model's context of {context} tokens")
    if stride is not None and stride > window:
        raise EvaluationError(f"stride is {stride}; wanted at most the window, {window}")
    return window


def speed_lengths(context: int | None) -> dict[str, int]:
    """Returns prompt and new tokens of the speed measurement: 128 and 32, or what a shorter context holds."""
    new = 32 if context is None else max(2, min(32, context // 4))
    return {"prompt_tokens": 128 if context is None else max(1, min(128, context - new)), "new_tokens": new}


def check_tokenizers(places: Iterable[Any]) -> None:
    """Refuses tokenizers without the token that documents of a perplexity text are joined with.

    Raises:
        EvaluationError: One has none; one that cannot be loaded is left to whoever loads the model.
    """
    from transformers import AutoTokenizer

    for place in places:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(place))
        except Exception:
            continue
        if tokenizer.eos_token_id is None:
            raise EvaluationError(f"the tokenizer of {str(place)!r} has no EOS token to join documents with")


def read_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Reads generation settings, ``KEY=VALUE``, as lm-eval does: ``False`` is false. What it takes for text may be a list.

    Raises:
        EvaluationError: One is no pair, or no finite number.
    """
    from lm_eval.utils import handle_arg_string

    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise EvaluationError(f"--gen-kwargs {pair!r}; wanted KEY=VALUE, such as max_gen_toks=256")
        found = handle_arg_string(value)
        if isinstance(found, float) and not math.isfinite(found):
            raise EvaluationError(f"--gen-kwargs {pair!r}; wanted a finite number")
        if isinstance(found, str) and found[:1] in ("[", "{"):
            with contextlib.suppress(ValueError):
                found = json.loads(found)
        settings[key] = found
    return settings
