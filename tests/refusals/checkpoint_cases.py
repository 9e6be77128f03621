# SPDX-License-Identifier: Apache-2.0
"""Models and checkpoints that are refused: loaded, looked at, compressed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from file_cases import NAME
from in_process import run_command
from refusal import Ground, Refusal, claiming, edit_header, nested, overlapping


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
NOT_SAFE = "is not a readable safetensors file"
Change = Callable[[dict[str, Any]], Any]


def pickled(ground: Ground, name: str) -> Path:
    """Offers pickled weights in place of the real ones."""
    from safetensors.torch import load_file

    folder = ground.packed()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / name)
    return folder


def elsewhere(ground: Ground, name: str) -> Path:
    """An index that names weights outside its folder, which are there."""
    folder = ground.sharded()
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    (folder / SECOND).rename(ground.root / SECOND)
    where = {SECOND: name.format(root=ground.root)}
    values["weight_map"] = {key: where.get(file, file) for key, file in values["weight_map"].items()}
    path.write_text(json.dumps(values))
    return folder


def twice(ground: Ground) -> Path:
    """Two files that hold the same tensor."""
    from safetensors.torch import load_file, save_file

    folder = ground.sharded()
    one, other = load_file(folder / FIRST), load_file(folder / SECOND)
    name = min(one)
    save_file(other | {name: one[name]}, folder / SECOND, {"format": "pt"})
    return folder


def indexed(ground: Ground, text: str) -> Path:
    folder = ground.sharded()
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def of_another_model(ground: Ground) -> Path:
    """The weights of the dense model under the configuration of the compressed one."""
    folder = ground.packed()
    (folder / "model.safetensors").write_bytes((ground.dense / "model.safetensors").read_bytes())
    return folder


def cast(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def settings(change: Change, error: str, *parts: str) -> Refusal:
    """A packed checkpoint with another `quantization_config`, loaded."""
    return Refusal(lambda ground: ground.load(ground.packed(change)), error, parts)


def weights(change: Callable[[bytes], bytes], *parts: str) -> Refusal:
    """A packed checkpoint with other bytes for weights, loaded."""
    return Refusal(lambda ground: ground.load(ground.rewritten(change)), "CheckpointError", parts)


def tensors(change: Change, *parts: str) -> Refusal:
    return Refusal(lambda ground: ground.load(ground.retensored(change)), "CheckpointError", parts)


LOADED = {
    "weights empty": weights(lambda data: b"", NOT_SAFE),
    "weights that are text": weights(lambda data: b"these are no weights at all", NOT_SAFE),
    "weights cut off": weights(lambda data: data[:-1000], NOT_SAFE),
    "weights cut off in the header": weights(lambda data: data[:500], NOT_SAFE),
    "more than the header says": weights(lambda data: data + b"\0" * 8, NOT_SAFE),
    "header longer than the file": weights(claiming(10**8), NOT_SAFE),
    "header of exabytes": weights(claiming(2**63), NOT_SAFE),
    "bit flipped in the length": weights(lambda data: bytes([data[0] ^ 4]) + data[1:], NOT_SAFE),
    "bit flipped in a name": weights(lambda data: data.replace(b'"lm_head.', b'"lm_heae.', 1), "missing: lm_head.weight"),
    "tensors on each other": weights(lambda data: edit_header(data, overlapping), NOT_SAFE),
    "tensor larger than its bytes": weights(
        lambda data: edit_header(data, lambda header: header["lm_head.weight"].update(shape=[10**12, 64])), NOT_SAFE
    ),
    "dtype that does not exist": weights(
        lambda data: edit_header(data, lambda header: header["lm_head.weight"].update(dtype="F99")), NOT_SAFE
    ),
    "pickle under a safe name": weights(lambda data: pickle.dumps({"a": 1}), NOT_SAFE),
    "pickled weights": Refusal(
        lambda g: g.load(pickled(g, "pytorch_model.bin")),
        "CheckpointError",
        ("pytorch_model.bin", "pickled weights are not"),
    ),
    "weights of another model": Refusal(
        lambda g: g.load(of_another_model(g)), "CheckpointError", ("do not match quantization_config", "missing: ")
    ),
    "codes as floats": tensors(cast(f"{UP}.qweight", torch.float32), f"wrong dtype: {UP}.qweight is F32, wanted I32"),
    "codes as other integers": tensors(cast(f"{UP}.qzeros", torch.int64), f"{UP}.qzeros is I64, wanted I32"),
    "scales as integers": tensors(cast(f"{UP}.scales", torch.int32), f"{UP}.scales is I32, wanted F64 or"),
    "scales as tiny floats": tensors(cast(f"{UP}.scales", torch.float8_e4m3fn), f"{UP}.scales is F8_E4M3"),
    "embedding as integers": tensors(cast("model.embed_tokens.weight", torch.int8), "embed_tokens.weight is I8"),
    "scales of another shape": tensors(
        lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:1].clone()}), f"wrong shape: {UP}.scales is (1, 64)"
    ),
    "tensor without dimensions": tensors(
        lambda t: t.update({f"{UP}.g_idx": torch.tensor(1, dtype=torch.int32)}), f"wrong shape: {UP}.g_idx is ()"
    ),
    "tensor missing": tensors(lambda t: t.pop(f"{Q}.up.scales"), f"missing: {Q}.up.scales"),
    "tensor under another name": tensors(
        lambda t: t.update({f"{Q}.up.scale": t.pop(f"{Q}.up.scales")}), f"missing: {Q}.up.scales"
    ),
    "factor nobody asked for": tensors(
        lambda t: t.update({f"{UP}.down.qweight": torch.zeros(1, 1, dtype=torch.int32)}), f"unexpected: {UP}.down.qweight"
    ),
    "one tensor in two files": Refusal(lambda g: g.load(twice(g)), "CheckpointError", ("twice: ", SECOND)),
    "index out of its folder": Refusal(
        lambda g: g.load(elsewhere(g, f"../{SECOND}")),
        "CheckpointError",
        ("the index of", f"../{SECOND}", "in that folder"),
    ),
    "index with a whole path": Refusal(
        lambda g: g.load(elsewhere(g, f"{{root}}/{SECOND}")), "CheckpointError", ("the index of", SECOND, "in that folder")
    ),
    "format of tomorrow": settings(lambda c: c.update(format_version=99), "FormatVersionError", "format_version 99", "pip"),
    "format that is text": settings(lambda c: c.update(format_version="3"), "CheckpointError", "format_version is '3'"),
    "key nobody knows": settings(lambda c: c.update(bitz=4), "ConfigError", "'bitz'", "did you mean 'bits'"),
    "key of Python's": settings(lambda c: c.update(self=1), "ConfigError", "unknown key", "'self'"),
    "bits as text": settings(lambda c: c.update(bits="4"), "ConfigError", "4"),
    "bits of no kernel": settings(lambda c: c.update(bits=7), "ConfigError", "7"),
    "group size as text": settings(lambda c: c.update(group_size="32"), "ConfigError", "a value that GPTQ cannot have"),
    "damping as text": settings(lambda c: c.update(damp_percent="x"), "ConfigError", "a value that GPTQ cannot have"),
    "format as a number": settings(lambda c: c.update(format=2), "ConfigError", "a value that GPTQ cannot have"),
    "group size of no kernel": settings(
        lambda c: c.update(group_size=33), "CheckpointError", "group_size is 33; wanted one of 32"
    ),
    "format nobody packs": settings(lambda c: c.update(format="gptq_v4"), "ConfigError", "'gptq_v4' is not a valid"),
    "kernel nobody has": settings(lambda c: c.update(backend="abacus"), "ConfigError", "abacus"),
    "switch as text": settings(lambda c: c.update(desc_act="no"), "ConfigError", "desc_act is 'no'; wanted true or false"),
    "switch as a number": settings(
        lambda c: c.update(mean_correction=1), "ConfigError", "mean_correction is 1; wanted true"
    ),
    "targets as a number": settings(lambda c: c.update(targets=5), "ConfigError", "targets is 5; wanted a pattern"),
    "rank that is true": settings(lambda c: c["rank_pattern"].update({Q: True}), "RankError", f"{Q}: rank True"),
    "rank of all": settings(
        lambda c: c["rank_pattern"].update({Q: 10**9}), "RankError", f"{Q}: rank 1000000000, wanted 1 to"
    ),
    "ranks that are 0": settings(lambda c: c.update(rank_pattern=0), "CheckpointError", "rank_pattern is int"),
    "ranks that are no mapping": settings(lambda c: c.update(rank_pattern=[Q]), "CheckpointError", "rank_pattern is list"),
    "rank of what is no layer": settings(
        lambda c: c["rank_pattern"].update({"model.norm": 4}), "CheckpointError", "does not have: model.norm"
    ),
    "form nobody knows": settings(lambda c: c.update(form_pattern={Q: "round"}), "CheckpointError", f"{Q}: 'round'"),
    "leader of nobody": settings(
        lambda c: c.update(form_pattern={Q: "grouped"}, group_pattern={Q: "x"}), "CheckpointError", f"{Q}: 'x', wanted"
    ),
    "bits of nobody": settings(lambda c: c.update(bits_pattern={"x": 4}), "CheckpointError", "bits_pattern names 'x'"),
    "group size that divides nothing": settings(
        lambda c: c.update(group_size_pattern={UP: 33}), "CheckpointError", f"group_size_pattern['{UP}'] is 33"
    ),
    "blocks elsewhere": settings(
        lambda c: c.update(block_name_to_quantize="model.norms"),
        "CheckpointError",
        "block_name_to_quantize is 'model.norms'",
    ),
    "other bits than stored": settings(lambda c: c.update(bits=8), "CheckpointError", "wrong shape"),
    "a run's settings": settings(
        lambda c: c.update(rank_ratio="half"), "ConfigError", "rank_pattern are both given", "'half'"
    ),
}


def inspect(make: Callable[[Ground], Any], error: str, *parts: str) -> Refusal:
    return Refusal(lambda ground: run_command("inspect", make(ground)), error, parts)


def config_text(ground: Ground, text: bytes | str) -> Path:
    folder = ground.model()
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def replaced(ground: Ground, name: str) -> Path:
    """A checkpoint in which a file gave way to a folder of its name."""
    folder = ground.packed()
    (folder / name).unlink()
    (folder / name).mkdir()
    return folder


def looped(ground: Ground) -> Path:
    folder = ground.packed()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    return folder


CANNOT = ("cannot be read",)
INSPECTED = {
    "file": inspect(lambda g: g.scene.packed / "config.json", "ModelError", "holds no config.json"),
    "long name": inspect(lambda g: g.root / NAME, "ModelError", "holds no config.json"),
    "link in a circle": inspect(lambda g: g.loop("x"), "ModelError", "holds no config.json"),
    "configuration that is a folder": inspect(lambda g: replaced(g, "config.json"), "ModelError", "holds no config.json"),
    "configuration empty": inspect(lambda g: config_text(g, ""), "ModelError", *CANNOT),
    "configuration that is a list": inspect(lambda g: config_text(g, "[1]"), "ModelError", *CANNOT),
    "configuration not UTF-8": inspect(lambda g: config_text(g, b'{"model_type": "\xff"}'), "ModelError", *CANNOT),
    "configuration nested deeply": inspect(lambda g: config_text(g, nested(100_000)), "ModelError", *CANNOT),
    "configuration of nothing": inspect(lambda g: config_text(g, "{}"), "ModelError", *CANNOT),
    "model type that is a number": inspect(lambda g: g.model(lambda c: c.update(model_type=5)), "ModelError", *CANNOT),
    "quantization that is text": inspect(
        lambda g: g.model(lambda c: c.update(quantization_config="4 bits")), "ModelError", *CANNOT
    ),
    "weights missing": inspect(lambda g: rm(g.packed()), "CheckpointError", "holds no safetensors file"),
    "weights that are a folder": inspect(lambda g: replaced(g, "model.safetensors"), "CheckpointError", NOT_SAFE),
    "weights in a circle": inspect(looped, "CheckpointError", "model.safetensors"),
    "weights empty": inspect(lambda g: g.rewritten(lambda data: b""), "CheckpointError", NOT_SAFE),
    "weights cut off": inspect(lambda g: g.rewritten(lambda data: data[:-1000]), "CheckpointError", NOT_SAFE),
    "pickle under a safe name": inspect(
        lambda g: g.rewritten(lambda data: pickle.dumps({"a": 1})), "CheckpointError", NOT_SAFE
    ),
    "pickled weights": inspect(lambda g: pickled(g, "pytorch_model.bin"), "CheckpointError", "holds no safetensors file"),
    "header of exabytes": inspect(lambda g: g.rewritten(claiming(2**62)), "CheckpointError", NOT_SAFE),
    "tensors on each other": inspect(
        lambda g: g.rewritten(lambda data: edit_header(data, overlapping)), "CheckpointError", NOT_SAFE
    ),
    "indices without dimensions": inspect(
        lambda g: g.retensored(lambda t: t.update({f"{UP}.g_idx": torch.tensor(1, dtype=torch.int32)})),
        "CheckpointError",
        f"{UP}.g_idx is (), wanted 1 dimensions",
    ),
    "no groups": inspect(
        lambda g: g.retensored(lambda t: t.update({f"{UP}.scales": torch.zeros(0, 64)})),
        "CheckpointError",
        f"{UP}.scales is (0, 64), wanted 2 dimensions",
    ),
    "index that is no JSON": inspect(lambda g: indexed(g, "{"), "CheckpointError", "is not a readable index"),
    "index nested deeply": inspect(
        lambda g: indexed(g, nested(100_000)), "CheckpointError", "not a readable index", "deeply"
    ),
    "index with a key twice": inspect(
        lambda g: indexed(g, f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}'), "CheckpointError", "'a' twice"
    ),
    "index of numbers": inspect(lambda g: g.sharded({"a": 3}), "CheckpointError", "is not a readable index"),
    "index out of its folder": inspect(
        lambda g: elsewhere(g, f"../{SECOND}"), "CheckpointError", f"'../{SECOND}'; wanted safetensors files in its folder"
    ),
    "index with a whole path": inspect(
        lambda g: elsewhere(g, f"{{root}}/{SECOND}"), "CheckpointError", SECOND, "wanted safetensors files in its folder"
    ),
    "index of a pickle": inspect(
        lambda g: g.sharded({"a": "pytorch_model.bin"}), "CheckpointError", "'pytorch_model.bin'; wanted safetensors files"
    ),
    "index of what is not there": inspect(
        lambda g: g.sharded({"a": "gone.safetensors"}), "CheckpointError", "not there: gone.safetensors"
    ),
}


def rm(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def dense(change: Change, *parts: str) -> Refusal:
    """A dense model with another config.json, compressed."""
    return Refusal(lambda ground: ground.compress(model=ground.model(change)), "ModelError", parts)


def tokenizer(ground: Ground, content: bytes) -> Path:
    folder = ground.model()
    (folder / "tokenizer.json").write_bytes(content)
    return folder


def dense_index(ground: Ground, name: str) -> Path:
    """A dense model whose index names its one file, somewhere else."""
    folder = ground.model()
    (folder / "model.safetensors").rename(ground.root / "far.safetensors")
    names = {"lm_head.weight": name.format(root=ground.root)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


COMPRESSED = {
    "heads that are none": dense(lambda c: c.update(num_attention_heads=0), "cannot be read"),
    "heads that are text": dense(lambda c: c.update(num_attention_heads="two"), "cannot be read"),
    "layers without end": dense(lambda c: c.update(num_hidden_layers=10**9), "1000000000 layers", "at most 4096"),
    "layers that are none": Refusal(
        lambda g: g.compress(model=g.model(lambda c: c.update(num_hidden_layers=0))), "TargetError", ("no list of",)
    ),
    "context below nothing": dense(lambda c: c.update(max_position_embeddings=-4), "-4"),
    "dtype that does not exist": dense(lambda c: c.update(dtype="float31"), "cannot be read", "float31"),
    "dtype of integers": dense(lambda c: c.update(dtype="int8"), "dtype torch.int8", "wanted floats"),
    "activation that does not exist": dense(lambda c: c.update(hidden_act="none"), "none"),
    "quantization that is text": dense(lambda c: c.update(quantization_config="4 bits"), "cannot be read"),
    "size other than the weights'": dense(lambda c: c.update(intermediate_size=96), "other shapes"),
    "configuration nested deeply": Refusal(
        lambda g: g.compress(model=config_text(g, nested(100_000))), "ModelError", CANNOT
    ),
    "long name": Refusal(lambda g: g.compress(model=g.root / NAME), "ModelError", ("no such folder",)),
    "name with NUL": Refusal(
        lambda g: run_command("plan", "--config", g.file("a.yaml", 'model: "a\\0b"\nlowrank: {rank_ratio: 1}\n')),
        "ModelError",
        ("a\\x00b",),
    ),
    "tokenizer that is no JSON": Refusal(lambda g: g.compress(model=tokenizer(g, b"{")), "ModelError", ("tokenizer",)),
    "tokenizer that is a pickle": Refusal(
        lambda g: g.compress(model=tokenizer(g, pickle.dumps({}))), "ModelError", ("tokenizer",)
    ),
    "index out of its folder": Refusal(
        lambda g: g.compress(model=dense_index(g, "../far.safetensors")),
        "ModelError",
        ("'../far.safetensors'", "in its folder"),
    ),
    "index with a whole path": Refusal(
        lambda g: g.compress(model=dense_index(g, "{root}/far.safetensors")),
        "ModelError",
        ("far.safetensors'", "in its folder"),
    ),
    "index out of its folder, naive": Refusal(
        lambda g: g.quantize("--rank-ratio", "1", "--stack", "naive", model=dense_index(g, "../far.safetensors")),
        "ModelError",
        ("'../far.safetensors'", "in its folder"),
    ),
}

CHECKPOINTS = {
    f"{kind}: {label}": case
    for kind, cases in {"load": LOADED, "inspect": INSPECTED, "compress": COMPRESSED}.items()
    for label, case in cases.items()
}
