# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that does not hold what its configuration says is refused by name; weights are never made up."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import edit_tensors

from lord_quant.errors import CheckpointError, ConfigError, FormatVersionError, LordError, RankError
from lord_quant.version import FORMAT_VERSION


LAYER = "model.layers.0.mlp.up_proj"
OTHER = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def sound(
    model_folder: Callable[..., Path], corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """One checkpoint per kind, with one layer left dense, so that entries can be added."""
    root = tmp_path_factory.mktemp("sound")
    lowrank = {"rank_ratio": 0.25, "ignore": ["model.layers.1.mlp.down_proj"]}
    for bits in (4, 16):
        families.compress(model_folder("llama"), root / str(bits), corpus_file, gptq={"bits": bits}, lowrank=lowrank)
    return {bits: root / str(bits) for bits in (4, 16)}


@pytest.fixture(scope="module")
def sound_pivoted(model_folder: Callable[..., Path], corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pivoted") / "16"
    lowrank = {"rank_ratio": 0.25, "form": "pivoted", "ignore": ["model.layers.1.mlp.down_proj"]}
    families.compress(model_folder("llama"), folder, corpus_file, gptq={"bits": 16}, lowrank=lowrank)
    return folder


@pytest.fixture(scope="module")
def sound_mixed(model_folder: Callable[..., Path], corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "4"
    gptq = {"bits": 4, "bits_pattern": {"mlp": 8}, "group_size_pattern": {LAYER: 64, OTHER: 64}}
    lowrank = {"rank_pattern": {LAYER: 64}}
    families.compress(model_folder("llama"), folder, corpus_file, gptq=gptq, lowrank=lowrank)
    return folder


@pytest.fixture(scope="module")
def sound_grouped(
    model_folder: Callable[..., Path], corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("grouped")
    lowrank = {"rank_ratio": 0.25, "form": "grouped", "ignore": ["model.layers.1.mlp.*"]}
    for bits in (4, 16):
        families.compress(model_folder("llama"), root / str(bits), corpus_file, gptq={"bits": bits}, lowrank=lowrank)
    return {bits: root / str(bits) for bits in (4, 16)}


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values["quantization_config"])
    path.write_text(json.dumps(values))


def part(bits: int) -> str:
    return "qweight" if bits == 4 else "weight"


Edit = Callable[[Path, int], Any]
DAMAGE: dict[str, tuple[Edit, type[LordError], str]] = {
    "rank changed": (
        lambda folder, bits: edit_config(folder, lambda c: c["rank_pattern"].update({LAYER: 64})),
        CheckpointError,
        rf"(?s)wrong shape: {LAYER}\.down",
    ),
    "rank removed": (
        lambda folder, bits: edit_config(folder, lambda c: c["rank_pattern"].pop(LAYER)),
        CheckpointError,
        rf"(?s)missing: {LAYER}\..*unexpected: {LAYER}\.down",
    ),
    "all ranks removed": (
        lambda folder, bits: edit_config(folder, lambda c: c.pop("rank_pattern")),
        CheckpointError,
        "(?s)missing: .* more",
    ),
    "rank added": (
        lambda folder, bits: edit_config(folder, lambda c: c["rank_pattern"].update({"model.layers.1.mlp.down_proj": 32})),
        CheckpointError,
        r"missing: model\.layers\.1\.mlp\.down_proj\.down",
    ),
    "layer that is not there": (
        lambda folder, bits: edit_config(folder, lambda c: c["rank_pattern"].update({"model.layers.7.mlp.up_proj": 32})),
        CheckpointError,
        r"model\.layers\.7\.mlp\.up_proj",
    ),
    "rank too large": (
        lambda folder, bits: edit_config(folder, lambda c: c["rank_pattern"].update({LAYER: 4096, OTHER: 0})),
        RankError,
        rf"(?s){LAYER}: rank 4096, wanted 1 to 128.*{OTHER}: rank 0",
    ),
    "rank that is no number": (
        lambda folder, bits: edit_config(folder, lambda c: c["rank_pattern"].update({LAYER: "many"})),
        RankError,
        f"{LAYER}: rank 'many'",
    ),
    "rank_pattern that is no mapping": (
        lambda folder, bits: edit_config(folder, lambda c: c.update(rank_pattern=[1])),
        CheckpointError,
        "rank_pattern is list",
    ),
    "tensor missing": (
        lambda folder, bits: edit_tensors(folder, lambda t: t.pop(f"{LAYER}.down.{part(bits)}")),
        CheckpointError,
        rf"missing: {LAYER}\.down",
    ),
    "bias missing": (
        lambda folder, bits: edit_tensors(folder, lambda t: t.pop(f"{LAYER}.up.bias")),
        CheckpointError,
        rf"missing: {LAYER}\.up\.bias",
    ),
    "norm missing": (
        lambda folder, bits: edit_tensors(folder, lambda t: t.pop("model.layers.1.input_layernorm.weight")),
        CheckpointError,
        r"missing: model\.layers\.1\.input_layernorm",
    ),
    "embedding missing": (
        lambda folder, bits: edit_tensors(folder, lambda t: t.pop("model.embed_tokens.weight")),
        CheckpointError,
        r"missing: model\.embed_tokens\.weight",
    ),
    "head missing": (
        lambda folder, bits: edit_tensors(folder, lambda t: t.pop("lm_head.weight")),
        CheckpointError,
        r"missing: lm_head\.weight",
    ),
    "wrong shape": (
        lambda folder, bits: edit_tensors(
            folder, lambda t: t.update({f"{OTHER}.up.{part(bits)}": t[f"{OTHER}.up.{part(bits)}"][:, :8].contiguous()})
        ),
        CheckpointError,
        rf"wrong shape: {OTHER}\.up",
    ),
    "factors nobody asked for": (
        lambda folder, bits: edit_tensors(
            folder, lambda t: t.update({"model.layers.1.mlp.down_proj.down.weight": torch.zeros(32, 256)})
        ),
        CheckpointError,
        r"unexpected: model\.layers\.1\.mlp\.down_proj\.down\.weight",
    ),
    "mean correction switched off": (
        lambda folder, bits: edit_config(folder, lambda c: c.update(mean_correction=False)),
        CheckpointError,
        r"unexpected: .*\.up\.bias",
    ),
    "newer format": (
        lambda folder, bits: edit_config(folder, lambda c: c.update(format_version=99)),
        FormatVersionError,
        f"format_version 99.*reads up to {FORMAT_VERSION}.*upgrade",
    ),
    "version that is none": (
        lambda folder, bits: edit_config(folder, lambda c: c.update(format_version="one")),
        CheckpointError,
        "format_version is 'one'",
    ),
    "unknown key": (
        lambda folder, bits: edit_config(folder, lambda c: c.update(rank_patern={})),
        ConfigError,
        "'rank_patern'; did you mean 'rank_pattern'",
    ),
    "truncated file": (
        lambda folder, bits: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:100_000]
        ),
        CheckpointError,
        "not a readable safetensors file",
    ),
}
PACKED_DAMAGE: dict[str, tuple[Edit, type[LordError], str]] = {
    "other bits": (lambda folder, bits: edit_config(folder, lambda c: c.update(bits=8)), CheckpointError, "wrong shape"),
    "bits that do not exist": (lambda folder, bits: edit_config(folder, lambda c: c.update(bits=5)), ConfigError, "5"),
    "other group size": (
        lambda folder, bits: edit_config(folder, lambda c: c.update(group_size=64)),
        CheckpointError,
        "wrong shape: .*(scales|qzeros)",
    ),
    "other method": (
        lambda folder, bits: edit_config(
            folder,
            lambda c: (
                c.update(quant_method="lord"),
                [c.pop(k) for k in list(c) if k not in ("quant_method", "rank_pattern", "mean_correction")],
            ),
        ),
        CheckpointError,
        "missing: .*weight",
    ),
}
PIVOTED_DAMAGE: dict[str, tuple[Edit, type[LordError], str]] = {
    "forms removed": (
        lambda folder, bits: edit_config(folder, lambda c: c.pop("form_pattern")),
        CheckpointError,
        r"(?s)wrong shape: .*up\.weight",
    ),
    "form removed": (
        lambda folder, bits: edit_config(folder, lambda c: c["form_pattern"].pop(LAYER)),
        CheckpointError,
        rf"(?s)wrong shape: {LAYER}\.up\.weight.*unexpected: {LAYER}\.(order|down\.bias)",
    ),
    "form nobody knows": (
        lambda folder, bits: edit_config(folder, lambda c: c["form_pattern"].update({LAYER: "diagonal"})),
        CheckpointError,
        f"form_pattern holds {LAYER}: 'diagonal'; wanted two_factor or pivoted",
    ),
    "the other pivoted form": (
        lambda folder, bits: edit_config(folder, lambda c: c["form_pattern"].update({LAYER: "column_pivoted"})),
        CheckpointError,
        rf"(?s)wrong shape: {LAYER}\.order .*wrong shape: {LAYER}\.down\.weight",
    ),
    "form of a dense layer": (
        lambda folder, bits: edit_config(
            folder, lambda c: c["form_pattern"].update({"model.layers.1.mlp.down_proj": "pivoted"})
        ),
        CheckpointError,
        r"form_pattern holds model\.layers\.1\.mlp\.down_proj: 'pivoted'",
    ),
    "form_pattern that is no mapping": (
        lambda folder, bits: edit_config(folder, lambda c: c.update(form_pattern="pivoted")),
        CheckpointError,
        "form_pattern is str",
    ),
    "rank of all outputs": (
        lambda folder, bits: edit_config(folder, lambda c: c["rank_pattern"].update({OTHER: 128})),
        RankError,
        f"{OTHER}: rank 128, wanted 1 to 127",
    ),
    "order missing": (
        lambda folder, bits: edit_tensors(folder, lambda t: t.pop(f"{LAYER}.order")),
        CheckpointError,
        rf"missing: {LAYER}\.order \(256,\)",
    ),
    "order too short": (
        lambda folder, bits: edit_tensors(folder, lambda t: t.update({f"{LAYER}.order": t[f"{LAYER}.order"][:9].clone()})),
        CheckpointError,
        rf"wrong shape: {LAYER}\.order is \(9,\)",
    ),
    "pivots' bias missing": (
        lambda folder, bits: edit_tensors(folder, lambda t: t.pop(f"{LAYER}.down.bias")),
        CheckpointError,
        rf"missing: {LAYER}\.down\.bias",
    ),
}
MIXED_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "bits removed": (lambda c: c.pop("bits_pattern"), rf"(?s)wrong shape: {LAYER}\.down\.q"),
    "bits changed": (lambda c: c["bits_pattern"].update({OTHER: 3}), rf"(?s)wrong shape: {OTHER}\.qweight"),
    "all bits changed": (lambda c: c.update(bits=8), r"wrong shape: model\.layers\.0\.self_attn\.\w+\.qweight"),
    "group sizes removed": (lambda c: c.pop("group_size_pattern"), rf"(?s)wrong shape: {LAYER}\.down\.(scales|qzeros)"),
    "group size changed": (
        lambda c: c["group_size_pattern"].update({OTHER: 128}),
        rf"wrong shape: {OTHER}\.(scales|qzeros)",
    ),
    "group size missing": (lambda c: c.pop("group_size"), "group_size is None; wanted one of 32, 64, 128, 256"),
    "group size that does not exist": (lambda c: c.update(group_size=48), "group_size is 48; wanted .*nearest: 32"),
    "packed layer said to be none": (
        lambda c: c["bits_pattern"].update({OTHER: 16}),
        rf"(?s)missing: {OTHER}\.weight.*unexpected: {OTHER}\.qweight",
    ),
    "everything removed": (lambda c: [c.pop("group_size_pattern"), c.pop("bits_pattern")], "wrong shape"),
    "bits of a factor": (
        lambda c: c["bits_pattern"].update({f"{LAYER}.down": 3}),
        rf"wrong shape: {LAYER}\.down\.q(weight|zeros)",
    ),
    "group size of a factor": (
        lambda c: c["group_size_pattern"].update({f"{LAYER}.up": 32}),
        rf"wrong shape: {LAYER}\.up\.(scales|qzeros)",
    ),
    "group size of a factor that is not there": (
        lambda c: c["group_size_pattern"].update({f"{OTHER}.up": 32}),
        rf"group_size_pattern names '{OTHER}\.up', which LlamaForCausalLM does not have",
    ),
    "bits of a factor that is not there": (
        lambda c: c["bits_pattern"].update({f"{OTHER}.down": 8}),
        rf"bits_pattern names '{OTHER}\.down', which LlamaForCausalLM does not have",
    ),
    "everything wrong at once": (
        lambda c: [
            c["bits_pattern"].update({LAYER: 5, OTHER: "4", "model.layers.7.mlp.up_proj": 4}),
            c["group_size_pattern"].update({LAYER: 48, "lm_head": 32}),
        ],
        rf"(?s)bits_pattern\['{LAYER}'\] is 5; wanted one of 2, 3, 4, 8, 16; nearest: 4.*bits_pattern\['{OTHER}'\] is '4'.*"
        rf"group_size_pattern\['{LAYER}'\] is 48.*bits_pattern names 'model\.layers\.7\.mlp\.up_proj'.*"
        "group_size_pattern names 'lm_head', which LlamaForCausalLM does not have",
    ),
    "bits_pattern that is no mapping": (lambda c: c.update(bits_pattern=[8]), "bits_pattern is list"),
    "group_size_pattern that is no mapping": (lambda c: c.update(group_size_pattern=64), "group_size_pattern is int"),
}
ATTENTION = "model.layers.1.self_attn"
Q, K, V = (f"{ATTENTION}.{name}_proj" for name in "qkv")
FIRST = "model.layers.0.self_attn"
NOT_BESIDE = "wanted a grouped layer beside it with its inputs and rank"
GROUPED_DAMAGE: dict[str, tuple[Edit, type[LordError], str]] = {
    "leader that is not there": (
        lambda folder, bits: edit_config(folder, lambda c: c["group_pattern"].update({K: f"{ATTENTION}.p_proj"})),
        CheckpointError,
        rf"group_pattern does not fit together: {K}: '{ATTENTION}\.p_proj', {NOT_BESIDE}",
    ),
    "leader of another rank": (
        lambda folder, bits: edit_config(folder, lambda c: c["rank_pattern"].update({Q: 64})),
        CheckpointError,
        rf"{K}: '{Q}', {NOT_BESIDE}; {V}: '{Q}', ",
    ),
    "group of another rank": (
        lambda folder, bits: edit_config(folder, lambda c: c["rank_pattern"].update({Q: 64, K: 64, V: 64})),
        CheckpointError,
        rf"wrong shape: {Q}\.down\.",
    ),
    "rank above all outputs": (
        lambda folder, bits: edit_config(folder, lambda c: c["rank_pattern"].update({Q: 160, K: 160, V: 160})),
        RankError,
        f"{K}: rank 160, wanted 1 to 128; {Q}: rank 160",
    ),
    "leader in another block": (
        lambda folder, bits: edit_config(folder, lambda c: c["group_pattern"].update({K: f"{FIRST}.q_proj"})),
        CheckpointError,
        rf"{K}: '{FIRST}\.q_proj', {NOT_BESIDE}",
    ),
    "leader that is itself": (
        lambda folder, bits: edit_config(folder, lambda c: c["group_pattern"].update({K: K})),
        CheckpointError,
        f"{K}: '{K}', {NOT_BESIDE}",
    ),
    "leader that follows another": (
        lambda folder, bits: edit_config(folder, lambda c: c["group_pattern"].update({V: K})),
        CheckpointError,
        f"{V}: '{K}', {NOT_BESIDE}",
    ),
    "leader that is no name": (
        lambda folder, bits: edit_config(folder, lambda c: c["group_pattern"].update({K: [Q], V: {"a": 1}})),
        CheckpointError,
        rf"{K}: \['{Q}'\], {NOT_BESIDE}; {V}: {{'a': 1}}",
    ),
    "another leader": (
        lambda folder, bits: edit_config(
            folder, lambda c: [c["group_pattern"].pop(K), c["group_pattern"].update({Q: K, V: K})]
        ),
        CheckpointError,
        rf"(?s)missing: {K}\.down\..*unexpected: {Q}\.down\.",
    ),
    "group of one": (
        lambda folder, bits: edit_config(folder, lambda c: [c["group_pattern"].pop(K), c["group_pattern"].pop(V)]),
        CheckpointError,
        f"{K}: grouped with no other layer; {Q}: grouped with no other layer",
    ),
    "form changed": (
        lambda folder, bits: edit_config(folder, lambda c: c["form_pattern"].update({K: "pivoted"})),
        CheckpointError,
        f"{K}: '{Q}', {NOT_BESIDE}",
    ),
    "no groups": (
        lambda folder, bits: edit_config(folder, lambda c: [c.pop("group_pattern"), c.pop("form_pattern")]),
        CheckpointError,
        r"missing: .*_proj\.down\.",
    ),
    "group_pattern that is no mapping": (
        lambda folder, bits: edit_config(folder, lambda c: c.update(group_pattern=[[Q, K]])),
        CheckpointError,
        "group_pattern is list; wanted a mapping of path to group",
    ),
    "leader without down": (
        lambda folder, bits: edit_tensors(
            folder, lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{Q}.down.")]
        ),
        CheckpointError,
        rf"missing: {Q}\.down\.",
    ),
    "a member without up": (
        lambda folder, bits: edit_tensors(folder, lambda t: t.pop(f"{K}.up.{part(bits)}")),
        CheckpointError,
        rf"missing: {K}\.up\.",
    ),
    "a member with a down of its own": (
        lambda folder, bits: edit_tensors(
            folder, lambda t: t.update({f"{K}.down.{part(bits)}": t[f"{Q}.down.{part(bits)}"].clone()})
        ),
        CheckpointError,
        rf"unexpected: {K}\.down\.",
    ),
}
CASES = [(label, bits) for label in DAMAGE for bits in (4, 16)] + [(label, 4) for label in PACKED_DAMAGE]


@pytest.mark.parametrize(("label", "bits"), CASES)
def test_damage_is_named(label: str, bits: int, sound: dict[int, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    edit, error, message = (DAMAGE | PACKED_DAMAGE)[label]
    folder = shutil.copytree(sound[bits], tmp_path / "damaged")
    edit(folder, bits)
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 4.0}, "bits is 4.0; wanted one of 2, 3, 4, 8"),
        ({"format": "gptq_p"}, "format is 'gptq_p'; wanted one of gptq, gptq_v2"),
        (
            {"checkpoint_format": "gptq"},
            "format is 'gptq_v2' and checkpoint_format is 'gptq': the weights are in one of them",
        ),
    ],
)
def test_how_layers_are_packed_is_read_strictly(
    change: dict[str, Any], message: str, sound: dict[int, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(sound[4], tmp_path / "damaged")
    edit_config(folder, lambda values: values.update(change))
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(message)):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("label", PIVOTED_DAMAGE)
def test_damage_to_the_pivoted_form_is_named(label: str, sound_pivoted: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    edit, error, message = PIVOTED_DAMAGE[label]
    folder = shutil.copytree(sound_pivoted, tmp_path / "damaged")
    edit(folder, 16)
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("label", GROUPED_DAMAGE)
@pytest.mark.parametrize("bits", [4, 16])
def test_damage_to_groups_is_named(bits: int, label: str, sound_grouped: dict[int, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    edit, error, message = GROUPED_DAMAGE[label]
    folder = shutil.copytree(sound_grouped[bits], tmp_path / "damaged")
    edit(folder, bits)
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("label", MIXED_DAMAGE)
def test_damage_to_a_mixed_checkpoint_is_named(label: str, sound_mixed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    edit, message = MIXED_DAMAGE[label]
    folder = shutil.copytree(sound_mixed, tmp_path / "damaged")
    edit_config(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_layer_said_to_be_pivoted_that_is_not(sound: dict[int, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for bits, folder in sound.items():
        damaged = shutil.copytree(folder, tmp_path / str(bits))
        edit_config(damaged, lambda c: c.update(form_pattern={LAYER: "pivoted"}))
        with pytest.raises(CheckpointError, match=rf"(?s)missing: {LAYER}\.(order|down\.bias)"):
            AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("bits", [4, 16])
def test_sharded_checkpoints_load_and_a_lost_shard_is_named(bits: int, sound: dict[int, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sound[bits])
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(families.probe_logits(again), families.probe_logits(model))
    shards[1].unlink()
    with pytest.raises((LordError, OSError), match=shards[1].name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("bits", [4, 16])
def test_the_model_without_its_head_is_refused_by_name(bits: int, sound: dict[int, Path]) -> None:
    """It has other paths: the host would make up blocks, and nobody edited anything."""
    from transformers import AutoModel

    with pytest.raises(CheckpointError, match=r"LlamaModel is the model without its head.*wanted AutoModelForCausalLM"):
        AutoModel.from_pretrained(sound[bits])


def test_a_new_classification_head_is_allowed(sound: dict[int, Path]) -> None:
    """What transformers does for dense models: the blocks are the checkpoint's, the head is new."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    whole = AutoModelForCausalLM.from_pretrained(sound[16])
    classifier = AutoModelForSequenceClassification.from_pretrained(sound[16])
    theirs = whole.model.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in classifier.model.state_dict().items())
