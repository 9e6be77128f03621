# SPDX-License-Identifier: Apache-2.0
"""Arguments that are refused: of the Python interface and of the commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from file_cases import NAME
from in_process import run_command
from refusal import Ground, Refusal


def config(values: Any, *parts: str, error: str = "ConfigError") -> Refusal:
    def do(ground: Ground) -> Any:
        from lord_quant import LordConfig

        LordConfig.from_dict(values)

    return Refusal(do, error, parts)


RANKS = {"lowrank": {"rank_ratio": 0.5}}
CONFIG = {
    "no mapping": config(5, "configuration is int; wanted a mapping"),
    "text": config("model", "configuration is str; wanted a mapping"),
    "no model": config(RANKS, "model is not given"),
    "key that is no name": config({"model": "m", 4: 4}, "4; wanted a name"),
    "section of another kind": config({"model": "m", **RANKS, "gptq": [4]}, "section 'gptq' is list"),
    "everything wrong at once": config(
        {"model": "m", **RANKS, "gptq": {"bits": 5, "mse": -1, "sym": "no"}}, "bits is 5", "sym is 'no'", "mse is -1"
    ),
    "number without end": config({"model": "m", "lowrank": {"rank_ratio": float("inf")}}, "rank_ratio is inf"),
}


def on_the_fly(*parts: str, error: str = "ConfigError", **arguments: Any) -> Refusal:
    """Settings that compress a model while it is loaded."""

    def do(ground: Ground) -> Any:
        from lord_quant import LordGPTQConfig

        LordGPTQConfig(**{"rank_ratio": 0.5, **arguments})

    return Refusal(do, error, parts)


def loaded(*parts: str, error: str, **arguments: Any) -> Refusal:
    """A model that is to be compressed while it is loaded, with settings that do not suit it."""

    def do(ground: Ground) -> Any:
        from transformers import AutoModelForCausalLM

        from lord_quant import LordGPTQConfig

        here = {key: value(ground) if callable(value) else value for key, value in arguments.items()}
        given = {"dataset": str(ground.text), "num_samples": 2, "seq_len": 32, "rank_ratio": 0.5, "force_rank": True}
        settings = LordGPTQConfig(**given | here)
        AutoModelForCausalLM.from_pretrained(ground.dense, quantization_config=settings)

    return Refusal(do, error, parts)


FLY = {
    "floats": on_the_fly("bits is 16, and GPTQ makes 8, 4, 3 or 2", "lord quantize --bits 16", bits=16),
    "bits as text": on_the_fly("Only support quantization to [2,3,4,8] bits", bits="4"),
    "group size as text": on_the_fly("a value that GPTQ cannot have", group_size="32"),
    "group size 0": on_the_fly("group_size is 0", "nearest: 32", group_size=0),
    "ratio as text": on_the_fly("rank_ratio is 'half'", rank_ratio="half"),
    "switch as a number": on_the_fly("sym is 1; wanted true or false", sym=1),
    "targets as a number": on_the_fly("targets is 5", targets=5),
    "targets that hold a number": on_the_fly("targets is ['mlp', 5]", targets=["mlp", 5]),
    "ignore as a mapping": on_the_fly("ignore is {'a': 1}", ignore={"a": 1}),
    "ranks as a list": on_the_fly("rank_pattern is list", error="CheckpointError", rank_ratio=None, rank_pattern=["a"]),
    "windows as text": on_the_fly("num_samples is 'many'", num_samples="many"),
    "text as a number": on_the_fly("dataset is 5", dataset=5),
    "budget beside ranks": on_the_fly("a budget and rank_ratio are given", target_bpw=3.0),
    "unknown argument": on_the_fly("'rotat'", "did you mean 'rotate'", rotat=False),
    "text that is not there": loaded(
        "none.txt", "no such file", error="CalibrationError", dataset=lambda g: str(g.root / "none.txt")
    ),
    "statistics that are not there": loaded(
        "cannot be read",
        error="CheckpointError",
        rank_ratio=None,
        force_rank=False,
        target_bpw=4.5,
        statistics=lambda g: str(g.root / "none"),
    ),
    "pattern of no layer": loaded("matches no layer", error="TargetError", targets=["mpl"]),
    "tokenizer that is not there": loaded("no tokenizer at", error="ModelError", tokenizer=lambda g: str(g.root / "none")),
    "group size that does not divide": loaded("layers that cannot be packed", error="GroupSizeError", group_size=128),
}


def quantizer(*parts: str, error: str = "ConfigError", **arguments: Any) -> Refusal:
    """Arguments of the drop-in quantizer."""

    def do(ground: Ground) -> Any:
        from lord_quant import LordGPTQQuantizer

        LordGPTQQuantizer(**{"bits": 4, "rank_ratio": 0.5, **arguments})

    return Refusal(do, error, parts)


def calibrated(dataset: Any, *parts: str, error: str = "CalibrationError") -> Refusal:
    """Data that the drop-in quantizer is given."""

    def do(ground: Ground) -> Any:
        from transformers import AutoModelForCausalLM

        from lord_quant import LordGPTQQuantizer

        model = AutoModelForCausalLM.from_pretrained(ground.dense)
        LordGPTQQuantizer(4, dataset, 32, rank_ratio=0.5, force_rank=True).quantize_model(model, str(ground.dense))

    return Refusal(do, error, parts)


def unsaved(ground: Ground) -> Any:
    from lord_quant import LordGPTQQuantizer

    LordGPTQQuantizer(4, rank_ratio=0.5).save(None, str(ground.root / "output"))


ROW = [1, 2, 3, 4]
DROP_IN = {
    "bits as text": quantizer("bits is '4'", bits="4"),
    "group size 0": quantizer("group_size is 0", group_size=0),
    "damping in percent": quantizer("damp_percent is 5", damp_percent=5),
    "floats from the quantizer": quantizer("bits is 16, and GPTQ makes 8, 4, 3 or 2", "lord quantize --bits 16", bits=16),
    "joint as a number": quantizer("section 'joint' is int", joint=5),
    "joint as names": quantizer("section 'joint' is list", joint=["anchor"]),
    "targets as a number": quantizer("targets is 5", targets=5),
    "targets that are none": quantizer("targets is empty", targets=[]),
    "data as a number": quantizer("dataset is int; wanted a path, a name, texts", dataset=5),
    "data as a mapping": quantizer("dataset is dict", dataset={"text": "a"}),
    "windows below nothing": quantizer("num_samples is -1", num_samples=-1),
    "length as text": quantizer("seq_len is 'long'", model_seqlen="long"),
    "unknown argument": quantizer("'rank_ration'", "did you mean 'rank_ratio'", rank_ration=0.5),
    "saved before anything": Refusal(unsaved, "ConfigError", ("nothing to save",)),
    "numbers for texts": calibrated([1, 2], "dataset holds int; wanted texts"),
    "texts and samples": calibrated(["text", {"input_ids": ROW}], "dataset holds dict; wanted texts"),
    "samples and texts": calibrated([{"input_ids": ROW}, "text"], "tokenized sample 1 has no 'input_ids'; found str"),
    "sample without tokens": calibrated([{"tokens": ROW}], "sample 0 has no 'input_ids'; found 'tokens'"),
    "tokens as text": calibrated([{"input_ids": "abc"}], "sample 0 is no row of tokens"),
    "tokens as fractions": calibrated([{"input_ids": [0.5, 1.5]}], "torch.float32 (2,); wanted one row of integers"),
    "tokens in two rows": calibrated([{"input_ids": [ROW, ROW]}], "torch.int64 (2, 4); wanted one row of integers"),
    "no tokens": calibrated([{"input_ids": []}], "wanted one row of integers"),
    "tokens below nothing": calibrated([{"input_ids": [-1, 2]}], "hold token -1; the model knows 0 to 96"),
    "mask of another kind": calibrated(
        [{"input_ids": ROW, "attention_mask": "yes"}], "'attention_mask' of tokenized sample 0"
    ),
}


def output(place: Callable[[Ground], Any], *parts: str) -> Refusal:
    """A run that would succeed, but for where it is to write."""

    def do(ground: Ground) -> int:
        flags = ["--model", ground.dense, "--dataset", ground.text, "--num-samples", 2, "--seq-len", 32]
        return run_command("quantize", *flags, "--rank-ratio", "1", "--group-size", 32, "--output", place(ground))

    return Refusal(do, "OutputError", parts)


def written(ground: Ground, text: str) -> int:
    """A run whose output a file names: NUL cannot be typed."""
    path = ground.file("run.yaml", f'output: "{text}"\nlowrank: {{rank_ratio: 1}}\n')
    return run_command("quantize", "--config", path, "--model", ground.dense)


def file_of(command: str, place: Callable[[Ground], Any], error: str, *parts: str) -> Refusal:
    return Refusal(
        lambda ground: run_command(command, "--model", ground.dense, "--dataset", ground.text, "--output", place(ground)),
        error,
        parts,
    )


OUTPUTS = {
    "file": output(lambda g: g.file("taken", "x"), "taken' is a file"),
    "below a file": output(lambda g: g.file("taken", "x") / "below", "cannot be written"),
    "link in a circle": output(lambda g: g.loop("round"), "round"),
    "below a link in a circle": output(lambda g: g.loop("round") / "below", "round"),
    "home of nobody": output(lambda g: "~nobody-has-this-name/out", "~nobody-has-this-name/out' cannot be written"),
    "long name": output(lambda g: g.root / NAME, "cannot be written", "File name too long"),
    "NUL": Refusal(lambda g: written(g, "a\\0b"), "OutputError", ("a\\x00b' cannot be written", "null")),
    "file system that takes nothing": output(lambda g: "/proc/lord-output", "cannot be written"),
    "statistics on a folder": file_of(
        "sensitivity", lambda g: g.folder("x"), "OutputError", "x' is a folder; wanted a file"
    ),
    "statistics in a circle": file_of("sensitivity", lambda g: g.loop("round"), "OutputError", "round"),
    "statistics of a long name": file_of("sensitivity", lambda g: g.root / NAME, "OutputError", "File name too long"),
    "statistics in the model": file_of("sensitivity", lambda g: g.dense / "x", "OutputError", "lies in the model itself"),
    "log of a long name": Refusal(
        lambda g: g.quantize("--rank-ratio", "1", "--log", g.root / NAME), "OutputError", ("File name too long",)
    ),
}


def evaluated(*flags: Any, parts: tuple[str, ...], error: str = "EvaluationError") -> Refusal:
    return Refusal(
        lambda ground: run_command(
            "eval", "--model", ground.dense, *(flag(ground) if callable(flag) else flag for flag in flags)
        ),
        error,
        parts,
    )


PERPLEXITY = ("--perplexity", lambda ground: ground.text)
EVAL = {
    "no model": Refusal(lambda g: run_command("eval", "--tasks", "x"), "EvaluationError", ("--model is missing",)),
    "nothing to do": evaluated(parts=("nothing to evaluate",)),
    "no sequences": evaluated(*PERPLEXITY, "--batch-size", "0", parts=("batch_size is '0'",)),
    "sequences as text": evaluated(*PERPLEXITY, "--batch-size", "some", parts=("batch_size is 'some'", "'auto'")),
    "no window": evaluated(*PERPLEXITY, "--window", "0", parts=("window is 0", "at least 2")),
    "no stride": evaluated(*PERPLEXITY, "--stride", "0", parts=("stride is 0", "at least 1")),
    "stride beyond the window": evaluated(
        *PERPLEXITY, "--window", "8", "--stride", "9", parts=("stride is 9", "window, 8")
    ),
    "no windows": evaluated(*PERPLEXITY, "--max-windows", "0", parts=("max_windows is 0",)),
    "limit that is NaN": evaluated(*PERPLEXITY, "--limit", "nan", parts=("limit is nan",)),
    "limit below nothing": evaluated(*PERPLEXITY, "--limit=-1", parts=("limit is -1.0",)),
    "seed below nothing": evaluated(*PERPLEXITY, "--seed=-1", parts=("seed is -1",)),
    "dtype that does not exist": evaluated(*PERPLEXITY, "--dtype", "float61", parts=("dtype is 'float61'",)),
    "seed beyond 32 bits": evaluated(*PERPLEXITY, f"--seed={2**32}", parts=(f"seed is {2**32}", f"0 to {2**32 - 1}")),
    "dtype of 8 bits": evaluated(*PERPLEXITY, "--dtype", "float8_e4m3fn", parts=("dtype is 'float8_e4m3fn'", "floats")),
    "dtype of integers": evaluated(*PERPLEXITY, "--dtype", "int8", parts=("dtype is 'int8'", "floats")),
    "device that is not there": evaluated(*PERPLEXITY, "--device", "gpu", parts=("'gpu'",), error="ConfigError"),
    "setting without a value": evaluated(*PERPLEXITY, "--gen-kwargs", "x", parts=("wanted KEY=VALUE",)),
    "text that is not there": evaluated("--perplexity", "./none.txt", parts=("no such file",), error="CalibrationError"),
    "baseline that is not there": evaluated(
        *PERPLEXITY, "--baseline", "./none", parts=("'./none'", "no such folder"), error="ModelError"
    ),
    "output that is there": evaluated(
        *PERPLEXITY,
        "--output",
        lambda g: g.file("x.json", "{}"),
        parts=("exists; wanted a new file, or --overwrite",),
        error="OutputError",
    ),
}

ARGUMENTS = {
    f"{kind}: {label}": case
    for kind, cases in {
        "LordConfig": CONFIG,
        "LordGPTQConfig": FLY,
        "LordGPTQQuantizer": DROP_IN,
        "output": OUTPUTS,
        "eval": EVAL,
    }.items()
    for label, case in cases.items()
}
