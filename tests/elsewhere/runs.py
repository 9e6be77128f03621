# SPDX-License-Identifier: Apache-2.0
"""Runs on the processor and on `elsewhere`, in a process of their own: a device is registered once and for all.

python -m elsewhere.runs BUILD MODELS CORPUS FOUND.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from elsewhere.device import NAME, install


SHORT = {"num_samples": 8, "seq_len": 64, "batch_size": 2}
HALF = {"rank_ratio": 0.5, "force_rank": True}


def errors_of(report: dict[str, Any]) -> dict[str, float]:
    """Returns every layer's relative error."""
    return {layer["name"]: layer["rel_stacked_error"] for layer in report["layers"]}


def given(model: Path, corpus: str, device: str, bits: int, **lowrank: Any) -> dict[str, float]:
    """Runs a streamed job of given ranks."""
    from lord_quant.config import LordConfig
    from lord_quant.runs.execution import execute
    from lord_quant.runs.pipeline import prepare

    values = {"calibration": {"dataset": corpus, **SHORT}, "gptq": {"bits": bits, "group_size": 32}}
    output = model.parent / f"{model.name}-{device}-{bits}-{len(lowrank)}"
    job = LordConfig.from_dict(
        {"model": str(model), "output": str(output), "device": device, "lowrank": HALF | lowrank, **values}
    )
    return errors_of(execute(prepare(job)))


def budget(model: Path, corpus: str, device: str) -> dict[str, float]:
    """Runs the sensitivity pass, plans and runs the plan."""
    from lord_quant.budget_config import BudgetConfig
    from lord_quant.budgets.budget import Planner
    from lord_quant.budgets.menu import Menu
    from lord_quant.budgets.plan_file import apply_plan
    from lord_quant.config import LordConfig
    from lord_quant.losses.sensing import sense, unplanned
    from lord_quant.runs.execution import execute
    from lord_quant.runs.pipeline import prepare

    calibration = {"dataset": corpus, **SHORT}
    run = {"model": str(model), "device": device, "calibration": calibration, "lowrank": {"rank_ratio": 1}}
    config = unplanned(LordConfig.from_dict(run))
    planner = Planner(config, sense(config), Menu())
    allocation = planner.choose(BudgetConfig(target_bpw=3.0))
    output = model.parent / f"{model.name}-{device}-budget"
    planned = dataclasses.replace(apply_plan(config, planner.settings(allocation)), output=str(output))
    found = errors_of(execute(prepare(planned)))
    return found | {"predicted": allocation.loss}


def loaded(model: Path, corpus: str, device: str) -> dict[str, float]:
    """Compresses while a model is loaded onto the device, and runs it there."""
    from transformers import AutoModelForCausalLM

    from lord_quant import LordGPTQConfig

    config = LordGPTQConfig(bits=4, group_size=32, rank_ratio=0.5, dataset=corpus, num_samples=8, seq_len=64)
    made = AutoModelForCausalLM.from_pretrained(model, device_map={"": device}, quantization_config=config)
    tokens = torch.arange(48).view(2, 24).to(device)
    with torch.no_grad():
        logits = made(tokens).logits
    assert {tensor.device.type for tensor in (*made.parameters(), *made.buffers(), logits)} == {device}
    return {"nll": float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()))}


def loops(device: torch.device) -> dict[str, list[float]]:
    """What the loops make of the same columns here and there: all they return and all they write, one after the other."""
    from lord_quant.rounding import kernels

    draw = torch.Generator().manual_seed(0)
    columns, seen = 3 + 2 * torch.randn(16, 40, generator=draw), torch.randn(16, 64, generator=draw)
    metric = seen @ seen.T / 64 + 0.1 * torch.eye(16)
    upper, mix = torch.linalg.cholesky(metric).T, 0.1 * torch.randn(40, 40, generator=draw)
    here = {name: each.to(device) for name, each in {"t": columns, "h": metric, "u": upper, "m": mix}.items()}
    grids = [each.to(device) for each in (torch.rand(5, 40, generator=draw) + 0.1, torch.full((5, 40), 3.0))]
    spread = torch.zeros(16, 80, device=device)
    codes = {name: spread[:, ::2].clone() for name in ("rounded", "coupled")} | {"spread": spread[:, ::2]}
    start = here["t"].round().clamp(0, 7)
    moved = {"alone": start.clone(), "together": start.clone()}
    made = [
        kernels.round_columns(here["t"].clone(), here["u"], codes["rounded"], 7),
        kernels.round_columns(here["t"].clone(), here["u"], codes["spread"], 7),
        kernels.round_coupled(here["t"].clone(), here["t"], here["u"], here["m"], codes["coupled"], 7),
        kernels.descend_columns(moved["alone"], start - here["t"], here["h"], 7),
        kernels.descend_coupled(moved["together"], start - here["t"], here["h"], here["m"], 7),
        kernels.grid_errors(here["t"], *grids, 7),
    ]
    assert {each.device for each in made} == {here["t"].device}
    everything = [*made, *codes.values(), *moved.values()]
    return {"values": torch.cat([each.flatten() for each in everything]).tolist()}


def meetings(device: torch.device) -> dict[str, str]:
    """What is said where something was left on the processor; the device would show nothing if it let that pass."""
    there, found = torch.ones(3, 3, device=device), dict[str, str]()
    for name, meet in {
        "sum": lambda: there + torch.ones(3, 3),
        "product": lambda: there @ torch.ones(3, 3),
        "write": lambda: there.copy_(torch.ones(3, 3)).addmm_(there, torch.ones(3, 3)),
        "mask": lambda: torch.where(torch.ones(3, 3) > 0, there, there),
        "drawn": lambda: torch.randn(3, generator=torch.Generator(), device=device),
    }.items():
        try:
            meet()
        except RuntimeError as error:
            found[name] = str(error)
    return found


def main(build: str, models: str, corpus: str, output: str) -> None:
    """Runs everything, writes what was found."""
    device, folder = install(Path(build)), Path(models)
    found: dict[str, Any] = {"meetings": meetings(device)}
    bigcode, half, llama = (folder / name for name in ("gpt_bigcode", "gpt_bigcode-half", "llama-half"))
    for where in ("cpu", NAME):
        found[where] = {
            "loops": loops(torch.device(where)),
            "float": given(bigcode, corpus, where, 16),
            "bigcode": given(half, corpus, where, 4),
            "llama": given(llama, corpus, where, 4),
            "pivoted": given(half, corpus, where, 4, form="pivoted"),
            "budget": budget(half, corpus, where),
            "loaded": loaded(half, corpus, where),
        }
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
