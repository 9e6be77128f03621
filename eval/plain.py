# SPDX-License-Identifier: Apache-2.0
"""Plain GPTQ of a dense model as the users of other libraries run it, unmodified: Optimum's, and GPTQModel's own.

Both are given the same token windows and stay at their defaults but for bits and group size. Each function is what
`processes.measured` runs: it reads its command line and returns the seconds of loading, quantizing and writing, imports and
reading the windows not counted, and how many layers were packed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


WINDOWS = "input_ids"


def synchronise() -> None:
    """Waits for a GPU, which computes behind our back."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write_windows(input_ids: Any, path: Path) -> None:
    """Writes token windows, with shape (windows, tokens), where `--windows` finds them."""
    from safetensors.torch import save_file

    save_file({WINDOWS: input_ids.contiguous()}, path)


def optimum() -> dict[str, Any]:
    """Runs Optimum's `GPTQQuantizer.quantize_model` on the loaded dense model, then its `save`."""
    args = _arguments()
    from lord_quant.backends import gptq
    from lord_quant.runs.pipeline import Phases
    from lord_quant.silence import hush, import_hosts

    import_hosts()
    host = gptq.host()
    import torch
    from transformers import AutoModelForCausalLM

    samples, phases = _samples(args.windows), Phases()
    with phases.measure("load"):
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    with phases.measure("quantize"), hush("transformers"):
        quantizer = host.GPTQQuantizer(
            bits=args.bits, group_size=args.group_size, dataset=samples, model_seqlen=samples[0]["input_ids"].shape[1]
        )
        quantizer.quantize_model(model)
        synchronise()
    packed = _packed(model)
    quantizer.dataset = model.config.quantization_config["dataset"] = None  # tensors are no JSON, and `save` writes it
    with phases.measure("write"):
        quantizer.save(model, args.output)
    return {"seconds": phases.seconds, "packed": packed}


def gptqmodel() -> dict[str, Any]:
    """Runs GPTQModel's own `load`, `quantize` and `save`; it loads in the dtype it chooses, the stored one."""
    args = _arguments()
    import gptqmodel as host
    import torch

    from lord_quant.runs.pipeline import Phases

    samples, phases = _samples(args.windows), Phases()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with phases.measure("load"):
        settings = host.QuantizeConfig(bits=args.bits, group_size=args.group_size)
        model = host.GPTQModel.load(args.model, settings, device=device)
    with phases.measure("quantize"):
        model.quantize(samples, batch_size=1)
        synchronise()
    packed = _packed(model.model)
    with phases.measure("write"):
        model.save(args.output)
    return {"seconds": phases.seconds, "packed": packed}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--windows", required=True, metavar="FILE.safetensors")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


def _samples(path: str) -> list[dict[str, Any]]:
    """Returns windows as both libraries take them: one at a time, with a mask."""
    import torch
    from safetensors.torch import load_file

    rows = load_file(path)[WINDOWS].split(1)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def _packed(model: Any) -> int:
    return sum(hasattr(layer, "qweight") for layer in model.modules())
