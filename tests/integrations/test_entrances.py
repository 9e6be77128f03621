# SPDX-License-Identifier: Apache-2.0
"""The three ways into the engine give the same tensors: the pipeline, `LordGPTQQuantizer`, and `from_pretrained`.

And the passes are what they claim to be: on a decomposed model, Optimum's own `GPTQQuantizer` gives the same bits.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import families
import pytest
import torch

from lord_quant.errors import ConfigError, ModelError, OutputError
from lord_quant.files.claim import claimed


# label → (family, bits, settings by section)
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama": ("llama", 4, {}),
    "gpt2": ("gpt2", 8, {}),
    "gpt_bigcode": ("gpt_bigcode", 4, {}),
    "pivoted": (
        "codegen",
        4,
        {
            "lowrank": {"form": "pivoted", "targets": ["mlp"]},
            "gptq": {"mse": 0.0, "sym": True},
            "joint": {"order": "down_first", "anchor": False, "refine": 1},
        },
    ),
    "mixed": (
        "gpt2",
        4,
        {
            "lowrank": {"form_pattern": {"h.1.mlp.c_fc": "pivoted"}},
            "gptq": {"bits_pattern": {"mlp": 8, "h.1.mlp.c_fc": 3}, "group_size_pattern": {"attn.c_attn": 64}},
        },
    ),
    "grouped": ("qwen2", 4, {"lowrank": {"form": "grouped"}, "gptq": {"bits_pattern": {"attention.up": 3, "mlp.down": 8}}}),
    "naive": ("llama", 4, {"gptq": {"sym": True, "damp_percent": 0.1, "mse": 2.4}, "stack": "naive"}),
}
SETTINGS: dict[str, Any] = {"num_samples": 4, "group_size": 32, "rank_ratio": 0.25}


def dense(folder: Path, **arguments: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


class Saved(NamedTuple):
    """A model that was compressed, saved, and only then run."""

    folder: Path
    logits: torch.Tensor
    model: Any


class Entrances:
    """Compresses tiny models through every entrance and checks all of them in one fresh process."""

    def __init__(self, model_folder: Callable[..., Path], corpus: Path, root: Path) -> None:
        from lord_quant import LordGPTQConfig, LordGPTQQuantizer

        self.saved: dict[str, Saved] = {}
        self.quantizers: dict[str, Any] = {}
        self.root, self.corpus, self.model_folder = root, corpus, model_folder
        for label, (family, bits, sections) in RUNS.items():
            folder = model_folder(family)
            lowrank = {"rank_ratio": 0.25} | sections.get("lowrank", {})
            gptq, joint = {"bits": bits} | sections.get("gptq", {}), sections.get("joint", {})
            run = {"stack": sections.get("stack", "joint")}
            output = root / f"pipeline-{label}"
            families.compress(folder, output, corpus, lowrank=lowrank, gptq=gptq, joint=joint, **run)
            flat = SETTINGS | lowrank | gptq | run
            config = LordGPTQConfig(dataset=str(corpus), seq_len=64, **flat, **joint)
            model = dense(folder, quantization_config=config)
            model.save_pretrained(root / f"fly-{label}")
            self.keep(f"fly-{label}", model)
            quantizer = LordGPTQQuantizer(dataset=str(corpus), model_seqlen=64, joint=joint, **flat)
            model = quantizer.quantize_model(dense(folder), str(folder))
            quantizer.save(model, str(root / f"dropin-{label}"), verify=False)
            self.keep(f"dropin-{label}", model)
            self.quantizers[label] = quantizer
        # Explicit ranks and another dtype: the model computes, and is compressed, in bfloat16.
        settings = {"rank_pattern": {"mlp.up_proj": 64}, "dataset": str(corpus), "num_samples": 4, "seq_len": 64}
        config = LordGPTQConfig(4, group_size=32, **settings)
        model = dense(model_folder("qwen2"), quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(root / "explicit-qwen2")
        self.keep("explicit-qwen2", model)
        self.datasets()
        self.reloaded, _ = families.load_fresh(root / "results.pt", *(saved.folder for saved in self.saved.values()))

    def keep(self, label: str, model: Any) -> None:
        self.saved[label] = Saved(self.root / label, families.probe_logits(model), model)

    def datasets(self) -> None:
        """Runs the drop-in on each kind of dataset that Optimum's class takes."""
        from transformers import AutoTokenizer

        from lord_quant import LordGPTQQuantizer

        folder = self.model_folder("llama")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [json.loads(line)["text"] for line in self.corpus.read_text().splitlines()]
        rows = torch.tensor(tokenizer(texts[0])["input_ids"])[: 4 * 64].view(4, 64)
        samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
        lists = [{"input_ids": row.tolist(), "attention_mask": [1] * 64} for row in rows]
        for label, dataset in (("texts", texts), ("samples", samples), ("lists", lists), ("stdlib", "python-stdlib")):
            quantizer = LordGPTQQuantizer(4, dataset, model_seqlen=64, **SETTINGS)
            model = quantizer.quantize_model(dense(folder), tokenizer)
            quantizer.save(model, str(self.root / f"dataset-{label}"), verify=False)
            self.keep(f"dataset-{label}", model)


@pytest.fixture(scope="module")
def entrances(model_folder: Callable[..., Path], corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Entrances:
    return Entrances(model_folder, corpus_file, tmp_path_factory.mktemp("entrances"))


SAVED = [f"{way}-{label}" for way in ("fly", "dropin") for label in RUNS]
DATASETS = [f"dataset-{kind}" for kind in ("texts", "samples", "lists", "stdlib")]


@pytest.mark.slow
@pytest.mark.parametrize("label", [*SAVED, *DATASETS, "explicit-qwen2"])
def test_a_fresh_process_loads_equal_logits(label: str, entrances: Entrances) -> None:
    saved = entrances.saved[label]
    families.require_equal(entrances.reloaded[str(saved.folder)], saved.logits)


@pytest.mark.slow
@pytest.mark.parametrize("label", SAVED)
def test_every_entrance_gives_the_pipelines_tensors(label: str, entrances: Entrances) -> None:
    pipeline = entrances.root / f"pipeline-{label.partition('-')[2]}"
    assert families.different_tensors(pipeline, entrances.saved[label].folder) == []
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (pipeline, entrances.saved[label].folder))
    ignored = ("backend", "batch_size", "cache_block_outputs", "checkpoint_format")  # added by the host's class
    kept = {key: value for key, value in other.pop("quantization_config").items() if key not in ignored}
    assert kept == one.pop("quantization_config")
    assert one == other


@pytest.mark.slow
def test_saving_is_refused_while_another_writes(entrances: Entrances, tmp_path: Path) -> None:
    label = next(iter(RUNS))
    with claimed(tmp_path / "out"), pytest.raises(OutputError, match=r"another run is writing .*out'"):
        entrances.quantizers[label].save(entrances.saved[f"dropin-{label}"].model, str(tmp_path / "out"), verify=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_only_the_model_that_was_quantized_last_is_saved_with_its_report(entrances: Entrances, tmp_path: Path) -> None:
    label = next(iter(RUNS))
    with pytest.raises(ConfigError, match="the model is not the one that was quantized last"):
        entrances.quantizers[label].save(families.build("llama"), str(tmp_path / "out"), verify=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tokens_given_as_tensors_and_as_lists_are_the_same_tokens(entrances: Entrances) -> None:
    folders = [entrances.saved[f"dataset-{kind}"].folder for kind in ("samples", "lists", "texts")]
    assert families.different_tensors(*folders[:2]) == []
    assert families.different_tensors(*folders[1:]) != []


@pytest.mark.slow
def test_explicit_ranks_reach_the_checkpoint(entrances: Entrances) -> None:
    values = json.loads((entrances.saved["explicit-qwen2"].folder / "config.json").read_text())
    assert values["quantization_config"]["rank_pattern"] == {f"model.layers.{i}.mlp.up_proj": 64 for i in (0, 1)}
    assert values["dtype"] == "bfloat16" and entrances.saved["explicit-qwen2"].logits.dtype == torch.bfloat16


@pytest.mark.slow
def test_nothing_private_is_published(entrances: Entrances) -> None:
    for saved in entrances.saved.values():
        for path in saved.folder.glob("*.json"):
            text = path.read_text()
            assert str(entrances.root) not in text and "textwrap" not in text
            assert "corpus" not in text or path.name == "lord_report.json"  # which names the file, without its folder
        assert not json.loads((saved.folder / "config.json").read_text())["quantization_config"].get("dataset")


@pytest.mark.slow
def test_the_drop_in_saves_a_folder_that_stands_alone(entrances: Entrances) -> None:
    folder = entrances.saved["dataset-texts"].folder
    assert {"tokenizer.json", "README.md", "lord_report.json", "config.json"} <= {path.name for path in folder.iterdir()}
    report = json.loads((folder / "lord_report.json").read_text())
    assert report["calibration"]["source"] == report["config"]["calibration"]["dataset"] == "texts given by the caller"
    assert report["totals"]["tensor_bytes"] == report["totals"]["tensor_bytes_on_disk"]


@pytest.mark.slow
def test_the_quantizer_keeps_its_records_and_what_it_was_given(entrances: Entrances) -> None:
    quantizer = entrances.quantizers["llama"]
    assert len(quantizer.decomposed) == 14 and len(quantizer.quantized) == 28
    for record in quantizer.decomposed:
        assert 0 <= record.rel_output_error <= 1 and record.num_tokens == 4 * 64
        assert 0 < record.rel_stacked_error <= 1 and record.largest_coefficient is None
    layers = entrances.quantizers["pivoted"].decomposed
    assert len(layers) == 8 and sum(record.rank is not None for record in layers) == 4
    assert all((record.largest_coefficient is not None) == (record.rank is not None) for record in layers)
    assert {type(record).__name__ for record in entrances.quantizers["naive"].decomposed} == {"DecompositionRecord"}
    assert quantizer.dataset == str(entrances.corpus)


@pytest.mark.slow
@pytest.mark.parametrize("label", [label for label in SAVED if label.startswith(("fly", "dropin"))])
def test_a_packed_model_knows_that_it_is(label: str, entrances: Entrances) -> None:
    """As Optimum's class leaves it: transformers refuses to cast it, Trainer and peft treat it as packed."""
    model = entrances.saved[label].model
    assert getattr(model, "is_quantized", False) and getattr(model, "quantization_method", None) == "gptq"
    with pytest.raises(ValueError, match=r"half.* is not supported for quantized model"):
        model.half()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "form", "settings"),
    [
        ("llama", "two_factor", {"bits": 4, "sym": True}),
        ("gpt2", "two_factor", {"bits": 8, "sym": True}),
        ("codegen", "pivoted", {"bits": 4, "sym": False, "mse": 2.0}),
    ],
)
def test_optimum_alone_gives_the_same_bits_on_the_decomposed_model(
    family: str,
    form: str,
    settings: dict[str, Any],
    model_folder: Callable[..., Path],
    corpus_file: Path,
    tmp_path: Path,
) -> None:
    """Decompose with us, quantize with plain Optimum: what a naive run stores is the unmodified quantizer's work."""
    from optimum.gptq import GPTQQuantizer

    from lord_quant.blocks.source import own_memory
    from lord_quant.config import LordConfig
    from lord_quant.engine import decompose_model
    from lord_quant.runs.pipeline import prepare

    gptq = {"damp_percent": 0.1, "mse": 0.0} | settings  # Optimum's defaults
    lowrank = {"rank_ratio": 0.25, "form": form}
    families.compress(model_folder(family), tmp_path / "ours", corpus_file, gptq=gptq, lowrank=lowrank, stack="naive")
    config = LordConfig.from_dict(
        {
            "model": str(model_folder(family)),
            "lowrank": lowrank,
            "gptq": {"group_size": 32, **gptq},
            "calibration": {"dataset": str(corpus_file), "num_samples": 4, "seq_len": 64},
        }
    )
    job = prepare(config)
    model = dense(model_folder(family))
    own_memory(model)
    decompose_model(model, job.plan, job.windows.batches(8))
    samples = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in job.windows.input_ids]
    quantizer = GPTQQuantizer(settings["bits"], samples, group_size=32, sym=settings["sym"])
    quantizer.quantizeConfig.mse = gptq["mse"]
    quantizer.quantize_model(model)
    theirs, ours = model.state_dict(), families.stored_tensors(tmp_path / "ours")
    packed = [name for name in theirs if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx", "bias")]
    assert sum(name.endswith("qweight") for name in packed) == sum(len(layer.factor_shapes()) for layer in job.plan.layers)
    assert [name for name in packed if not torch.equal(theirs[name], ours[name])] == []


def test_the_drop_in_takes_what_optimums_class_takes() -> None:
    from optimum.gptq import GPTQQuantizer

    from lord_quant import LordGPTQQuantizer

    assert issubclass(LordGPTQQuantizer, GPTQQuantizer)
    host = inspect.signature(GPTQQuantizer.__init__).parameters
    names = [name for name in host if name not in ("self", "args", "kwargs", "modules_in_block_to_quantize")]
    values: dict[str, Any] = {
        "bits": 8,
        "dataset": ["text"],
        "group_size": 64,
        "damp_percent": 0.2,
        "desc_act": True,
        "act_group_aware": False,
        "sym": False,
        "true_sequential": False,
        "model_seqlen": 77,
        "block_name_to_quantize": "model.layers",
        "module_name_preceding_first_block": ["model.embed_tokens"],
        "batch_size": 2,
        "pad_token_id": 3,
        "cache_block_outputs": False,
        "format": "gptq_v2",
        "meta": {"a": 1},
        "backend": "gptq_torch",
    }
    assert set(values) == set(names), "Optimum's signature changed"
    by_name = LordGPTQQuantizer(**values, rank_ratio=0.5)
    positional = [values.get(name) for name in host if name not in ("self", "args", "kwargs")]
    by_position = LordGPTQQuantizer(*positional, rank_ratio=0.5)
    plain = GPTQQuantizer(**values)
    for name in names:
        assert getattr(by_name, name) == getattr(by_position, name) == getattr(plain, name) == values[name], name
    assert by_name.lord_config == by_position.lord_config
    assert by_name.lord_config.gptq.damp_percent == 0.2 and by_name.lord_config.gptq.desc_act
    with pytest.raises(ConfigError, match=r"targts.*did you mean 'targets'"):
        LordGPTQQuantizer(4, rank_ratio=0.5, targts=["mlp"])
    with pytest.raises(ConfigError, match="modules_in_block_to_quantize"):
        LordGPTQQuantizer(4, rank_ratio=0.5, modules_in_block_to_quantize=[["self_attn.q_proj"]])
    with pytest.raises(ConfigError, match="no rank is chosen"):
        LordGPTQQuantizer(4)
    with pytest.raises(ConfigError, match=r"section 'joint'(?s:.)*'rotation'.*did you mean 'rotate'"):
        LordGPTQQuantizer(4, rank_ratio=0.5, joint={"rotation": False})
    with pytest.raises(ConfigError, match=r"form is 'pivot'.*did you mean 'pivoted'"):
        LordGPTQQuantizer(4, rank_ratio=0.5, form="pivot")
    with pytest.raises(ConfigError, match="the naive stack packs all layers alike; wanted --stack joint"):
        LordGPTQQuantizer(4, rank_ratio=0.5, stack="naive", group_size_pattern={"mlp": 32})
    with pytest.raises(ConfigError, match="the naive stack decomposes every layer alone; wanted --stack joint"):
        LordGPTQQuantizer(4, rank_ratio=0.5, stack="naive", form="grouped")
    ideas = LordGPTQQuantizer(4, rank_ratio=0.5, form="pivoted", joint={"order": "up_first"}, mse=2.4).lord_config
    assert (ideas.lowrank.form, ideas.joint.order, ideas.joint.refit, ideas.gptq.mse) == ("pivoted", "up_first", True, 2.4)
    for name in ("quantize_model", "save"):
        theirs = inspect.signature(getattr(GPTQQuantizer, name)).parameters
        ours = inspect.signature(getattr(LordGPTQQuantizer, name)).parameters
        assert [key for key in theirs if key not in ours and "kwargs" not in ours] == []


BAD_DATA = {
    "no tokenizer": (["some text"], None, "no tokenizer was given"),
    "no texts": ([], "tokenizer", "dataset is empty"),
    "blank texts": ([" ", "\n"], "tokenizer", "dataset is empty"),
    "too little text": (["x = 1"], "tokenizer", "wanted"),
    "ragged": ([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}], None, "differ in length"),
    "padded": ([{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}], None, "padded"),
    "too long": ([{"input_ids": [1] * 300, "attention_mask": [1] * 300}], None, "300.*context.*256"),
    "outside the vocabulary": (
        [{"input_ids": [1, 5000], "attention_mask": [1, 1]}],
        None,
        "token 5000; the model knows 0 to 4095",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_datasets_are_refused_before_the_model_is_touched(case: str, model_folder: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    from lord_quant import LordGPTQQuantizer
    from lord_quant.errors import CalibrationError

    dataset, tokenizer, message = BAD_DATA[case]
    folder = model_folder("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder) if tokenizer else None
    model = dense(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=message):
        LordGPTQQuantizer(4, dataset, model_seqlen=64, **SETTINGS).quantize_model(model, tokenizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 5, "rank_ratio": 0.5}, "bits.*5"),
    "group size": ({"group_size": 48, "rank_ratio": 0.5}, "group_size is 48.*nearest"),
    "ratio": ({"rank_ratio": 1.5}, r"rank_ratio is 1\.5; wanted a number in \(0, 1\]"),
    "both ratios": ({"rank_ratio": 0.5, "param_ratio": 0.5}, "rank_ratio and param_ratio are both given"),
    "damping": ({"rank_ratio": 0.5, "damp_percent": 10}, "damp_percent"),
    "stack": ({"rank_ratio": 0.5, "stack": "naiv"}, "did you mean 'naive'"),
    "form": ({"rank_ratio": 0.5, "form": "pivot"}, "form is 'pivot'; wanted one of .*did you mean 'pivoted'"),
    "bits pattern": ({"rank_ratio": 0.5, "bits_pattern": {"mlp": 5}}, r"bits_pattern\['mlp'\] is 5; .*nearest: 4"),
    "group sizes": (
        {"rank_ratio": 0.5, "group_size_pattern": {"mlp": 1}},
        r"group_size_pattern\['mlp'\] is 1; .*nearest: 32",
    ),
    "form pattern": ({"rank_ratio": 0.5, "form_pattern": {"mlp": "dense"}}, r"form_pattern\['mlp'\] is 'dense'; wanted"),
    "naive mixture": (
        {"rank_ratio": 0.5, "stack": "naive", "bits_pattern": {"mlp": 8}},
        "bits_pattern given: the naive stack packs all layers alike; wanted --stack joint",
    ),
    "order": ({"rank_ratio": 0.5, "order": "down"}, "order is 'down'; wanted one of auto, "),
    "sweeps": ({"rank_ratio": 0.5, "refine": -1}, "refine is -1"),
    "switch": ({"rank_ratio": 0.5, "deflate": 1}, "deflate is 1; wanted true or false"),
    "mse": ({"rank_ratio": 0.5, "mse": -1}, "mse is -1"),
    "unknown key": ({"rank_ratios": 0.5}, "'rank_ratios'; did you mean 'rank_ratio'"),
    "samples": ({"rank_ratio": 0.5, "num_samples": 0}, "num_samples is 0"),
    "dataset": ({"rank_ratio": 0.5, "dataset": ["text"]}, "dataset is"),
    "newer format": ({"format_version": 99}, "format_version 99"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_settings_are_refused_when_they_are_made(case: str) -> None:
    from lord_quant import LordGPTQConfig
    from lord_quant.errors import ConfigError, FormatVersionError

    arguments, message = BAD_CONFIGS[case]
    with pytest.raises((ConfigError, FormatVersionError), match=message):
        LordGPTQConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "no rank is chosen"), ({"rank_pattern": {"mlp.up_proj": 0}}, r"rank_pattern\['mlp.up_proj'\] is 0")],
)
def test_settings_of_a_run_are_checked_before_weights_are_read(
    arguments: dict[str, Any], message: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """A model folder without weights shows it: the refusal names the setting, not the missing file."""
    import shutil

    from lord_quant import LordGPTQConfig
    from lord_quant.errors import LordError

    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    with pytest.raises(LordError, match=message):
        dense(folder, quantization_config=LordGPTQConfig(4, **arguments))


def test_groups_cannot_be_given_to_a_run() -> None:
    """They are what a checkpoint records; a run makes its own."""
    from lord_quant import LordGPTQConfig

    with pytest.raises(ConfigError, match=r"not supported while compressing: group_pattern=\{'a': 'b'\}"):
        LordGPTQConfig(4, rank_ratio=0.5, form="grouped", group_pattern={"a": "b"})
    assert LordGPTQConfig(4, rank_ratio=0.5, form="grouped").to_lord_config("m").lowrank.form == "grouped"


@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
def test_a_model_that_predicts_no_tokens_is_refused_before_work(
    head: str, model_folder: Callable[..., Path], corpus_file: Path
) -> None:
    """The joint stack minds the loss of the next token."""
    import transformers

    from lord_quant import LordGPTQConfig

    config = LordGPTQConfig(bits=4, rank_ratio=0.5, group_size=32, dataset=str(corpus_file), num_samples=2, seq_len=32)
    with pytest.raises(ModelError, match="which predicts no tokens; wanted it as AutoModelForCausalLM"):
        getattr(transformers, head).from_pretrained(model_folder("llama"), quantization_config=config)
