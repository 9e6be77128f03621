# SPDX-License-Identifier: Apache-2.0
"""What was in memory when a checkpoint was saved is what a fresh process loads: bit for bit, with nobody's help.

The checkpoints are compressed here by the product's own steps, saved before their first forward pass, and loaded by
`load_fresh.py`, which knows transformers only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import families
import pytest
import torch


pytestmark = pytest.mark.slow

# label → (family, configuration overrides, settings of `families.compress`)
Variant = tuple[str, dict[str, Any], dict[str, Any]]
MATRIX: dict[str, Variant] = {
    f"{family}-{bits}": (family, {}, {"gptq": {"bits": bits}})
    for family in families.FAMILIES
    for bits in ((16, 8, 4) if family in ("gpt_bigcode", "llama") else (16, 4))  # 8 bits are packed as 4 are
}
DENSE: dict[str, Any] = {"rank_ratio": 1.0}
PIVOTED: dict[str, Any] = {"rank_ratio": 0.25, "form": "pivoted"}
COLUMNS: dict[str, Any] = {"rank_ratio": 0.25, "form": "column_pivoted"}
UP: dict[str, Any] = PIVOTED | {"targets": ["up_proj"]}
ROLES = {  # the input and the output of attention and MLP
    "gpt_bigcode": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "codegen": ("qkv_proj", "out_proj", "fc_in", "fc_out"),
    "llama": ("q_proj", "o_proj", "up_proj", "down_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}
OWN: list[tuple[int, int, int | None, str]] = [  # bits, group size, rank and form of each role, block by block
    (2, 32, None, "dense"),
    (3, 32, 32, "two_factor"),
    (4, 32, 96, "pivoted"),
    (8, 32, 32, "two_factor"),
    (2, 64, 64, "pivoted"),
    (3, 64, None, "dense"),
    (4, 64, 64, "column_pivoted"),
    (8, 64, 64, "pivoted"),
]


def mixed(family: str, **gptq: Any) -> Variant:
    """All bits, group sizes and forms in one checkpoint; layers without a role have those of the run."""
    own = dict(zip((f"*.{block}.*{role}" for block in (0, 1) for role in ROLES[family]), OWN, strict=True))
    packing = {
        "bits": 4,
        "bits_pattern": {name: bits for name, (bits, *_) in own.items()},
        "group_size_pattern": {name: size for name, (_, size, *_) in own.items()},
    }
    lowrank = {
        "rank_pattern": {name: rank for name, (_, _, rank, _) in own.items() if rank},
        "form_pattern": {name: form for name, (_, _, rank, form) in own.items() if rank},
    }
    return family, {}, {"gptq": packing | gptq, "lowrank": lowrank}


MIXED = {f"mixed-{family}": mixed(family) for family in ROLES} | {
    "mixed-desc_act-llama": mixed("llama", desc_act=True),
    "mixed-sym-gpt_bigcode": mixed("gpt_bigcode", sym=True),
}
FORMS: dict[str, Variant] = {  # every kind of layer at some bits; all at all bits would take minutes
    f"pivoted-{family}-{bits}": (family, {}, {"gptq": {"bits": bits}, "lowrank": PIVOTED | {"targets": [targets]}})
    for family in ("gpt_bigcode", "codegen", "llama", "gpt2")
    for bits, targets in ((16, "all"), (8, "attention"), (4, "mlp"))
} | {
    f"column_pivoted-{family}-{bits}": (family, {}, {"gptq": {"bits": bits}, "lowrank": COLUMNS | {"targets": [targets]}})
    for family in ("gpt_bigcode", "codegen", "llama", "gpt2")
    for bits, targets in ((16, "all"), (8, "attention"), (4, "mlp"))
}
GROUPED: dict[str, Any] = {"rank_ratio": 0.25, "form": "grouped"}
BOTH = {"bits": 4, "bits_pattern": {"attention.up": 3, "mlp.up": 8, "gate_proj.down": 2, "k_proj.up": 3}}
RANKS: dict[str, Any] = {"rank_pattern": {"mlp": 96, "attention": 32}}
SIZES = {"all": 64, "all.up": 32}
"""`down` in larger groups than `up`, whose ranks are no multiples of the former."""
GROUPS: dict[str, Variant] = {
    f"grouped-{family}-{label}": (family, {}, {"gptq": gptq, "lowrank": GROUPED})
    for family in ("llama", "qwen2")
    for label, gptq in (("16", {"bits": 16}), ("8", {"bits": 8}), ("4", {"bits": 4}), ("both", BOTH))
} | {
    "grouped-no_mean-qwen2-4": ("qwen2", {}, {"gptq": {"bits": 4}, "lowrank": GROUPED | {"mean_correction": False}}),
    "grouped-two-llama-4": ("llama", {}, {"gptq": {"bits": 4}, "lowrank": GROUPED | {"ignore": ["k_proj", "*.1.mlp.*"]}}),
    "grouped-bf16-llama-4": ("llama", {}, {"gptq": {"bits": 4}, "lowrank": GROUPED, "dtype": "bfloat16"}),
    "grouped-desc_act-sym-llama-4": ("llama", {}, {"gptq": {"bits": 4, "desc_act": True, "sym": True}, "lowrank": GROUPED}),
    "both-gpt_bigcode": ("gpt_bigcode", {}, {"gptq": {"bits": 4, "bits_pattern": {"all.up": 3, "c_fc.down": 8}}}),
    "sizes-gpt_bigcode": ("gpt_bigcode", {}, {"gptq": {"bits": 4, "group_size_pattern": SIZES}, "lowrank": RANKS}),
    "sizes-llama": ("llama", {}, {"gptq": {"bits": 3, "group_size_pattern": SIZES}, "lowrank": RANKS}),
    "sizes-grouped-qwen2": (
        "qwen2",
        {},
        {"gptq": {"bits": 4, "group_size_pattern": SIZES}, "lowrank": RANKS | {"form": "grouped"}},
    ),
    "both-pivoted-llama": ("llama", {}, {"gptq": {"bits": 4, "bits_pattern": {"all.down": 8}}, "lowrank": UP}),
}
VARIANTS: dict[str, Variant] = {
    "bf16-llama-16": ("llama", {}, {"gptq": {"bits": 16}, "dtype": "bfloat16"}),
    "bf16-llama-4": ("llama", {}, {"gptq": {"bits": 4}, "dtype": "bfloat16"}),
    "bf16-gpt_bigcode-8": ("gpt_bigcode", {}, {"gptq": {"bits": 8}, "dtype": "bfloat16"}),
    "bf16-gpt_bigcode-4": ("gpt_bigcode", {}, {"gptq": {"bits": 4}, "dtype": "bfloat16"}),
    "fp16-codegen-4": ("codegen", {}, {"gptq": {"bits": 4}, "dtype": "float16"}),
    "desc_act-llama-4": ("llama", {}, {"gptq": {"bits": 4, "desc_act": True}}),
    "sym-llama-4": ("llama", {}, {"gptq": {"bits": 4, "sym": True}}),
    "sym-gpt_bigcode-8": ("gpt_bigcode", {}, {"gptq": {"bits": 8, "sym": True}}),
    "sym-desc_act-codegen-4": ("codegen", {}, {"gptq": {"bits": 4, "sym": True, "desc_act": True}}),
    "naive-llama-4": ("llama", {}, {"gptq": {"bits": 4}, "stack": "naive"}),
    "naive-gpt_bigcode-16": ("gpt_bigcode", {}, {"gptq": {"bits": 16}, "stack": "naive"}),
    "naive-sym-gpt_bigcode-8": ("gpt_bigcode", {}, {"gptq": {"bits": 8, "sym": True, "mse": 0.0}, "stack": "naive"}),
    "naive-pivoted-gpt2-4": ("gpt2", {}, {"gptq": {"bits": 4}, "lowrank": PIVOTED, "stack": "naive"}),
    "naive-column_pivoted-llama-4": ("llama", {}, {"gptq": {"bits": 4}, "lowrank": COLUMNS, "stack": "naive"}),
    "desc_act-column_pivoted-llama-4": ("llama", {}, {"gptq": {"bits": 4, "desc_act": True}, "lowrank": COLUMNS}),
    "no_mean-column_pivoted-llama-4": ("llama", {}, {"gptq": {"bits": 4}, "lowrank": COLUMNS | {"mean_correction": False}}),
    "desc_act-pivoted-llama-4": ("llama", {}, {"gptq": {"bits": 4, "desc_act": True}, "lowrank": UP}),
    "bf16-pivoted-llama-4": ("llama", {}, {"gptq": {"bits": 4}, "lowrank": UP, "dtype": "bfloat16"}),
    "no_mean-pivoted-llama-4": ("llama", {}, {"gptq": {"bits": 4}, "lowrank": UP | {"mean_correction": False}}),
    "full_rank-pivoted-llama-4": (
        "llama",
        {},
        {"gptq": {"bits": 4}, "lowrank": UP | {"rank_ratio": 0.999, "force_rank": True}},
    ),
    "no_ideas-llama-4": (
        "llama",
        {},
        {
            "gptq": {"bits": 4, "true_sequential": False},
            "joint": {"anchor": False, "rotate": False, "refit": False, "deflate": False, "refine": 0},
        },
    ),
    "gptq_only-gpt_bigcode-8": ("gpt_bigcode", {}, {"gptq": {"bits": 8}, "lowrank": DENSE}),
    "gptq_only-gpt_bigcode-4": ("gpt_bigcode", {}, {"gptq": {"bits": 4}, "lowrank": DENSE}),
    "gptq_only-ctrl-4": ("ctrl", {}, {"gptq": {"bits": 4}, "lowrank": DENSE}),
    "naive-gptq_only-ctrl-8": ("ctrl", {}, {"gptq": {"bits": 8}, "lowrank": DENSE, "stack": "naive"}),
    "gptq_only-gpt2-8": ("gpt2", {}, {"gptq": {"bits": 8}, "lowrank": DENSE}),
    "gptq_only-gpt2-4": ("gpt2", {}, {"gptq": {"bits": 4}, "lowrank": DENSE}),
    "bits3-llama": ("llama", {}, {"gptq": {"bits": 3}}),
    "bits2-gpt_bigcode": ("gpt_bigcode", {}, {"gptq": {"bits": 2}}),
    "tied-llama-4": ("llama", {"tie_word_embeddings": True}, {"gptq": {"bits": 4}}),
    "tied-llama-16": ("llama", {"tie_word_embeddings": True}, {"gptq": {"bits": 16}}),
    "untied-gpt_bigcode-4": ("gpt_bigcode", {"tie_word_embeddings": False}, {"gptq": {"bits": 4}}),
    "mlp-llama-4": ("llama", {}, {"gptq": {"bits": 4}, "lowrank": {"rank_ratio": 0.5, "targets": ["mlp"]}}),
    "mlp-gpt2-16": ("gpt2", {}, {"gptq": {"bits": 16}, "lowrank": {"rank_ratio": 0.5, "targets": ["mlp"]}}),
    "one_layer-codegen-8": (
        "codegen",
        {},
        {"gptq": {"bits": 8}, "lowrank": {"rank_pattern": {"transformer.h.1.mlp.fc_in": 96, "h.0.attn.out_proj": 32}}},
    ),
    "no_mean-llama-4": ("llama", {}, {"gptq": {"bits": 4}, "lowrank": {"rank_ratio": 0.25, "mean_correction": False}}),
    "no_bias-starcoder2-4": ("starcoder2", {"use_bias": False}, {"gptq": {"bits": 4}}),
    "g64-llama-4": ("llama", {}, {"gptq": {"bits": 4, "group_size": 64}, "lowrank": {"rank_ratio": 0.5}}),
}
EVERY = MATRIX | FORMS | MIXED | GROUPS | VARIANTS
RESAVED = (
    "llama-4",
    "gpt_bigcode-8",
    "gpt2-16",
    "tied-llama-4",
    "bf16-llama-4",
    "pivoted-llama-4",
    "pivoted-gpt2-16",
    "mixed-llama",
    "grouped-llama-16",
    "grouped-llama-both",
)


class Checkpoint(NamedTuple):
    """One compressed folder, the plan it was made by and the logits its model gave in memory."""

    folder: Path
    plan: Any
    logits: torch.Tensor


@pytest.fixture(scope="module")
def checkpoints(
    model_folder: Callable[..., Path], corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for label, (family, overrides, settings) in EVERY.items():
        plan, logits = families.compress(
            model_folder(family, **overrides), root / label, corpus_file, calibration={"num_samples": 2}, **settings
        )
        made[label] = Checkpoint(root / label, plan, logits)
    return made


@pytest.fixture(scope="module")
def reloaded(checkpoints: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folders = [checkpoint.folder for checkpoint in checkpoints.values()]
    results, process = families.load_fresh(tmp_path_factory.mktemp("reloaded") / "results.pt", *folders)
    assert process.stdout == ""
    assert "could not register" not in process.stderr
    return results


@pytest.fixture(scope="module")
def resaved(checkpoints: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Loads, saves before any forward pass (here), and loads again (in a fresh process)."""
    from transformers import AutoModelForCausalLM

    folders = [f"{checkpoints[label].folder}.again" for label in RESAVED]
    for folder in folders:
        AutoModelForCausalLM.from_pretrained(folder.removesuffix(".again")).save_pretrained(folder)
    return families.load_fresh(tmp_path_factory.mktemp("resaved") / "results.pt", *folders)[0]


@pytest.mark.parametrize("label", EVERY)
def test_a_fresh_process_loads_equal_logits(
    label: str, checkpoints: dict[str, Checkpoint], reloaded: dict[str, Any]
) -> None:
    checkpoint = checkpoints[label]
    result = reloaded[str(checkpoint.folder)]
    families.require_equal(result, checkpoint.logits)
    assert not result["training"]
    assert bool(result["packed"]) == (checkpoint.plan.bits != 16)


def test_loading_imported_the_package_by_itself(reloaded: dict[str, Any]) -> None:
    assert "import lord_quant" not in families.LOADER.read_text() and "from lord_quant" not in families.LOADER.read_text()
    assert "lord_quant.integrations.transformers" in reloaded["modules"]


@pytest.mark.parametrize("label", EVERY)
def test_predicted_bytes_are_the_bytes_in_the_files(label: str, checkpoints: dict[str, Checkpoint]) -> None:
    from lord_quant.artifact.stored import measure
    from lord_quant.files.headers import read_headers, weight_files

    folder, plan, _ = checkpoints[label]
    on_disk = sum(size for _, _, size in read_headers(weight_files(folder)).values())
    assert plan.tensor_bytes == on_disk
    stored = measure(folder)
    assert stored.tensor_bytes == on_disk
    assert stored.bpw == pytest.approx(plan.bpw, rel=1e-12)
    assert {layer.site.name: layer.rank for layer in stored.layers if layer.rank} == plan.rank_pattern
    forms = {layer.site.name: layer.form.removesuffix(" packed") for layer in stored.layers}
    assert forms == {layer.name: layer.form if layer.rank else "dense" for layer in plan.layers}
    packings, wanted = (
        {name: (each.bits, each.group_size, each.up_bits, each.up_group_size) for name, each in layers.items()}
        for layers in ({each.site.name: each for each in stored.layers}, {each.name: each for each in plan.layers})
    )
    floats = {layer.name: (None,) * 4 for layer in plan.layers if not layer.packed}
    assert packings == wanted | floats
    assert {layer.site.name: layer.leader for layer in stored.layers} == {layer.name: layer.leader for layer in plan.layers}
    assert sum(layer.weight_bytes + layer.bias_bytes for layer in stored.layers) == on_disk - plan.other_bytes


@pytest.mark.parametrize("label", MIXED)
def test_a_mixed_checkpoint_has_every_kind_of_layer(label: str, checkpoints: dict[str, Checkpoint]) -> None:
    kinds = {
        (own.bits, own.group_size, own.rank, own.form if own.rank else "dense") for own in checkpoints[label].plan.layers
    }
    assert set(OWN) <= kinds
    values = json.loads((checkpoints[label].folder / "config.json").read_text())["quantization_config"]
    assert values["format_version"] == 6 and (values["bits"], values["group_size"]) == (4, 32)


@pytest.mark.parametrize("label", [label for label in GROUPS if label.startswith("grouped")])
def test_a_grouped_checkpoint_stores_down_once(label: str, checkpoints: dict[str, Checkpoint]) -> None:
    folder, plan, _ = checkpoints[label]
    holders = {name.partition(".down.")[0] for name in families.stored_tensors(folder) if ".down." in name}
    assert holders == {layer.name for layer in plan.layers if layer.rank and layer.leader in ("", layer.name)}
    assert len(plan.group_pattern) >= 3 and not holders & plan.group_pattern.keys()


@pytest.mark.parametrize("label", RESAVED)
def test_a_loaded_model_saves_and_loads_again(
    label: str, checkpoints: dict[str, Checkpoint], resaved: dict[str, Any]
) -> None:
    families.require_equal(resaved[f"{checkpoints[label].folder}.again"], checkpoints[label].logits)


def test_configurations_say_nothing_private(checkpoints: dict[str, Checkpoint], resaved: dict[str, Any]) -> None:
    """Neither calibration text nor a path of this machine, and no claim about settings that were not used."""
    for checkpoint in checkpoints.values():
        for path in (checkpoint.folder / "config.json", Path(f"{checkpoint.folder}.again") / "config.json"):
            if path.exists():
                text = path.read_text()
                assert "corpus" not in text and str(checkpoint.folder.parent) not in text and "/tmp" not in text
                values = json.loads(text)["quantization_config"]
                assert not values.get("dataset"), "the calibration set is in the report; here it would be a guess"
                assert not values.get("tokenizer")
                assert values["rank_pattern"] == checkpoint.plan.rank_pattern
                for name in ("form_pattern", "group_pattern", "bits_pattern", "group_size_pattern"):
                    assert values.get(name, {}) == getattr(checkpoint.plan, name)
                newest = checkpoint.plan.mixed or checkpoint.plan.group_pattern
                apart = any(one.rank and one.group_size != one.up_group_size for one in checkpoint.plan.layers)
                columns = "column_pivoted" in checkpoint.plan.form_pattern.values()
                parts = checkpoint.plan.bits != 16 and not all(one.packed for one in checkpoint.plan.layers)
                oldest = 5 if apart and checkpoint.plan.bits != 16 else 4 if parts else 3 if newest else 2
                assert values["format_version"] == (6 if columns else oldest)
