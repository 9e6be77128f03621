# SPDX-License-Identifier: Apache-2.0
"""Runs AutoGPTQ's own layers on tensors of checkpoints. `legacy_gptq.py` starts it in AutoGPTQ's environment.

    python legacy_gptq_child.py JOBS.json

A job names a checkpoint's weights, inputs of its packed layers, bits, group size, and whether there is an activation order.
Written for every layer that has inputs: its weight (in, out), which is what it makes of a unit matrix in float32, and its
outputs, once in float32 and once in float16, which is how AutoGPTQ's models run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from auto_gptq.utils.import_utils import dynamically_import_QuantLinear
from safetensors.torch import load_file, save_file


PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")


def run(job: dict[str, Any]) -> None:
    """Runs all layers of a checkpoint."""
    # The choice that AutoGPTQ makes by itself where CUDA's kernels are not there.
    kind: Any = dynamically_import_QuantLinear(
        use_triton=False,
        desc_act=job["desc_act"],
        group_size=job["group_size"],
        bits=job["bits"],
        disable_exllama=True,
        disable_exllamav2=True,
    )
    stored, found = load_file(job["checkpoint"]), dict[str, torch.Tensor]()
    for name, x in load_file(job["inputs"]).items():
        tensors = {part: stored[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in stored}
        layer = kind(job["bits"], job["group_size"], x.shape[1], tensors["scales"].shape[1], "bias" in tensors)
        layer.load_state_dict(tensors, strict=True)
        with torch.no_grad():
            found[f"{name}.float16"] = layer.half()(x)
            layer.float()
            found[f"{name}.float32"] = layer(x.float())
            layer.bias = None
            found[f"{name}.weight"] = layer(torch.eye(x.shape[1]))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, job["outputs"])


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(each)
