# SPDX-License-Identifier: Apache-2.0
"""Measuring the tensors of a checkpoint folder, and folders that lack some."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lord_quant.artifact.stored import measure
from lord_quant.checkpoint import METHOD_GPTQ
from lord_quant.commands import inspect
from lord_quant.errors import CheckpointError
from lord_quant.files.headers import weight_files


Tensors = dict[str, torch.Tensor]
ModelFolder = Callable[..., Path]


def change(source: Path, target: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    """Copies a model folder with other tensors."""
    shutil.copytree(source, target)
    tensors = edit(load_file(target / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("llama", "model.")])
def test_tensors_without_the_base_model_prefix_count(
    family: str, prefix: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    whole = measure(model_folder(family))
    assert whole.bpw == 32 and {(layer.bits, layer.group_size) for layer in whole.layers} == {(None, None)}
    bare = change(
        model_folder(family), tmp_path / "bare", lambda t: {name.removeprefix(prefix): value for name, value in t.items()}
    )
    assert not [name for name in load_file(bare / "model.safetensors") if name.startswith(prefix)]
    assert measure(bare).layers == whole.layers


def test_layers_without_tensors_are_named(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = change(
        model_folder("gpt2"),
        tmp_path / "holes",
        lambda t: {
            name: value for name, value in t.items() if "h.1." not in name and name != "transformer.h.0.mlp.c_fc.weight"
        },
    )
    with pytest.raises(CheckpointError) as caught:
        measure(folder)
    message = str(caught.value)
    assert "transformer.h.0.mlp.c_fc.weight" in message and "transformer.h.1.attn.c_attn.weight" in message
    assert "h.0.attn" not in message and "more" not in message


@pytest.fixture(scope="module")
def packed(model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tensor names of a packed checkpoint; two layers have factors of rank 32, one of them pivoted."""

    def pack(tensors: Tensors) -> Tensors:
        made = {}
        for name, value in tensors.items():
            if not name.endswith("_proj.weight"):
                made[name] = value
                continue
            out, inputs = value.shape
            pivoted = name == "model.layers.1.mlp.gate_proj.weight"
            low = pivoted or name == "model.layers.0.mlp.up_proj.weight"
            predicted = out - 32 if pivoted else out
            if pivoted:
                made[f"{name.removesuffix('weight')}order"] = torch.zeros(out, dtype=torch.int16)
            for part, n, m in (("down.", inputs, 32), ("up.", 32, predicted)) if low else (("", inputs, out),):
                at = name.removesuffix("weight") + part
                made |= {
                    f"{at}qweight": torch.zeros(n // 8, m, dtype=torch.int32),
                    f"{at}qzeros": torch.zeros(n // 32, m // 8, dtype=torch.int32),
                    f"{at}scales": torch.zeros(n // 32, m, dtype=torch.float16),
                    f"{at}g_idx": torch.zeros(n, dtype=torch.int32),
                }
        return made

    folder = change(model_folder("llama"), tmp_path_factory.mktemp("packed") / "model", pack)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": METHOD_GPTQ, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_packed_folder_is_measured(packed: Path) -> None:
    layers = {layer.site.name: layer for layer in measure(packed).layers}
    two = layers["model.layers.0.mlp.up_proj"]
    assert (two.form, two.rank) == ("two_factor packed", 32)
    assert {(layer.bits, layer.group_size) for layer in layers.values()} == {(4, 32)}
    pivoted = layers["model.layers.1.mlp.gate_proj"]
    assert (pivoted.form, pivoted.rank) == ("pivoted packed", 32)
    assert two.weight_bytes - pivoted.weight_bytes == 32 * 32 // 2 + 32 * 2 + 32 // 2 - 2 * 256
    dense = layers["model.layers.0.self_attn.q_proj"]
    assert (dense.form, dense.rank) == ("dense packed", None)
    assert dense.weight_bytes == 128 * 128 // 2 + 4 * 128 * 2 + 4 * 128 // 2 + 4 * 128


@pytest.mark.parametrize(("bits", "size"), [(2, 32), (3, 128), (4, 64), (8, 32)])
def test_bits_and_group_size_are_read_off_the_tensors_and_shown(
    bits: int, size: int, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.self_attn.q_proj"

    def repack(tensors: Tensors) -> Tensors:
        shapes = {"qweight": (128 * bits // 32, 128), "qzeros": (128 // size, 128 * bits // 32)}
        made = {f"{name}.{leaf}": torch.zeros(shape, dtype=torch.int32) for leaf, shape in shapes.items()}
        return tensors | made | {f"{name}.scales": torch.zeros(128 // size, 128, dtype=torch.float16)}

    folder = change(packed, tmp_path / "mixed", repack)
    layers = {layer.site.name: (layer.bits, layer.group_size) for layer in measure(folder).layers}
    assert layers.pop(name) == (bits, size) and set(layers.values()) == {(4, 32)}
    assert inspect.run(argparse.Namespace(folder=folder, json=False, verify=False)) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[0] == ["layer", "form", "out", "x", "in", "rank", "bits", "group", "bytes", "bpw"]
    (row,) = [row for row in shown if row and row[0] == name]
    assert row[:7] == [name, "dense", "packed", "128x128", "-", str(bits), str(size)]
    assert inspect.run(argparse.Namespace(folder=packed, json=False, verify=False)) == 0
    assert "group" not in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales", "g_idx"])
@pytest.mark.parametrize(
    "part",
    [
        "model.layers.0.mlp.up_proj.down",
        "model.layers.0.mlp.up_proj.up",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.gate_proj.up",
    ],
)
def test_a_packed_layer_that_lacks_a_tensor_is_named(part: str, leaf: str, packed: Path, tmp_path: Path) -> None:
    lost = f"{part}.{leaf}"
    folder = change(packed, tmp_path / "lost", lambda t: {name: value for name, value in t.items() if name != lost})
    with pytest.raises(CheckpointError, match=rf"missing:\n  {lost}$"):
        measure(folder)


def test_a_layer_that_lacks_a_whole_factor_is_named(packed: Path, tmp_path: Path) -> None:
    folder = change(packed, tmp_path / "lost", lambda t: {n: v for n, v in t.items() if ".up_proj.down." not in n})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.down\.weight$"):
        measure(folder)


def shard(folder: Path) -> list[str]:
    """Splits a folder's file in two shards with an index; returns their paths."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    where = {name: names[position % 2] for position, name in enumerate(tensors)}
    for file in names:
        save_file({name: value for name, value in tensors.items() if where[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return [str(folder / name) for name in names]


@pytest.mark.parametrize("sharded", [True, False])
def test_stray_files_beside_the_weights_do_not_count(sharded: bool, model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    files = shard(folder) if sharded else [str(folder / "model.safetensors")]
    before = measure(folder)
    save_file({"layers.0.attention.wq.weight": torch.zeros(100)}, folder / "consolidated.safetensors")
    assert weight_files(folder) == files
    assert measure(folder) == before
    assert before.tensor_bytes == measure(model_folder("llama")).tensor_bytes


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not a readable index"),
        ("[]", "is not a readable index"),
        ('{"metadata": {}}', "is not a readable index"),
        ('{"weight_map": {"a": 3}}', "is not a readable index"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"names files that are not there: gone\.safetensors"),
        ('{"weight_map": {}}', "holds no safetensors"),
    ],
)
def test_a_bad_index_is_refused(index: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=message):
        weight_files(tmp_path)


def test_float_forms_are_told_apart_by_the_order(model_folder: ModelFolder, tmp_path: Path) -> None:
    def decompose(tensors: Tensors) -> Tensors:
        name = "model.layers.0.mlp.gate_proj"
        out, inputs = tensors.pop(f"{name}.weight").shape
        tensors |= {f"{name}.down.weight": torch.zeros(16, inputs - 16), f"{name}.up.weight": torch.zeros(out, 16)}
        tensors |= {f"{name}.up.bias": torch.zeros(out), f"{name}.order": torch.zeros(inputs, dtype=torch.int16)}
        for name, pivoted in (("model.layers.0.mlp.up_proj", False), ("model.layers.1.mlp.up_proj", True)):
            out, inputs = tensors.pop(f"{name}.weight").shape
            tensors |= {f"{name}.down.weight": torch.zeros(16, inputs), f"{name}.down.bias": torch.zeros(16)}
            tensors |= {f"{name}.up.weight": torch.zeros(out - 16 * pivoted, 16), f"{name}.up.bias": torch.zeros(out)}
            tensors |= {f"{name}.order": torch.zeros(out, dtype=torch.int16)} if pivoted else {}
        return tensors

    folder = change(model_folder("llama"), tmp_path / "float", decompose)
    layers = {layer.site.name: layer for layer in measure(folder).layers}
    two, pivoted = (layers[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1))
    assert (two.form, two.rank) == ("two_factor", 16) and (pivoted.form, pivoted.rank) == ("pivoted", 16)
    assert two.weight_bytes - pivoted.weight_bytes == 16 * 16 * 4 - 256 * 2
    columns = layers["model.layers.0.mlp.gate_proj"]
    assert (columns.form, columns.rank) == ("column_pivoted", 16)
    assert two.weight_bytes - columns.weight_bytes == 16 * 16 * 4 + 16 * 4 - 128 * 2  # and no bias of `down`


Q, K, V = (f"model.layers.1.self_attn.{name}_proj" for name in "qkv")  # 128, 64 and 64 outputs


def grouped(source: Path, target: Path, packed: bool, pattern: object = None) -> Path:
    """Three layers with a bottleneck of 64, packed at 4 bits (`down`) and 3 (`up`) or in float."""

    def regroup(tensors: Tensors) -> Tensors:
        made = {name: value for name, value in tensors.items() if name.rpartition(".")[0] not in (Q, K, V)}
        for name, outputs in ((Q, 128), (K, 64), (V, 64)):
            for part, n, m, bits in (("down", 128, 64, 4), ("up", 64, outputs, 3))[name != Q :]:
                if not packed:
                    made[f"{name}.{part}.weight"] = torch.zeros(m, n)
                    continue
                made |= {
                    f"{name}.{part}.qweight": torch.zeros(n * bits // 32, m, dtype=torch.int32),
                    f"{name}.{part}.qzeros": torch.zeros(n // 32, m * bits // 32, dtype=torch.int32),
                    f"{name}.{part}.scales": torch.zeros(n // 32, m, dtype=torch.float16),
                    f"{name}.{part}.g_idx": torch.zeros(n, dtype=torch.int32),
                }
        return made

    folder = change(source, target, regroup)
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": METHOD_GPTQ if packed else "lord", "group_pattern": pattern or {K: Q, V: Q}}
    config["quantization_config"] = config.get("quantization_config", {}) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_groups_are_measured_and_shown(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = grouped(packed, tmp_path / "grouped", packed=True)
    layers = {layer.site.name: layer for layer in measure(folder).layers}
    found = {name: layers[name] for name in (Q, K, V)}
    assert {(one.form, one.rank, one.bits, one.up_bits, one.group_size, one.leader) for one in found.values()} == {
        ("grouped packed", 64, 4, 3, 32, Q)
    }
    up = {m: 64 * m * 3 // 8 + 2 * 2 * m + 2 * m * 3 // 8 + 4 * 64 for m in (128, 64)}
    down = 128 * 64 // 2 + 2 * 64 * 4 + 64 * 4 // 2 + 4 * 128
    assert [found[name].weight_bytes for name in (Q, K, V)] == [down + up[128], up[64], up[64]]
    assert {layer.leader for name, layer in layers.items() if name not in found} == {""}
    assert inspect.run(argparse.Namespace(folder=folder, json=False, verify=False)) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows[Q][:5] == ["grouped", "packed", "128x128", "64", "4/3"]
    assert rows[K][:6] == ["grouped", "packed", "(q_proj)", "64x128", "64", "4/3"]
    assert inspect.run(argparse.Namespace(folder=folder, json=True, verify=False)) == 0
    shown = {row["name"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    assert [(shown[name]["leader"], shown[name]["bits"], shown[name]["up_bits"]) for name in (Q, K)] == [(Q, 4, 3)] * 2


def test_group_sizes_of_factors_are_read_off_and_shown(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def coarser(made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for leaf in ("scales", "qzeros"):
            made[f"{Q}.down.{leaf}"] = made[f"{Q}.down.{leaf}"][::2].clone()
        return made

    folder = change(grouped(packed, tmp_path / "grouped", packed=True), tmp_path / "coarser", coarser)
    layers = {layer.site.name: layer for layer in measure(folder).layers}
    assert {(layers[name].group_size, layers[name].up_group_size) for name in (Q, K, V)} == {(64, 32)}
    assert inspect.run(argparse.Namespace(folder=folder, json=False, verify=False)) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert rows[Q][5:7] == ["4/3", "64/32"]
    assert inspect.run(argparse.Namespace(folder=folder, json=True, verify=False)) == 0
    shown = {row["name"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    assert [(shown[name]["group_size"], shown[name]["up_group_size"]) for name in (Q, K)] == [(64, 32)] * 2


def test_float_groups_are_measured(model_folder: ModelFolder, tmp_path: Path) -> None:
    layers = {
        layer.site.name: layer for layer in measure(grouped(model_folder("llama"), tmp_path / "g", packed=False)).layers
    }
    assert [(layers[name].form, layers[name].rank, layers[name].leader, layers[name].bits) for name in (Q, V)] == [
        ("grouped", 64, Q, None)
    ] * 2
    assert [layers[name].weight_bytes for name in (Q, V)] == [4 * 64 * (128 + 128), 4 * 64 * 64]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ([Q], "group_pattern is list; wanted a mapping"),
        (
            {K: "model.layers.1.self_attn.p_proj"},
            f"leaders that the model does not have: {K}: 'model.layers.1.self_attn.p_",
        ),
        ({K: [Q], V: Q}, rf"leaders that the model does not have: {K}: \['{Q}'\]"),
        ({K: Q}, rf"missing:\n  {V}\.down\.weight"),
    ],
)
def test_group_patterns_that_cannot_be_are_refused(pattern: object, message: str, packed: Path, tmp_path: Path) -> None:
    folder = grouped(packed, tmp_path / "grouped", packed=True, pattern=pattern)
    with pytest.raises(CheckpointError, match=message):
        measure(folder)


def test_a_leader_that_lacks_its_down_is_named(packed: Path, tmp_path: Path) -> None:
    folder = grouped(packed, tmp_path / "grouped", packed=True)
    lost = change(folder, tmp_path / "lost", lambda t: {n: v for n, v in t.items() if n != f"{Q}.down.scales"})
    with pytest.raises(CheckpointError, match=rf"missing:\n  {Q}\.down\.scales$"):
        measure(lost)
