# SPDX-License-Identifier: Apache-2.0
"""Bad input to the commands: exit code 2, one message that says what, where, found and wanted, and nothing written.

Driven in this process through the code that optimum-cli runs; `test_cli.py` shows a few through the real thing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from lord_quant.commands import inspect as inspect_command
from lord_quant.commands import plan as plan_command
from lord_quant.commands import quantize as quantize_command


COMMANDS = {"plan": plan_command, "quantize": quantize_command, "inspect": inspect_command}
SHORT = ["--num-samples", "2", "--seq-len", "32"]


def run_command(name: str, *arguments: str | Path) -> int:
    """Parses and runs a command like optimum-cli does; returns the exit code."""
    from optimum.commands.register.register_lord import _guarded

    parser = argparse.ArgumentParser(prog=f"optimum-cli lord {name}")
    COMMANDS[name].add_arguments(parser)
    return _guarded(COMMANDS[name], parser.parse_args([*map(str, arguments)]))


class Box:
    """A model folder to be spoilt, a place for output, and the arguments of a run that would succeed."""

    def __init__(self, root: Path, model: Path, corpus: Path) -> None:
        self.root, self.original, self.corpus = root, model, corpus
        self.output = root / "output"
        self.flags: dict[str, Any] = {"--model": model, "--output": self.output, "--dataset": corpus, "--rank-ratio": 0.25}
        self.flags["--group-size"] = 32

    def copy(self) -> Path:
        """Makes the run use a copy of the model, and returns it."""
        self.flags["--model"] = shutil.copytree(self.original, self.root / "model")
        return self.flags["--model"]

    def arguments(self) -> list[str]:
        listed = [(flag, value if isinstance(value, list) else [value]) for flag, value in self.flags.items()]
        return [*SHORT, *(str(part) for flag, values in listed for part in (flag, *values))]


@pytest.fixture
def box(tmp_path: Path, model_folder: Callable[..., Path], corpus_file: Path) -> Box:
    return Box(tmp_path, model_folder("gpt_bigcode"), corpus_file)


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


def write_file(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def config_only(box: Box, **values: Any) -> None:
    folder = box.root / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    families.copy_tokenizer(folder)
    box.flags["--model"] = folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    from safetensors.torch import save_file

    tensors = families.stored_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def bin_only(box: Box) -> None:
    folder = box.copy()
    torch.save(families.stored_tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded_and_incomplete(box: Box) -> None:
    folder = box.copy()
    families.build("gpt_bigcode").save_pretrained(folder, max_shard_size="1MB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def without_tokenizer(box: Box) -> None:
    folder = box.copy()
    for name in families.TOKENIZER_FILES:
        (folder / name).unlink()


def occupied(box: Box) -> None:
    box.output.mkdir()
    (box.output / "thesis.tex").write_text("mine")


def already_compressed(box: Box, method: str) -> None:
    path = box.copy() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method, "bits": 4}}))


def yaml_with(box: Box, text: str) -> None:
    box.flags["--config"] = write_file(box.root / "run.yaml", text)


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
        ["'nobody/nothing'", "cannot be read"],
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
        "CalibrationError",
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
    "output not empty": (occupied, "OutputError", ["output'", "is not empty", "--overwrite"]),
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
        lambda box: yaml_with(box, "lowrank:\n  rank_ration: 0.5\ngptq:\n  bits: 4\n"),
        "ConfigError",
        ["section 'lowrank'", "'rank_ration'", "did you mean 'rank_ratio'"],
    ),
    "unknown configuration section": (
        lambda box: yaml_with(box, "quantisation:\n  bits: 4\n"),
        "ConfigError",
        ["'quantisation'", "known keys"],
    ),
    "configuration that is no YAML": (lambda box: yaml_with(box, "a: [1"), "ConfigError", ["run.yaml", "not YAML"]),
    "configuration that is a list": (lambda box: yaml_with(box, "- a\n"), "ConfigError", ["run.yaml", "holds list"]),
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
    "incomplete shards": (sharded_and_incomplete, "ModelError", ["model-00001-of-"]),
    "weights of other shapes": (
        lambda box: edit_tensors(box.copy(), lambda t: t.update({"transformer.ln_f.weight": torch.ones(64)})),
        "ModelError",
        ["1 tensors have other shapes", "'transformer.ln_f.weight': (64,), wanted (128,)"],
    ),
    "unknown device": (lambda box: box.flags.update({"--device": "gpu"}), "ModelError", ["'gpu'", "wanted"]),
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
    assert code == 2, stderr
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
    for spoil in (without_tokenizer, lambda box: box.flags.update({"--bits": 5})):
        spoil(box)
        capfd.readouterr()
        assert run_command("quantize", *box.arguments()) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("optimum-cli lord: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    locked = box.root / "locked"
    locked.mkdir(mode=0o555)
    box.flags["--output"] = locked / "output"
    assert run_command("quantize", *box.arguments()) == 2
    assert "Permission denied" in capfd.readouterr().err


def test_a_read_only_file_system_is_refused(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    """As root too: /proc takes no folders."""
    box.flags["--output"] = "/proc/lord-output"
    assert run_command("quantize", *box.arguments()) == 2
    assert "OutputError: output '/proc/lord-output' cannot be written" in capfd.readouterr().err


def test_overwrite_never_replaces_what_is_no_model(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    occupied(box)
    assert run_command("quantize", "--overwrite", *box.arguments()) == 2
    assert "no model folder" in capfd.readouterr().err
    assert (box.output / "thesis.tex").read_text() == "mine"


def test_few_tokens_are_a_warning_with_numbers(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("quantize", "--dry-run", *box.arguments()) == 0
    assert "warning: 64 calibration tokens are fewer than the 256 inputs of the widest layer" in capfd.readouterr().err
    box.flags["--num-samples"] = 8
    assert run_command("quantize", "--dry-run", *box.arguments()) == 0
    assert "warning" not in capfd.readouterr().err
    assert not box.output.exists()


def test_every_flag_of_the_stack_lands_in_its_place(box: Box) -> None:
    from lord_quant.commands.options import config_from

    parser = argparse.ArgumentParser()
    quantize_command.add_arguments(parser)
    usual = config_from(parser.parse_args(box.arguments()))
    assert (usual.stack, usual.lowrank.form, usual.gptq.sym, usual.gptq.mse) == ("joint", "two_factor", False, 2.0)
    ideas = ["anchor", "rotate", "refit", "deflate"]
    flags = [*(f"--no-{idea}" for idea in ideas), "--order", "up_first", "--refine", "5", "--form", "pivoted"]
    flags += ["--mse", "2.4", "--sym", "--stack", "naive"]
    changed = config_from(parser.parse_args([*box.arguments(), *flags]))
    for idea in ideas:
        assert getattr(usual.joint, idea) and not getattr(changed.joint, idea)
    assert (changed.joint.order, changed.joint.refine) == ("up_first", 5)
    assert (changed.stack, changed.lowrank.form, changed.gptq.sym, changed.gptq.mse) == ("naive", "pivoted", True, 2.4)
    yaml_with(box, "joint: {anchor: false, order: down_first}\nlowrank: {form: pivoted}\ngptq: {mse: 0}\n")
    merged = config_from(parser.parse_args([*box.arguments(), "--order", "auto", "--anchor"]))
    assert (merged.joint.anchor, merged.joint.order, merged.lowrank.form, merged.gptq.mse) == (True, "auto", "pivoted", 0)


def test_plan_shares_the_refusals(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("plan", "--model", box.original, "--rank-ratio", "0.25", "--targets", "mpl") == 2
    assert "'mpl' matches no layer; did you mean 'mlp'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda root: root / "nothing", "ModelError: .*holds no config.json"),
        (lambda root: (root / "config.json").write_text("{}") and root, "ModelError: .*config.json cannot be read"),
        (
            lambda root: (root / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1}') and root,
            "CheckpointError: .*holds no safetensors file",
        ),
    ],
)
def test_inspect_names_what_is_wrong(
    make: Callable[[Path], Path], error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import re

    assert run_command("inspect", make(tmp_path)) == 2
    assert re.search(error, capfd.readouterr().err)
