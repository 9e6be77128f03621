# SPDX-License-Identifier: Apache-2.0
"""Packed layers in AutoGPTQ: does its original `QuantLinear` compute from our tensors what our layers compute?

    python eval/legacy_gptq.py --model DIR --environment DIR --output eval/results/legacy-gptq.json

A model is compressed at 8 and 4 bits, symmetric and asymmetric, with and without activation order, and every checkpoint is
written again in the first GPTQ format (`lord_quant.convert_to_gptq_v1`). An environment of its own, built unless it is
there, holds AutoGPTQ 0.7.1 and what it was released for; `legacy_gptq_child.py` runs in it, on the CPU, and hands back the
weights and the outputs of every packed layer: both factors, and layers that stayed dense. They are held against the same
layers loaded by transformers, and against weights unpacked in float64 by the definition.

The table lies beside the JSON as Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from provenance import digests, model_name, revision
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from variants import Clock, write_json

from lord_quant import LordConfig, LordGPTQConfig, convert_to_gptq_v1, execute, prepare
from lord_quant.silence import hush, import_hosts


CHILD = Path(__file__).with_name("legacy_gptq_child.py")
TORCH = ("torch==2.2.2+cpu", "torch==2.2.2")
"""The first that the package index has."""
PACKAGES = (
    "auto-gptq==0.7.1",
    "transformers==4.46.*",
    "peft==0.12.*",
    "accelerate<1.2",
    "datasets<3.2",
    "pyarrow<19",
    "numpy<2",
)
ROWS = 16
WEIGHTS, INPUTS, OUTPUTS = "model.safetensors", "inputs.safetensors", "outputs.safetensors"
FIRST, SECOND = "first", "second"
HEADERS = (
    "", "layers", "other weights", "AutoGPTQ, float32", "of largest", "AutoGPTQ, float16", "of largest",
    "ours", "of largest", "AutoGPTQ to ours", "of largest",
)  # fmt: skip
NOTE = (
    "Largest absolute difference of an output over all layers of a checkpoint, and the largest of any layer as a share of "
    "that layer's largest output. The first three pairs are differences from outputs in float64 of weights unpacked by the "
    "definition; ours is the layer that transformers loads, in float32; the last pair is AutoGPTQ in float32 against ours. "
    "Other weights: how many of the weights that AutoGPTQ reads are not exactly those."
)


class Scheme(NamedTuple):
    """How a checkpoint is quantized; names as everywhere."""

    bits: int
    sym: bool
    desc_act: bool

    def __str__(self) -> str:
        return f"{self.bits}-bit, {'symmetric' if self.sym else 'asymmetric'}{', activation order' * self.desc_act}"


def main() -> None:
    """Compares all checkpoints, prints the table, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="dense model")
    parser.add_argument("--environment", type=Path, required=True, metavar="DIR", help="AutoGPTQ's, built if not there")
    parser.add_argument("--python", default="python3.11", help="interpreter it is built with (default: python3.11)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank-ratio", type=float, default=0.5, help="(default: 0.5)")
    parser.add_argument("--num-samples", type=int, default=8, help="calibration windows (default: 8)")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per window (default: 128)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    clock, rows = Clock(), list[dict[str, Any]]()
    python = build_environment(args.environment, args.python)
    settings = {name: getattr(args, name) for name in ("group_size", "rank_ratio", "num_samples", "seq_len")}
    settings |= {"model": model_name(args.model), "model_sha256": digests([args.model]), "revision": revision()}
    settings |= {"versions": versions(python), "rows_per_layer": ROWS}
    import_hosts()
    with tempfile.TemporaryDirectory() as name:
        schemes = [Scheme(*choice) for choice in itertools.product((8, 4), (True, False), (False, True))]
        folders = {scheme: Path(name) / str(number) for number, scheme in enumerate(schemes)}
        for scheme, folder in folders.items():
            make(scheme, args, folder)
            print(f"{scheme}: compressed ({clock})", flush=True)
        run_child(python, Path(name), {folder: scheme for scheme, folder in folders.items()}, args.group_size)
        for scheme, folder in folders.items():
            rows.append({"label": str(scheme), **scheme._asdict(), "layers": compare(scheme, folder)})
            print(f"{scheme}: {len(rows[-1]['layers'])} layers compared ({clock})", flush=True)
    write_json(args.output, {"settings": settings, "note": NOTE, "rows": rows})
    shown = f"{table(rows)}\n\n{NOTE}"
    args.output.with_suffix(".md").write_text(f"{shown}\n", encoding="utf-8")
    print(f"\n{shown}\n\ntook {clock}; written to {args.output} and {args.output.with_suffix('.md')}")


def make(scheme: Scheme, args: argparse.Namespace, folder: Path) -> None:
    """Writes a checkpoint in both formats, and inputs for each of its packed layers."""
    config = {
        "model": args.model,
        "output": str(folder / SECOND),
        "lowrank": {"rank_ratio": args.rank_ratio},
        "gptq": {"group_size": args.group_size, **scheme._asdict()},
        "calibration": {"num_samples": args.num_samples, "seq_len": args.seq_len},
    }
    execute(prepare(LordConfig.from_dict(config)))
    convert_to_gptq_v1(folder / SECOND, folder / FIRST)
    stored, generator = load_file(folder / SECOND / WEIGHTS), torch.Generator().manual_seed(0)
    layers = sorted(name.removesuffix(".qweight") for name in stored if name.endswith(".qweight"))
    widths = {layer: len(stored[f"{layer}.g_idx"]) for layer in layers}
    # Values of float16, so that it is the same input in every dtype.
    inputs = {layer: torch.randn(ROWS, width, generator=generator).half() for layer, width in widths.items()}
    save_file(inputs, folder / INPUTS)


def build_environment(folder: Path, python: str) -> Path:
    """Builds AutoGPTQ's environment unless it is there; returns its interpreter.

    Raises:
        SystemExit: A package could not be installed; pip has said why.
    """
    own, ready = (folder / "bin" / "python").absolute(), folder / ".ready"
    if ready.is_file():
        return own
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty and no finished environment; wanted a new folder")
    pip = (str(own), "-m", "pip", "install", "--quiet")
    variables = os.environ | {"BUILD_CUDA_EXT": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def succeeds(*command: str) -> bool:
        return subprocess.run(command, env=variables, check=False).returncode == 0

    tools = succeeds(python, "-m", "venv", str(folder)) and succeeds(*pip, "--upgrade", "pip", "setuptools<81", "wheel")
    if not tools or not any(succeeds(*pip, name, "numpy<2") for name in TORCH):
        raise SystemExit(f"no interpreter, or none of {', '.join(TORCH)}, could be installed in {folder}")
    if not succeeds(*pip, "--no-build-isolation", *PACKAGES):
        raise SystemExit(f"{', '.join(PACKAGES)} could not be installed in {folder}")
    ready.touch()
    return own


def versions(python: Path) -> dict[str, str]:
    """Returns the versions of what matters in an environment."""
    names = ("auto_gptq", "torch", "transformers", "peft", "numpy", "safetensors")
    code = f"from importlib.metadata import version\nfor name in {names}: print(version(name))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))


def run_child(python: Path, root: Path, schemes: Mapping[Path, Scheme], group_size: int) -> None:
    """Runs AutoGPTQ's layers in its own environment, which leaves their weights and outputs in the folders."""
    jobs = [
        {
            "checkpoint": str(folder / FIRST / WEIGHTS),
            "inputs": str(folder / INPUTS),
            "outputs": str(folder / OUTPUTS),
            "bits": scheme.bits,
            "group_size": group_size,
            "desc_act": scheme.desc_act,
        }
        for folder, scheme in schemes.items()
    ]
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [str(python), str(CHILD), str(root / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"AutoGPTQ failed:\n{done.stderr[-3000:]}")


def compare(scheme: Scheme, folder: Path) -> dict[str, dict[str, float]]:
    """Compares every packed layer of a checkpoint.

    Returns:
        By layer: largest output, number of weights and of those that differ, and largest differences.
    """
    from transformers import AutoModelForCausalLM

    stored, inputs, theirs = (load_file(folder / path) for path in (f"{SECOND}/{WEIGHTS}", INPUTS, OUTPUTS))
    with hush("transformers"):
        kernel = LordGPTQConfig(bits=scheme.bits, backend="gptq_torch")
        model = AutoModelForCausalLM.from_pretrained(folder / SECOND, dtype=torch.float32, quantization_config=kernel)
    found = {}
    for layer, x in inputs.items():
        weight, bias = unpack(stored, layer, scheme.bits)
        expected = x.double() @ weight.T + bias
        with torch.no_grad():
            ours = model.get_submodule(layer)(x.float())
        single = theirs[f"{layer}.float32"]
        found[layer] = {
            "largest": float(expected.abs().max()),
            "weights": weight.numel(),
            "other_weights": int((weight != theirs[f"{layer}.weight"].double().T).sum()),
            "float32": largest_difference(single, expected),
            "float16": largest_difference(theirs[f"{layer}.float16"], expected),
            "ours": largest_difference(ours, expected),
            "float32_to_ours": largest_difference(single, ours),
        }
    return found


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the largest absolute difference of two tensors."""
    return float((one.double() - other.double()).abs().max())


def unpack(stored: dict[str, torch.Tensor], layer: str, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a layer's weight (out, in) and bias in float64, by the definition of the second format: s (q − z).

    Args:
        stored: The checkpoint's tensors.
        layer: Full path of the layer.
        bits: 8 or 4, of which a word holds 4 or 8, the lowest first.
    """
    per_word = 32 // bits

    def fields(words: torch.Tensor) -> torch.Tensor:  # (n,) words to (n, per_word) integers
        unsigned = words.to(torch.int64) % 2**32
        return torch.stack([unsigned // 2 ** (bits * place) % 2**bits for place in range(per_word)], dim=-1)

    words, groups = stored[f"{layer}.qweight"], stored[f"{layer}.g_idx"].long()
    codes = fields(words).permute(0, 2, 1).reshape(len(groups), -1)
    zeros = fields(stored[f"{layer}.qzeros"]).flatten(1)
    scales = stored[f"{layer}.scales"].double()
    bias = stored.get(f"{layer}.bias", torch.zeros(codes.shape[1]))
    return (scales[groups] * (codes - zeros[groups]).double()).T, bias.double()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the Markdown table."""
    lines = []
    for row in rows:
        layers = list(row["layers"].values())
        line: list[Any] = [row["label"], len(layers), sum(layer["other_weights"] for layer in layers)]
        for key in ("float32", "float16", "ours", "float32_to_ours"):
            line.append(f"{max(layer[key] for layer in layers):.1e}")
            line.append(f"{max(layer[key] / layer['largest'] for layer in layers):.1e}")
        lines.append(line)
    return tabulate(lines, HEADERS, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
