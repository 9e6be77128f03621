# SPDX-License-Identifier: Apache-2.0
"""The checkpoint on disk: what its configuration says, writing it atomically, holding its tensors against its plan.

A checkpoint is an ordinary transformers folder (safetensors, config.json, tokenizer) whose `quantization_config` carries
one of two methods of this package:

* ``lord_gptq``: layers packed by GPTQ, some of them replaced by two packed factors (`rank_pattern`, possibly empty), each
  layer with bits and group size of its own where `bits_pattern` and `group_size_pattern` name it (16 bits: not packed),
  grouped layers with the one whose `down` they use (`group_pattern`);
* ``lord``: float low-rank factors, nothing packed.

Beside the weights lie `lord_report.json` (what was done and measured) and `README.md` (the model card).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lord_quant.config import FLOAT_BITS, GptqConfig
from lord_quant.errors import CheckpointError, FormatVersionError, OutputError, reason_of
from lord_quant.files.reading import parse_json
from lord_quant.linalg import require_finite
from lord_quant.plan import Plan
from lord_quant.sizes.layer_bytes import COLUMN_PIVOTED
from lord_quant.version import (
    FACTOR_FORMAT_VERSION,
    FORMAT_VERSION,
    MIXED_FORMAT_VERSION,
    PART_FORMAT_VERSION,
    UNIFORM_FORMAT_VERSION,
    __version__,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD_GPTQ = "lord_gptq"
METHOD_FLOAT = "lord"
REPORT_NAME = "lord_report.json"
PATTERNS = ("rank_pattern", "form_pattern", "group_pattern", "bits_pattern", "group_size_pattern")
"""What a configuration says of layers, by full module path of the dense layer; bits and group sizes also of a factor."""


def quantization_config(plan: Plan, gptq: GptqConfig, host_format: str) -> dict[str, Any]:
    """Builds the `quantization_config` that `from_pretrained` rebuilds the model from.

    Args:
        plan: The plan that was run.
        gptq: How it was quantized.
        host_format: Packing format the host left, such as ``gptq_v2``.
    """
    values: dict[str, Any] = {
        "quant_method": METHOD_FLOAT if plan.bits == FLOAT_BITS else METHOD_GPTQ,
        "format_version": format_version(plan),
        "lord_quant_version": __version__,
        "rank_pattern": plan.rank_pattern,
        "mean_correction": plan.mean_correction,
    }
    if plan.form_pattern:
        values["form_pattern"] = plan.form_pattern
    if plan.group_pattern:
        values["group_pattern"] = plan.group_pattern
    if plan.bits != FLOAT_BITS:
        values |= {
            "bits": plan.bits,
            "group_size": plan.group_size,
            "sym": gptq.sym,
            "desc_act": gptq.desc_act,
            "act_group_aware": gptq.act_group_aware and not gptq.desc_act,
            "damp_percent": gptq.damp_percent,
            "true_sequential": gptq.true_sequential,
            "format": host_format,
            "block_name_to_quantize": plan.block_path,
        }
        patterns = {"bits_pattern": plan.bits_pattern, "group_size_pattern": plan.group_size_pattern}
        values |= {name: pattern for name, pattern in patterns.items() if pattern}
    return values


def format_version(plan: Plan) -> int:
    """Returns the version a checkpoint of this plan has: the oldest one that knows all that is in it."""
    if COLUMN_PIVOTED in plan.form_pattern.values():
        return FORMAT_VERSION
    if plan.bits != FLOAT_BITS and not plan.rank_pattern.keys().isdisjoint(
        name.rpartition(".")[0] for name in plan.group_size_pattern
    ):
        return FACTOR_FORMAT_VERSION
    if plan.bits != FLOAT_BITS and FLOAT_BITS in plan.bits_pattern.values():
        return PART_FORMAT_VERSION
    return MIXED_FORMAT_VERSION if plan.mixed or plan.group_pattern else UNIFORM_FORMAT_VERSION


def check_version(values: Mapping[str, Any]) -> None:
    """Refuses a configuration written by a newer format.

    Raises:
        FormatVersionError: Its `format_version` is newer than ours.
        CheckpointError: It is no version at all, or one of its patterns is no mapping.
    """
    version = values.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"format_version is {version!r}; wanted an integer of at least 1")
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"the checkpoint has format_version {version}, this lord-quant {__version__} reads up to {FORMAT_VERSION}: "
            "pip install --upgrade lord-quant"
        )
    for key in PATTERNS:
        if values.get(key) is not None and not isinstance(values[key], Mapping):
            wanted = key.removesuffix("_pattern")
            raise CheckpointError(f"{key} is {type(values[key]).__name__}; wanted a mapping of path to {wanted}")


def _is_model_folder(path: Path) -> bool:
    try:
        config = parse_json((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config and any(path.glob("*.safetensors"))


def check_output(
    output: str | Path,
    *,
    overwrite: bool = False,
    model: str | None = None,
    dataset: str | None = None,
    kind: str = "model folder (config.json with a model_type, safetensors)",
    is_kind: Callable[[Path], bool] = _is_model_folder,
) -> Path:
    """Checks that a folder can be written, before any work; leaves nothing behind.

    Args:
        output: Folder to be written.
        overwrite: Whether an existing folder of this kind may be replaced.
        model: The model that will be read; the output may not be it or hold it.
        dataset: The calibration data that will be read; the output may not lie in it either.
        kind: What may be replaced, in words.
        is_kind: Tells whether a folder is one.

    Raises:
        OutputError: Not empty, not writable, or too precious to replace.
    """
    where: Any = None
    try:
        path = _require_folder(output, {"model": model, "dataset": dataset})
        if path.is_dir() and any(path.iterdir()):
            if not overwrite:
                raise OutputError(f"output {str(output)!r} is not empty; wanted a new folder, or --overwrite")
            if not is_kind(path):
                raise OutputError(f"output {str(output)!r} is not empty and no {kind}: --overwrite replaces nothing else")
        where = path.parent
        while not where.exists():
            where = where.parent
        # With a name as long as the longest that is made of the output's.
        os.rmdir(tempfile.mkdtemp(prefix=f".lord-{path.name}.partial-", suffix="-end", dir=where))
    except OSError as error:
        place = where or error.filename  # on the way there, a folder that may not be entered
        raise OutputError(f"output {str(output)!r} cannot be written: {place}: {error.strerror}") from error
    return path


def _require_folder(output: str | Path, sources: Mapping[str, str | None]) -> Path:
    """Returns the whole path of what is a folder or not there, and can be put in place by a rename."""
    path = whole_path(output)
    for kind, name in sources.items():
        source = _existing(name)
        if source is not None and (source == path or path in source.parents):
            raise OutputError(f"output {str(output)!r} is or holds the {kind} itself; wanted another folder")
        if source is not None and kind == "dataset" and source in path.parents:  # the next run would read it as text
            raise OutputError(f"output {str(output)!r} lies in the dataset; wanted a folder outside {str(source)!r}")
    if os.path.islink(os.path.expanduser(output)) and not path.exists():
        raise OutputError(f"output {str(output)!r} is a link to {str(path)!r}, which does not exist; wanted a folder")
    if path.exists() and not path.is_dir():
        raise OutputError(f"output {str(output)!r} is a file; wanted a folder")
    if path == Path.cwd():  # whoever stands in it would stand in a folder that is gone
        raise OutputError(f"output {str(output)!r} is the current folder, which is replaced by a rename; wanted one in it")
    if os.path.ismount(path):
        raise OutputError(f"output {str(output)!r} is a mount point and cannot be replaced; wanted a folder inside it")
    return path


def check_file(
    output: str | Path,
    *,
    overwrite: bool = False,
    model: str | None = None,
    dataset: str | None = None,
    kind: str = "file",
    is_kind: Callable[[Path], bool] | None = None,
) -> Path:
    """Checks that a file can be written, before any work; leaves nothing behind.

    Args:
        output: File to be written.
        overwrite: Whether a file there may be replaced.
        model: The model that will be read; the output may not lie in it.
        dataset: The calibration data that will be read, likewise.
        kind: What may be replaced, in words; empty files may always be.
        is_kind: Tells whether a file is one; None lets any be replaced.

    Raises:
        OutputError: It is there already, and not to be replaced or of another kind; is a folder, lies in what will be
            read, or cannot be written.
    """
    path = whole_path(output)
    for source_kind, name in {"model": model, "dataset": dataset}.items():
        source = _existing(name)
        if source is not None and (source == path or source in path.parents):
            raise OutputError(f"output {str(output)!r} is or lies in the {source_kind} itself; wanted another place")
    try:
        if path.is_dir():
            raise OutputError(f"output {str(output)!r} is a folder; wanted a file")
        if path.exists() and not overwrite:
            raise OutputError(f"output {str(output)!r} exists; wanted a new file, or --overwrite")
        if is_kind and path.exists() and not (path.is_file() and (not path.stat().st_size or is_kind(path))):
            raise OutputError(f"output {str(output)!r} is no {kind}: --overwrite replaces nothing else")
        where = path.parent
        while not where.exists():
            where = where.parent
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.partial-", dir=where):  # a name as long as it will be
            return path
    except OSError as error:
        raise OutputError(f"output {str(output)!r} cannot be written: {error.strerror}") from error


def whole_path(output: str | Path) -> Path:
    """Returns where an output will be, in full, links followed.

    Raises:
        OutputError: It is no path: links go in a circle, nobody's home is meant, a name is too long.
    """
    try:
        path = Path(output).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # no such user; links in a circle, before Python 3.13; a NUL
        raise OutputError(f"output {str(output)!r} cannot be written: {reason_of(error)}") from error
    if os.path.islink(path):
        raise OutputError(f"output {str(output)!r} is a link that leads back to itself; wanted a folder or a file")
    return path


def _existing(name: str | None) -> Path | None:
    """Returns the whole path of a source that is there; what is wrong with its name, whoever reads it says."""
    if name is None or not os.path.exists(os.path.expanduser(name)):
        return None
    return Path(os.path.expanduser(name)).resolve()


@contextmanager
def atomic_file(output: str | Path) -> Iterator[Path]:
    """Yields a temporary file beside `output` that becomes `output` by one rename when the body succeeds.

    Raises:
        OutputError: It could not be written; nothing is left behind.
    """
    from safetensors import SafetensorError

    path = Path(output).expanduser()
    staging: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        os.close(handle)
        staging = Path(name)
        yield staging
        _publish(staging)
        staging.replace(path)
    except (OSError, SafetensorError) as error:  # the latter where a disk is full
        raise OutputError(f"output {str(output)!r} cannot be written: {reason_of(error)}") from error
    finally:
        if staging is not None:
            staging.unlink(missing_ok=True)


@contextmanager
def atomic_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `output` that becomes `output` by one rename when the body succeeds.

    With `overwrite`, a folder that stood there before is moved aside first and removed afterwards. When the body fails,
    nothing changes; when only the rename fails, the finished folder is kept where it is.

    Raises:
        OutputError: It could not be written; or the finished folder could not be put in place, or something appeared there
            meanwhile, and the message says where it is kept; or it is in place and what it replaced could not be removed.
    """
    from safetensors import SafetensorError

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise OutputError(f"output {str(output)!r} cannot be written: {reason_of(error)}") from error
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                _publish(path)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise OutputError(f"output {str(output)!r} cannot be written: {reason_of(error)}") from error
        raise
    try:
        _put_in_place(staging, output, overwrite)
    except OSError as error:
        with suppress(OSError):  # the next run removes what has the name of something unfinished
            staging = staging.rename(staging.with_name(f".{output.name}.kept-{staging.name.rpartition('-')[2]}"))
        raise OutputError(
            f"{str(output)!r} could not be put in place ({reason_of(error)}); it is kept at {str(staging)!r}"
        ) from error


def _put_in_place(staging: Path, output: Path, overwrite: bool) -> None:
    if not output.exists() or not any(output.iterdir()):
        staging.rename(output)  # an empty folder gives way
        return
    if not overwrite:
        raise FileExistsError("something appeared there during the run")
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
    output.rename(aside / output.name)
    try:
        staging.rename(output)
    except BaseException:
        (aside / output.name).rename(output)
        aside.rmdir()
        raise
    try:
        shutil.rmtree(aside)
    except OSError as error:
        raise OutputError(
            f"{str(output)!r} is in place, but what it replaced could not be removed ({reason_of(error)}): it is left at "
            f"{str(aside)!r}"
        ) from error


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes weights and configuration into an existing folder."""
    model.save_pretrained(folder)


def cast_floats(model: torch.nn.Module, dtype: torch.dtype, prefix: str = "") -> None:
    """Casts float parameters of a model, or of its part whose names begin with `prefix`, to the stored dtype in place.

    Buffers stay: rotary frequencies are computed, not stored, and packed layers keep the dtypes of their format.

    Raises:
        NumericsError: A value does not fit into the dtype; the first such tensor is named.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
            require_finite(parameter.data, f"{prefix + name!r} stored as {dtype}")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _publish(path: Path) -> None:
    with path.open("r+b") as handle:
        os.fsync(handle.fileno())
    path.chmod(0o666 & ~_umask())  # safetensors, like mkstemp, makes files for their owner alone
