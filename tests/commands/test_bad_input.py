# SPDX-License-Identifier: Apache-2.0
"""Bad input to `quantize`: its error's exit code, one message that says what, where, found and wanted, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import edit_tensors
from in_process import Box, exit_code_of, run_command, write_file

from lord_quant.errors import ConfigError, ModelError


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


def config_only(box: Box, **values: Any) -> None:
    folder = box.root / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    families.copy_tokenizer(folder)
    box.flags["--model"] = folder


def bin_only(box: Box) -> None:
    folder = box.copy()
    torch.save(families.stored_tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded_and_incomplete(box: Box) -> None:
    folder = box.copy()
    families.build("gpt_bigcode").save_pretrained(folder, max_shard_size="1MB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def truncated(box: Box) -> None:
    file = box.copy() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_tokenizer(box: Box) -> None:
    folder = box.copy()
    for name in families.TOKENIZER_FILES:
        (folder / name).unlink()


def already_compressed(box: Box, method: str) -> None:
    path = box.copy() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method, "bits": 4}}))


def under_a_file(box: Box) -> None:
    box.flags["--output"] = write_file(box.root / "file", "x") / "below" / "output"


Spoil = Callable[[Box], Any]
# label → (how the run is spoilt, the error, what its message must say in order)
CASES: dict[str, tuple[Spoil, str, list[str]]] = {
    "unknown model path": (
        lambda box: box.flags.update({"--model": "./no/such/model"}),
        "ModelError",
        ["'./no/such/model'", "no such folder", "wanted a folder with config.json"],
    ),
    "unknown hub name": (
        lambda box: box.flags.update({"--model": "nobody/nothing"}),
        "ModelError",
        ["'nobody/nothing'", "no such folder", "as a hub name it cannot be read"],
    ),
    "folder that is no model": (
        lambda box: box.flags.update({"--model": box.corpus.parent}),
        "ModelError",
        ["holds no config.json"],
    ),
    "config.json that is no JSON": (
        lambda box: (box.copy() / "config.json").write_text("{"),
        "ModelError",
        ["cannot be read"],
    ),
    "missing tokenizer": (without_tokenizer, "ModelError", ["no", "tokenizer"]),
    "empty dataset": (
        lambda box: box.flags.update({"--dataset": write_file(box.root / "empty.txt", "")}),
        "CalibrationError",
        ["empty.txt", "is empty", "wanted"],
    ),
    "dataset of blank lines": (
        lambda box: box.flags.update({"--dataset": write_file(box.root / "blank.jsonl", '{"text": " "}\n')}),
        "CalibrationError",
        ["blank.jsonl"],
    ),
    "binary dataset": (
        lambda box: box.flags.update({"--dataset": write_file(box.root / "a.txt", bytes(range(256)))}),
        "CalibrationError",
        ["a.txt", "binary"],
    ),
    "missing dataset": (
        lambda box: box.flags.update({"--dataset": "./no/such.jsonl"}),
        "CalibrationError",
        ["'./no/such.jsonl'", "no such file"],
    ),
    "wrong text key": (
        lambda box: box.flags.update({"--text-key": "content"}),
        "CalibrationError",
        ["corpus.jsonl", "line 1", "no key 'content'", "found 'text'"],
    ),
    "too few tokens": (
        lambda box: box.flags.update({"--num-samples": 4000}),
        "CalibrationError",
        ["fills", "windows of 32 tokens", "wanted 4000", "--num-samples"],
    ),
    "windows beyond the context": (
        lambda box: box.flags.update({"--seq-len": 512}),
        "ConfigError",
        ["seq_len is 512", "context is 256", "nearest legal value 256"],
    ),
    "no windows": (lambda box: box.flags.update({"--num-samples": 0}), "ConfigError", ["num_samples is 0", "at least 1"]),
    "bits 5": (
        lambda box: box.flags.update({"--bits": 5}),
        "ConfigError",
        ["bits is 5", "wanted one of 2, 3, 4, 8, 16", "nearest: 4"],
    ),
    "group size 48": (
        lambda box: box.flags.update({"--group-size": 48}),
        "ConfigError",
        ["group_size is 48", "wanted one of", "nearest:"],
    ),
    "group size that does not divide": (
        lambda box: box.flags.update({"--group-size": 256}),
        "GroupSizeError",
        ["transformer.h.0.attn.c_attn", "256 does not divide 128", "nearest: 128"],
    ),
    "illegal explicit rank": (
        lambda box: (box.flags.pop("--rank-ratio"), box.flags.update({"--rank-pattern": ["mlp.c_fc=50", "c_attn=4096"]})),
        "RankError",
        ["transformer.h.0.mlp.c_fc: rank 50", "multiple of 32", "nearest: 64", "c_attn: rank 4096", "nearest: 128"],
    ),
    "rank that is no number": (
        lambda box: (box.flags.pop("--rank-ratio"), box.flags.update({"--rank-pattern": ["mlp.c_fc=half"]})),
        "ConfigError",
        ["mlp.c_fc=half", "PATTERN=RANK"],
    ),
    "rank in other digits": (
        lambda box: (box.flags.pop("--rank-ratio"), box.flags.update({"--rank-pattern": ["mlp.c_fc=²"]})),
        "ConfigError",
        ["mlp.c_fc=²", "PATTERN=RANK"],
    ),
    "two ranks for a pattern": (
        lambda box: (box.flags.pop("--rank-ratio"), box.flags.update({"--rank-pattern": ["mlp.c_fc=32", "mlp.c_fc=64"]})),
        "ConfigError",
        ["--rank-pattern names 'mlp.c_fc' twice: 32 and 64"],
    ),
    "output that is empty": (lambda box: box.flags.update({"--output": ""}), "ConfigError", ["output is ''; wanted"]),
    "configuration that is empty": (
        lambda box: box.flags.update({"--config": ""}),
        "ConfigError",
        ["configuration file ''"],
    ),
    "plan that is empty": (
        lambda box: (box.flags.pop("--rank-ratio"), box.flags.pop("--group-size"), box.flags.update({"--plan": ""})),
        "ConfigError",
        ["configuration file ''", "cannot be read"],
    ),
    "pattern that matches nothing": (
        lambda box: box.flags.update({"--targets": ["mlp", "c_atn"]}),
        "TargetError",
        ["targets 'c_atn' matches no layer", "did you mean 'c_attn'"],
    ),
    "everything ignored": (
        lambda box: box.flags.update({"--targets": ["mlp"], "--ignore": ["all"]}),
        "TargetError",
        ["leaves nothing"],
    ),
    "neither ratio": (
        lambda box: box.flags.pop("--rank-ratio"),
        "ConfigError",
        ["no rank is chosen", "rank_ratio", "param_ratio"],
    ),
    "both ratios": (
        lambda box: box.flags.update({"--param-ratio": 0.5}),
        "ConfigError",
        ["rank_ratio and param_ratio are both given", "exactly one"],
    ),
    "ratio above one": (
        lambda box: box.flags.update({"--rank-ratio": 1.5}),
        "ConfigError",
        ["rank_ratio is 1.5", "(0, 1]"],
    ),
    "ratio that decomposes nothing": (
        lambda box: box.flags.update({"--rank-ratio": 0.95}),
        "RankError",
        ["no layer would be decomposed", "transformer.h.0.mlp.c_fc", "smaller ratio"],
    ),
    "no output": (lambda box: box.flags.pop("--output"), "ConfigError", ["output is not given", "--dry-run"]),
    "output not empty": (Box.occupy, "OutputError", ["output'", "is not empty", "--overwrite"]),
    "output is a file": (
        lambda box: box.flags.update({"--output": write_file(box.root / "taken", "x")}),
        "OutputError",
        ["taken", "is a file"],
    ),
    "output not writable": (under_a_file, "OutputError", ["cannot be written"]),
    "output is the model": (lambda box: box.flags.update({"--output": box.copy()}), "OutputError", ["the model itself"]),
    "output holds the model": (
        lambda box: (box.copy(), box.flags.update({"--output": box.root})),
        "OutputError",
        ["the model itself"],
    ),
    "unknown configuration key": (
        lambda box: box.configure("lowrank:\n  rank_ration: 0.5\ngptq:\n  bits: 4\n"),
        "ConfigError",
        ["section 'lowrank'", "'rank_ration'", "did you mean 'rank_ratio'"],
    ),
    "unknown configuration section": (
        lambda box: box.configure("quantisation:\n  bits: 4\n"),
        "ConfigError",
        ["'quantisation'", "known keys"],
    ),
    "configuration that is no YAML": (lambda box: box.configure("a: [1"), "ConfigError", ["run.yaml", "not YAML"]),
    "configuration that is a list": (lambda box: box.configure("- a\n"), "ConfigError", ["run.yaml", "holds list"]),
    "configuration that is missing": (
        lambda box: box.flags.update({"--config": "none.yaml"}),
        "ConfigError",
        ["none.yaml", "No such file"],
    ),
    "packed by us": (lambda box: already_compressed(box, "lord_gptq"), "ModelError", ["already compressed (lord_gptq)"]),
    "packed by others": (lambda box: already_compressed(box, "gptq"), "ModelError", ["already compressed (gptq)", "dense"]),
    "NaN weights": (
        lambda box: edit_tensors(box.copy(), lambda t: t["transformer.h.1.mlp.c_fc.weight"][3].fill_(float("nan"))),
        "NumericsError",
        ["'transformer.h.1.mlp.c_fc.weight'", "128 of 32768 values are NaN or inf"],
    ),
    "encoder only": (
        lambda box: config_only(box, model_type="bert", architectures=["BertForMaskedLM"], hidden_size=32),
        "ModelError",
        ["BertForMaskedLM", "wanted a causal language model"],
    ),
    "encoder and decoder": (
        lambda box: config_only(
            box, model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True, d_model=32
        ),
        "ModelError",
        ["encoder-decoder (T5ForConditionalGeneration)"],
    ),
    "multimodal": (
        lambda box: config_only(box, model_type="llava", architectures=["LlavaForConditionalGeneration"]),
        "ModelError",
        ["multimodal (LlavaForConditionalGeneration", "text-only"],
    ),
    "model type nobody knows": (
        lambda box: config_only(box, model_type="gpt9", architectures=["GPT9ForCausalLM"]),
        "ModelError",
        ["gpt9"],
    ),
    "only .bin weights": (bin_only, "ModelError", ["safetensors"]),
    "no weights": (lambda box: (box.copy() / "model.safetensors").unlink(), "ModelError", ["safetensors"]),
    "incomplete weights": (
        lambda box: edit_tensors(box.copy(), lambda t: t.pop("transformer.h.1.mlp.c_fc.weight")),
        "ModelError",
        ["1 tensors are missing", "transformer.h.1.mlp.c_fc.weight"],
    ),
    "truncated weights": (truncated, "ModelError", ["model.safetensors' cannot be read", "not fully covered"]),
    "truncated weights in the naive stack": (
        lambda box: (truncated(box), box.flags.update({"--stack": "naive"})),
        "ModelError",
        ["model.safetensors' cannot be read", "not fully covered"],
    ),
    "a log that is something else": (
        lambda box: box.flags.update({"--log": write_file(box.root / "thesis.tex", "mine")}),
        "OutputError",
        ["thesis.tex' is there and no log of a run"],
    ),
    "a log in the output": (
        lambda box: box.flags.update({"--log": box.output / "log"}),
        "OutputError",
        ["is or lies in the output itself"],
    ),
    "incomplete shards": (sharded_and_incomplete, "ModelError", ["model-00001-of-"]),
    "weights of other shapes": (
        lambda box: edit_tensors(box.copy(), lambda t: t.update({"transformer.ln_f.weight": torch.ones(64)})),
        "ModelError",
        ["1 tensors have other shapes", "'transformer.ln_f.weight': (64,), wanted (128,)"],
    ),
    "unknown device": (lambda box: box.flags.update({"--device": "gpu"}), "ConfigError", ["'gpu'", "wanted"]),
    "device without values": (lambda box: box.flags.update({"--device": "meta"}), "ConfigError", ["'meta'", "wanted"]),
    "unknown dtype": (
        lambda box: box.flags.update({"--dtype": "float61"}),
        "ConfigError",
        ["dtype is 'float61'", "did you mean 'float16'"],
    ),
    "unknown stack": (lambda box: box.flags.update({"--stack": "nave"}), "ConfigError", ["did you mean 'naive'"]),
    "unknown form": (
        lambda box: box.flags.update({"--form": "pivoting"}),
        "ConfigError",
        ["form is 'pivoting'", "wanted one of two_factor, pivoted", "did you mean 'pivoted'"],
    ),
    "groups in the naive stack": (
        lambda box: box.flags.update({"--form": "grouped", "--stack": "naive"}),
        "ConfigError",
        ["form is 'grouped'", "decomposes every layer alone", "wanted --stack joint"],
    ),
    "unknown order": (
        lambda box: box.flags.update({"--order": "down"}),
        "ConfigError",
        ["illegal joint settings", "order is 'down'", "auto, down_first, up_first"],
    ),
    "negative sweeps": (
        lambda box: box.flags.update({"--refine": -1}),
        "ConfigError",
        ["illegal joint settings", "refine is -1", "0 to 100"],
    ),
    "mse out of range": (
        lambda box: box.flags.update({"--mse": 9}),
        "ConfigError",
        ["illegal gptq settings", "mse is 9.0", "[0, 8]"],
    ),
    "pivoted at full rank": (
        lambda box: box.flags.update({"--rank-ratio": 0.95, "--form": "pivoted", "--targets": "c_proj"}),
        "RankError",
        ["no layer would be decomposed", "the pivoted form at rank 128 is the layer itself"],
    ),
    "damping in percent": (lambda box: box.flags.update({"--damp-percent": 10}), "ConfigError", ["damp_percent is 10"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(case: str, box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, error, parts = CASES[case]
    spoil(box)
    before = snapshot(box.root)
    capfd.readouterr()
    code = run_command("quantize", *box.arguments())
    stderr = capfd.readouterr().err
    assert code == exit_code_of(error), stderr
    message = stderr[stderr.index("optimum-cli lord: ") :]
    assert "LOAD REPORT" not in stderr
    assert message.startswith(f"optimum-cli lord: {error}: "), message
    assert stderr.count("optimum-cli lord: ") == 1 and "Traceback" not in stderr
    position = 0
    for part in parts:
        assert part in message[position:], f"{part!r} is not (in order) in: {message}"
        position = message.index(part, position)
    assert snapshot(box.root) == before


def test_nothing_but_the_message_is_printed(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    """Refusals that need no weights come without a line of anybody else's."""
    from lord_quant.silence import import_hosts

    import_hosts()
    for spoil, error in ((without_tokenizer, ModelError), (lambda box: box.flags.update({"--bits": 5}), ConfigError)):
        spoil(box)
        capfd.readouterr()
        assert run_command("quantize", *box.arguments()) == error.exit_code
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("optimum-cli lord: ")


def test_few_tokens_are_a_warning_with_numbers(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("quantize", "--dry-run", *box.arguments()) == 0
    assert "warning: 64 calibration tokens are fewer than the 256 inputs of the widest layer" in capfd.readouterr().err
    box.flags["--num-samples"] = 8
    assert run_command("quantize", "--dry-run", *box.arguments()) == 0
    assert "warning" not in capfd.readouterr().err
    assert not box.output.exists()
