# SPDX-License-Identifier: Apache-2.0
"""Configuration files, plans, statistics and calibration text that are refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

from refusal import Ground, Refusal, claiming, edit_header, nested, overlapping


RUN = "lowrank: {rank_ratio: 0.5, force_rank: true}\ngptq: {group_size: 32}\n"
LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
LONG = "x" * 5000
NAME = "n" * 300


def config(text: bytes | str, *parts: str, error: str = "ConfigError") -> Refusal:
    return Refusal(lambda ground: ground.configured(text), error, parts)


CONFIGURATIONS = {
    "missing": Refusal(lambda g: g.configured(g.root / "none.yaml"), "ConfigError", ("none.yaml", "No such file")),
    "folder": Refusal(lambda g: g.configured(g.folder("run.yaml")), "ConfigError", ("run.yaml", "Is a directory")),
    "link in a circle": Refusal(lambda g: g.configured(g.loop("run.yaml")), "ConfigError", ("run.yaml", "symbolic links")),
    "too large": Refusal(
        lambda g: g.configured(g.file("run.yaml", b" " * (2**24 + 1))),
        "ConfigError",
        ("run.yaml", "more than 16777216 bytes"),
    ),
    "empty": config("", "run.yaml", "holds NoneType", "wanted a mapping"),
    "list": config("- a\n", "holds list"),
    "word": config("quantize\n", "holds str"),
    "unfinished": config("a: [1", "is not YAML", "line 1"),
    "tabs": config("lowrank:\n\trank_ratio: 1\n", "is not YAML", "line 2"),
    "two documents": config(RUN + "---\n" + RUN, "is not YAML", "single document"),
    "Latin-1": config("model: caf\xe9\n".encode("latin-1"), "run.yaml", "byte 10 is not UTF-8"),
    "UTF-16": config(RUN.encode("utf-16"), "byte 0 is not UTF-8"),
    "NUL bytes": config(b"model: a\0b\n", "is not YAML", "special characters are not allowed"),
    "binary": config(b"\x7fELF\x02\x01\x01" + bytes(range(256)), "is not UTF-8"),
    "key twice": config("seed: 1\nseed: 2\n", "is not YAML", "the key 'seed' twice", "line 2"),
    "nested key twice": config("gptq:\n  bits: 4\n  bits: 8\n", "the key 'bits' twice", "line 3"),
    "section twice": config(RUN + RUN, "the key 'lowrank' twice", "line 3"),
    "alias": config("model: &m a\noutput: *m\n", "the alias *m", "wanted the value written out", "line 2"),
    "billion laughs": config(LAUGHS, "the alias *a"),
    "alias of itself": config("a: &a [*a]\n", "the alias *a"),
    "merged alias": config("a: &a {bits: 4}\ngptq: {<<: *a}\n", "the alias *a"),
    "Python object": config("model: !!python/object/apply:os.system [ls]\n", "is not YAML", "python/object"),
    "tag of nobody": config("model: !lord x\n", "could not determine a constructor", "!lord"),
    "tag that does not fit": config("seed: !!int ''\n", "is not YAML", "IndexError"),
    "truth that is none": config("sym: !!bool perhaps\n", "is not YAML", "perhaps"),
    "day that is none": config("seed: 2020-99-99\n", "is not YAML", "month must be in 1..12"),
    "number of 4000 bits": config(f"seed: 0x{'f' * 1000}\n", "more than 64 bits", "line 1"),
    "number of 5000 digits": config(f"seed: {'9' * 5000}\n", "5000 characters", "at most 4096"),
    "long value": config(f"model: {LONG}\n", "a value of 5000 characters; wanted at most 4096"),
    "deep lists": config("a: " + nested(500) + "\n", "more than 16 levels of nesting"),
    "deep mappings": config("{a: " * 400 + "1" + "}" * 400, "more than 16 levels of nesting"),
    "NaN": config("lowrank: {rank_ratio: .nan}\n", "rank_ratio is nan", "(0, 1]"),
    "NaN as JSON writes it": config('{"lowrank": {"rank_ratio": NaN}}', "rank_ratio is 'NaN'", "(0, 1]"),
    "infinite budget": config("budget: {target_bpw: .inf}\n", "target_bpw is inf", "positive number", error="BudgetError"),
    "section that is 0": config(RUN.replace("{group_size: 32}", "0"), "section 'gptq' is int", "wanted a mapping"),
    "section that is false": config(RUN.replace("{group_size: 32}", "false"), "section 'gptq' is bool"),
    "section that is a list": config(RUN.replace("{group_size: 32}", "[]"), "section 'gptq' is list"),
    "unknown key": config(RUN + "stak: joint\n", "'stak'", "did you mean 'stack'"),
    "key that is no name": config(RUN + "null: 1\n", "None", "wanted a name"),
    "list for a name": config(RUN + "stack: [joint]\n", "stack is ['joint']", "joint, naive"),
    "bytes for a name": config(RUN + "device: !!binary aGk=\n", "device is b'hi'", "'auto'"),
    "day for a name": config(RUN + "device: 2020-01-01\n", "device is datetime.date(2020, 1, 1)"),
    "pattern that is no expression": config(
        "lowrank: {rank_ratio: 0.5, targets: ['re:(']}\n", "'re:('", "not a regular expression", error="TargetError"
    ),
    "two budgets": config("budget: {target_bpw: 3, max_loss: 1}\n", "2 budgets are given", error="BudgetError"),
    "size of nothing": config("budget: {target_size: 4QB}\n", "size '4QB'", "4GB", error="BudgetError"),
    "statistics that are no path": config(
        'budget: {target_bpw: 3, statistics: "a\\0b"}\n', "statistics 'a\\x00b' cannot be read", error="CheckpointError"
    ),
}

PLANS = {
    "missing": Refusal(lambda g: g.planned(g.root / "none.yaml"), "ConfigError", ("none.yaml", "No such file")),
    "folder": Refusal(lambda g: g.planned(g.folder("plan")), "ConfigError", ("Is a directory",)),
    "empty": Refusal(lambda g: g.planned(""), "ConfigError", ("plan.yaml", "holds NoneType")),
    "list": Refusal(lambda g: g.planned("- a"), "ConfigError", ("holds list",)),
    "not UTF-8": Refusal(lambda g: g.planned(b"\xff\xfe"), "ConfigError", ("not UTF-8",)),
    "configuration": Refusal(lambda g: g.planned(RUN), "ConfigError", ("is no plan", "wanted the sections planned")),
    "origin that is text": Refusal(lambda g: g.planned(lambda p: p.update(planned="x")), "ConfigError", ("is no plan",)),
    "other section": Refusal(lambda g: g.planned(lambda p: p.update(calibration={})), "ConfigError", ("is no plan",)),
    "alias": Refusal(lambda g: g.planned("planned: &a {}\nlowrank: *a\n"), "ConfigError", ("the alias *a",)),
    "key twice": Refusal(lambda g: g.planned("planned: {}\nplanned: {}\n"), "ConfigError", ("'planned' twice",)),
    "of another model": Refusal(
        lambda g: g.planned(lambda p: p["planned"].update(model_sha256="0" * 64)),
        "BudgetError",
        ("made for another model",),
    ),
    "of no model": Refusal(
        lambda g: g.planned(lambda p: p["planned"].pop("model_sha256")), "BudgetError", ("made for another model",)
    ),
    "section that is a list": Refusal(
        lambda g: g.planned(lambda p: p.update(lowrank=[1])), "ConfigError", ("section 'lowrank' is list",)
    ),
    "rank of a layer that is not there": Refusal(
        lambda g: g.planned(lambda p: p.update(lowrank={"rank_pattern": {"model.layers.9.mlp.up_proj": 32}})),
        "TargetError",
        ("'model.layers.9.mlp.up_proj' matches no layer",),
    ),
    "rank between steps": Refusal(
        lambda g: g.planned(lambda p: p.update(lowrank={"rank_pattern": {"mlp.up_proj": 33}})),
        "RankError",
        ("rank 33", "multiple of"),
    ),
    "rank that is a fraction": Refusal(
        lambda g: g.planned(lambda p: p["lowrank"].update(rank_pattern={"mlp.up_proj": 32.0})),
        "ConfigError",
        ("rank_pattern['mlp.up_proj'] is 32.0",),
    ),
    "bits that do not exist": Refusal(
        lambda g: g.planned(lambda p: p["gptq"].update(bits=5)), "ConfigError", ("bits is 5", "nearest: 4")
    ),
    "windows of no number": Refusal(
        lambda g: g.planned(lambda p: p.update(joint={"fisher_samples": 0})), "ConfigError", ("fisher_samples is 0",)
    ),
}

LAYER = "model.layers.0.self_attn.q_proj"


def told(change: object, *parts: str, error: str = "CheckpointError") -> Refusal:
    return Refusal(lambda ground: ground.told(change), error, parts)  # type: ignore[arg-type]


def layer(**values: object) -> object:
    return lambda about: about["layers"][LAYER].update(values)


def bytes_of(change: object, *parts: str) -> Refusal:
    return Refusal(lambda ground: ground.measured(change), "CheckpointError", parts)  # type: ignore[arg-type]


def spectrum(value: float, place: int) -> object:
    """Puts a value among the tensors: 0 is among the truncation losses, -1 among those on other text."""

    def change(data: bytes) -> bytes:
        import struct

        at = 8 + struct.unpack("<Q", data[:8])[0] if place == 0 else len(data) - 8
        return data[:at] + struct.pack("<d", value) + data[at + 8 :]

    return change


STATISTICS = {
    "missing": Refusal(lambda g: g.budgeted(g.root / "none"), "CheckpointError", ("none' cannot be read",)),
    "folder": Refusal(lambda g: g.budgeted(g.folder("x.stats")), "CheckpointError", ("x.stats' cannot be read",)),
    "link in a circle": Refusal(lambda g: g.budgeted(g.loop("x.stats")), "CheckpointError", ("x.stats' cannot be read",)),
    "long name": Refusal(lambda g: g.budgeted(g.root / NAME), "CheckpointError", ("cannot be read",)),
    "empty": bytes_of(lambda data: b"", "model.stats' cannot be read", "header"),
    "text": bytes_of(lambda data: b"hello, these are no statistics", "cannot be read"),
    "pickle": bytes_of(lambda data: pickle.dumps({"layers": 1}), "cannot be read"),
    "header cut off": bytes_of(lambda data: data[:100], "cannot be read"),
    "tensors cut off": bytes_of(lambda data: data[:-8], "cannot be read"),
    "more than was said": bytes_of(lambda data: data + b"\0" * 8, "cannot be read"),
    "header longer than the file": bytes_of(claiming(10**6), "cannot be read"),
    "header of exabytes": bytes_of(claiming(2**63), "cannot be read"),
    "bit flipped in the header": bytes_of(lambda data: data[:8] + bytes([data[8] ^ 1]) + data[9:], "cannot be read"),
    "tensors on each other": bytes_of(lambda data: edit_header(data, overlapping), "cannot be read"),
    "weights instead": Refusal(
        lambda g: g.budgeted(g.scene.packed / "model.safetensors"), "CheckpointError", ("holds no statistics",)
    ),
    "NaN": bytes_of(spectrum(float("nan"), 0), "the spectrum of", "does not fit its layer"),
    "infinite on other text": bytes_of(spectrum(float("inf"), -1), "does not fit its layer"),
    "newer version": told(lambda about: about.update(version=99), "have version 99; wanted 8"),
    "version that is none": told(lambda about: about.pop("version"), "holds no statistics", "version"),
    "header that is no JSON": told("{", "holds no statistics"),
    "header that is a list": told("[1]", "holds no statistics"),
    "NaN in the header": told('{"version": NaN}', "holds no statistics", "NaN"),
    "infinity in the header": told('{"version": 1e999}', "holds no statistics", "1e999"),
    "key twice": told('{"version": 4, "version": 4}', "'version' twice"),
    "deep header": told(nested(100_000), "nested too deeply"),
    "no origin": told(lambda about: about.pop("origin"), "'origin'"),
    "origin that is a number": told(lambda about: about.update(origin=4), "holds no statistics"),
    "of another model": told(
        lambda about: about["origin"].update(model_sha256="0" * 64), "made for another model", error="BudgetError"
    ),
    "of another solver": told(
        lambda about: about["origin"]["solver"].update(mse=0.5), "other settings", "mse 0.5, now 2.0", error="BudgetError"
    ),
    "of no solver": told(lambda about: about["origin"].update(solver=[1]), "other settings", error="BudgetError"),
    "a layer too few": told(
        lambda about: about["layers"].pop("model.layers.0.mlp.down_proj"),
        "do not have the layers of",
        error="BudgetError",
    ),
    "a layer without a spectrum": told(lambda about: about["layers"].update(more=about["layers"][LAYER]), "more"),
    "a layer of another name": told(layer(name="lm_head"), "is said to be", "lm_head"),
    "size that is text": told(layer(in_features="64"), "holds no statistics"),
    "size that is a fraction": told(layer(in_features=64.0), "is said to be", "64.0"),
    "size below nothing": told(layer(out_features=-64), "is said to be", "-64"),
    "size of other spectra": told(layer(in_features=32), "does not fit its layer"),
    "bias that is a number": told(layer(has_bias=2), "is said to be"),
    "noise that is text": told(layer(dense={"4": "much"}), "holds no statistics"),
    "factor without a rank": told(layer(down={"rank": 0, "by_bits": {}, "slope": 1.0}), "at rank 0"),
    "factor that is a list": told(layer(up=[1]), "holds no statistics"),
    "noise of no width": told(layer(dense={}), "noise at [] bits; wanted (2, 3, 4)"),
    "group of a layer that is not there": told(
        lambda about: about["groups"].update({f"{LAYER}+other": about["layers"][LAYER]}), "other"
    ),
    "noise that falls like nothing": told(layer(up={"rank": 32, "by_bits": {}, "slope": 1e300}), "with power 1e+300"),
}


def data(name: str, content: bytes | str, *parts: str) -> Refusal:
    return Refusal(lambda ground: ground.compress(dataset=ground.file(name, content)), "CalibrationError", (name, *parts))


def parquet(ground: Ground, columns: dict[str, list[object]], change: object = None) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = ground.root / "data.parquet"
    pq.write_table(pa.table(columns), path, compression="none")
    if change is not None:
        path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    return path


def of_parquet(columns: dict[str, list[object]], *parts: str, change: object = None) -> Refusal:
    return Refusal(lambda g: g.compress(dataset=parquet(g, columns, change)), "CalibrationError", ("data.parquet", *parts))


def folder_of(ground: Ground, **files: bytes) -> Path:
    folder = ground.folder("sources")
    for name, content in files.items():
        (folder / f"{name}.py").write_bytes(content)
    return folder


def pipe(ground: Ground) -> Path:
    os.mkfifo(ground.root / "pipe")
    return ground.root / "pipe"


DATA = {
    "missing": Refusal(lambda g: g.compress(dataset=g.root / "none.txt"), "CalibrationError", ("none.txt", "no such file")),
    "long name": Refusal(lambda g: g.compress(dataset=g.root / NAME), "CalibrationError", (NAME, "no such file")),
    "link in a circle": Refusal(
        lambda g: g.compress(dataset=g.loop("a.txt")), "CalibrationError", ("a.txt", "no such file")
    ),
    "pipe": Refusal(lambda g: g.compress(dataset=pipe(g)), "CalibrationError", ("pipe", "no such file or folder")),
    "device": Refusal(
        lambda g: g.compress(dataset="/dev/zero"), "CalibrationError", ("/dev/zero", "no such file or folder")
    ),
    "hub name, without the hub": Refusal(
        lambda g: g.compress(dataset="nobody/nothing"),
        "CalibrationError",
        ("nobody/nothing", "neither a file, a folder nor"),
    ),
    "name that is no path": Refusal(
        lambda g: g.configured(f'{RUN}calibration: {{dataset: ""}}\n'), "ConfigError", ("dataset is ''",)
    ),
    "empty": data("a.txt", "", "is empty"),
    "blank": data("a.txt", " \n \n", "is empty"),
    "UTF-16": data("a.txt", "text".encode("utf-16"), "is not UTF-8 text (byte 0)"),
    "NUL bytes": data("a.txt", b"a\0b", "NUL bytes"),
    "weights": data("a.txt", bytes(range(256)), "is it binary?"),
    "too short": Refusal(
        lambda g: g.compress(dataset=g.file("a.txt", "x")), "CalibrationError", ("a.txt", "fills 0 windows", "wanted 2")
    ),
    "lines that are no JSON": data("a.jsonl", '{"text": "a"}\nb\n', "line 2", "not JSON"),
    "lines that are lists": data("a.jsonl", "[1]\n", "line 1", "found list"),
    "lines without the field": data("a.jsonl", '{"body": "a"}\n', "line 1", "no key 'text'; found 'body'"),
    "field that is no text": data("a.jsonl", '{"text": 4}\n', "'text' is int, wanted str"),
    "deep lines": data("a.jsonl", nested(100_000), "line 1", "not JSON", "recursion"),
    "number of 5000 digits": data("a.jsonl", f'{{"text": {"9" * 5000}}}\n', "line 1", "not JSON", "digits"),
    "no parquet": data("a.parquet", "text", "is not a parquet file"),
    "empty parquet": data("a.parquet", "", "is not a parquet file"),
    "parquet without the column": of_parquet({"body": ["a"]}, "no column 'text'; found body"),
    "parquet of numbers": of_parquet({"text": [1]}, "'text' is int, wanted str"),
    "parquet of nothing": of_parquet({"text": ["", None]}, "'text' is NoneType, wanted str"),
    "parquet without rows": of_parquet({"text": []}, "holds no text"),
    "parquet cut off": of_parquet({"text": ["a" * 100]}, "is not a parquet file", change=lambda data: data[:-20]),
    "parquet spoilt in the middle": of_parquet(
        {"text": ["a" * 100]}, "is not a parquet file", change=lambda data: data[:4] + b"\xff" * 60 + data[64:]
    ),
    "folder without sources": Refusal(
        lambda g: g.compress(dataset=g.folder("sources")), "CalibrationError", ("sources", "holds no source file")
    ),
    "folder with a binary": Refusal(
        lambda g: g.compress(dataset=folder_of(g, good=b"x = 1", bad=b"\xff\xfe")), "CalibrationError", ("bad.py", "UTF-8")
    ),
}

FILES = {
    f"{kind}: {label}": case
    for kind, cases in {"config": CONFIGURATIONS, "plan": PLANS, "statistics": STATISTICS, "data": DATA}.items()
    for label, case in cases.items()
}
