# SPDX-License-Identifier: Apache-2.0
"""Everything that reads what others wrote, each as a function of bytes.

The law: a reader returns a valid object or raises a `LordError`. Any other exception is a finding, and so is one that takes
long or much memory. `SEEDS` are real files to start from, made by the runs in `scene.py`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from scene import Scene

from lord_quant.config import LordConfig, merge, read_yaml


REPOSITORY = Path(__file__).resolve().parents[1]
DIGEST = b"DIGEST-OF-THE-MODEL".ljust(64, b"-")
"""Stands for the model's digest in plans and statistics, which differs between versions of transformers."""


def read_config(data: bytes, scene: Scene) -> None:
    """A configuration file; what is read can be written and read again."""
    path = scene.root / "run.yaml"
    path.write_bytes(data)
    config = LordConfig.from_dict(read_yaml(path))
    path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    assert LordConfig.from_dict(read_yaml(path)) == config


def read_plan(data: bytes, scene: Scene) -> None:
    """A plan file, up to what would become of every layer."""
    from lord_quant.budgets.plan_file import read_plan
    from lord_quant.runs.pipeline import make_plan

    path = scene.root / "fuzzed-plan.yaml"
    path.write_bytes(data.replace(DIGEST, scene.digest.encode()))
    sections = read_plan(path, str(scene.dense))
    make_plan(LordConfig.from_dict(merge({"model": str(scene.dense)}, sections)))


def read_statistics(data: bytes, scene: Scene) -> None:
    """A statistics file, up to a plan."""
    from lord_quant.budget_config import BudgetConfig
    from lord_quant.budgets.budget import Planner
    from lord_quant.budgets.menu import Menu
    from lord_quant.losses.statistics import load_statistics

    path = scene.root / "fuzzed.stats"
    path.write_bytes(data.replace(DIGEST, scene.digest.encode()))
    statistics = load_statistics(path)
    config = LordConfig.from_dict({"model": str(scene.dense), "joint": {"refine": 1}, "budget": {"target_bpw": 4.5}})
    planner = Planner(config, statistics, Menu())
    planner.settings(planner.choose(BudgetConfig(target_bpw=4.5)))


def read_weights(data: bytes, scene: Scene) -> None:
    """The header of a compressed checkpoint's weights, in front of the tensors of the real file: measured."""
    from lord_quant.artifact.stored import measure
    from lord_quant.blocks.source import local_files
    from lord_quant.files.headers import weight_files

    folder, (_, tensors) = scene.root / "fuzzed", _split((scene.packed / "model.safetensors").read_bytes())
    if not folder.is_dir():
        shutil.copytree(scene.packed, folder)
    (folder / "model.safetensors").write_bytes(data + tensors)
    measure(folder)
    assert local_files(str(folder)) == weight_files(folder)


def read_index(data: bytes, scene: Scene) -> None:
    """The index of a checkpoint of several files, of which one is there."""
    from lord_quant.files.headers import weight_files

    folder = scene.root / "indexed"
    if not folder.is_dir():
        folder.mkdir()
        shutil.copy(scene.packed / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(data)
    for file in weight_files(folder):
        assert Path(file).resolve().parent == folder.resolve(), file


def read_quantization(data: bytes, scene: Scene) -> None:
    """The `quantization_config` of a packed checkpoint, up to the skeleton that weights are loaded into."""
    from lord_quant.integrations.transformers import LordGPTQConfig, LordGptqHfQuantizer

    values = _json_mapping(data)
    if values is None:
        return
    quantizer = LordGptqHfQuantizer(LordGPTQConfig.from_dict(values), pre_quantized=True)
    files = [str(scene.packed / "model.safetensors")]
    quantizer._process_model_before_weight_loading(_skeleton(scene), checkpoint_files=files, device_map=None)


def read_float_quantization(data: bytes, scene: Scene) -> None:
    """The `quantization_config` of a float checkpoint, likewise."""
    from lord_quant.integrations.transformers import LordConfigFloat, LordHfQuantizer

    values = _json_mapping(data)
    if values is None:
        return
    quantizer = LordHfQuantizer(LordConfigFloat.from_dict(values), pre_quantized=True)
    quantizer._process_model_before_weight_loading(_skeleton(scene))


def read_model_config(data: bytes, scene: Scene) -> None:
    """The config.json of a dense model, up to its skeleton."""
    from lord_quant.config import GptqConfig
    from lord_quant.runs.pipeline import make_plan

    folder = scene.root / "other"
    if not folder.is_dir():
        shutil.copytree(scene.dense, folder)
    (folder / "config.json").write_bytes(data)
    base = LordConfig.from_dict({"model": str(folder), "lowrank": {"rank_ratio": 1}})
    assert isinstance(base.gptq, GptqConfig)
    make_plan(base)


def read_leftovers(data: bytes, scene: Scene) -> None:
    """What tells a run about earlier ones: report, log, plots, the configuration of a folder to be replaced."""
    from lord_quant.checkpoint import check_output
    from lord_quant.drawing.plots import check_plots
    from lord_quant.progress import check_log
    from lord_quant.runs.execution import is_finished

    folder = scene.root / "leftovers"
    folder.mkdir(exist_ok=True)
    for name in ("lord_report.json", "config.json", "plots.json", "log"):
        (folder / name).write_bytes(data)
    (folder / "x.safetensors").write_bytes(b"")
    is_finished(_job(scene.dense), folder)
    for check in (
        functools.partial(check_output, folder, overwrite=True),
        functools.partial(check_plots, folder, overwrite=True),
        functools.partial(check_log, folder / "log", {}),
    ):
        _lawful(check)


def read_journal(data: bytes, scene: Scene) -> None:
    """The journal of an unfinished run: continued, or refused."""
    from lord_quant.runs.journal import JOURNAL, Journal, folder_of

    output = scene.root / "journalled"
    folder = folder_of(output)
    folder.mkdir(exist_ok=True)
    (folder / JOURNAL).write_bytes(data)
    journal = Journal(output, {"model_sha256": "m", "seed": 0})
    journal.close()


def read_jsonl(data: bytes, scene: Scene) -> None:
    """Calibration text as lines of JSON."""
    from lord_quant.corpus import load_corpus

    path = scene.root / "fuzzed.jsonl"
    path.write_bytes(data)
    load_corpus(str(path))


def read_parquet(data: bytes, scene: Scene) -> None:
    """Calibration text as parquet."""
    from lord_quant.corpus import load_corpus

    path = scene.root / "fuzzed.parquet"
    path.write_bytes(data)
    load_corpus(str(path))


READERS: dict[str, Callable[[bytes, Scene], None]] = {
    "config": read_config,
    "plan": read_plan,
    "statistics": read_statistics,
    "weights": read_weights,
    "index": read_index,
    "quantization": read_quantization,
    "float": read_float_quantization,
    "model": read_model_config,
    "leftovers": read_leftovers,
    "journal": read_journal,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
}


def seeds(name: str, scene: Scene) -> list[bytes]:
    """Returns real files for a reader to start from."""
    quantization = json.loads((scene.packed / "config.json").read_text())["quantization_config"]
    header, _ = _split((scene.packed / "model.safetensors").read_bytes())
    rows = [json.dumps({"text": f"x = {number}", "n": number}) for number in range(3)]
    float_keys = ("quant_method", "format_version", "rank_pattern", "mean_correction")
    index = {"metadata": {"total_size": 8}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    line = {"event": "block", "name": "model.layers.3", "seconds": 97.3}
    made: dict[str, Callable[[], list[bytes]]] = {
        "config": lambda: [path.read_bytes() for path in sorted((REPOSITORY / "configs").glob("*.yaml"))],
        "plan": lambda: [(scene.root / "plan.yaml").read_bytes().replace(scene.digest.encode(), DIGEST)],
        "statistics": lambda: [_with_digest((scene.root / "model.stats").read_bytes(), scene)],
        "weights": lambda: [header],
        "index": lambda: [json.dumps(index).encode()],
        "quantization": lambda: [json.dumps(quantization | more).encode() for more in ({}, {"bits_pattern": {"a": 8}})],
        "float": lambda: [json.dumps({key: quantization[key] for key in float_keys}).encode()],
        "model": lambda: [(scene.dense / "config.json").read_bytes()],
        "leftovers": lambda: [
            (scene.packed / "lord_report.json").read_bytes(),
            (scene.packed / "config.json").read_bytes(),
            json.dumps(line).encode() + b"\n",
            b'{"lord_plots": 1}',
        ],
        "journal": lambda: [b'{"model_sha256": "m", "seed": 0}\n{"records": [], "quantized": []}\n'],
        "jsonl": lambda: ["\n".join(rows).encode()],
        "parquet": lambda: [_parquet(scene.root / "seed.parquet")],
    }
    return made[name]()


def _with_digest(data: bytes, scene: Scene) -> bytes:
    header, tensors = _split(data)
    return header.replace(scene.digest.encode(), DIGEST) + tensors


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Splits a safetensors file into its header, which begins with its length, and its tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:end], data[end:]


def _parquet(path: Path) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one", "two"], "n": [1, 2]}), path)
    return path.read_bytes()


def _lawful(check: Callable[[], Any]) -> None:
    from lord_quant.errors import LordError

    with contextlib.suppress(LordError):
        check()


def _json_mapping(data: bytes) -> dict[str, Any] | None:
    """Reads what transformers would hand on; what it would not is its own to refuse."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


@functools.cache
def _first_skeleton(folder: Path) -> Any:
    from lord_quant.blocks.source import build_skeleton, inspect_source

    return build_skeleton(inspect_source(str(folder)))


def _skeleton(scene: Scene) -> Any:
    """Returns the model on the meta device, as it is when the compressed checkpoint is loaded."""
    model = copy.deepcopy(_first_skeleton(scene.dense))
    model.name_or_path = str(scene.packed)
    return model


@functools.cache
def _job(folder: Path) -> Any:
    from lord_quant.runs.pipeline import prepare

    text = folder.parent / "text.py"
    settings = {"dataset": str(text), "num_samples": 2, "seq_len": 16}
    return prepare(LordConfig.from_dict({"model": str(folder), "lowrank": {"rank_ratio": 1}, "calibration": settings}))
