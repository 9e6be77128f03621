# SPDX-License-Identifier: Apache-2.0
"""What a whole joint run costs in time, against unmodified Optimum GPTQ of the dense model on the same machine.

Both run in this one process, on the same calibration windows, each time on a freshly loaded model; which of the two goes
first alternates. Timed is compression alone: imports, reading text and loading the model are not counted, nor is writing.
Optimum's quantizer stays at its defaults but for bits, group size and the windows. Set OMP_NUM_THREADS to choose threads.

    python eval/cost.py --model DIR --calibration code.jsonl --output cost.json
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any


# Before the hosts are imported: neither side compiles a packing extension, neither draws progress bars.
os.environ.update(GPTQMODEL_DISABLE_PACK_EXT="1", TQDM_DISABLE="1")

from provenance import revision
from tables import grid
from variants import write_json


def main() -> None:
    """Times both sides, prints medians and their ratio, writes JSON after every repeat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the dense model")
    parser.add_argument("--calibration", required=True, metavar="DATA", help="calibration text: file or folder")
    parser.add_argument("--stack", default="joint", help="what is timed against Optimum (default: joint)")
    parser.add_argument("--rank-ratio", type=float, default=0.75, help="forced on all layers (default: 0.75)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    job = prepare_job(args)
    runs: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        run: dict[str, Any] = {"first": "ours" if repeat % 2 == 0 else "optimum"}
        for side in ("ours", "optimum") if run["first"] == "ours" else ("optimum", "ours"):
            run[side], phases = time_ours(job) if side == "ours" else (time_optimum(job), {})
            run |= {"phases": phases} if phases else {}
        runs.append(run)
        print(f"[{repeat + 1}/{args.repeats}] {args.stack} {run['ours']:.1f} s, Optimum {run['optimum']:.1f} s", flush=True)
        write_json(args.output, {"settings": settings(args, job), "runs": runs, "summary": summarise(runs)})
    print(f"\n{markdown(summarise(runs), args.stack)}\n\nwritten to {args.output}")


def prepare_job(args: argparse.Namespace) -> Any:
    """Checks the run and reads its calibration windows; imports everything that either side needs."""
    from lord_quant.silence import import_hosts

    import_hosts()
    import lord_quant
    from lord_quant.backends import gptq

    gptq.host()
    return lord_quant.prepare(
        lord_quant.LordConfig(
            model=args.model,
            stack=args.stack,
            lowrank=lord_quant.LowrankConfig(rank_ratio=args.rank_ratio, force_rank=True),
            gptq=lord_quant.GptqConfig(bits=args.bits, group_size=args.group_size),
            calibration=lord_quant.CalibrationConfig(
                dataset=args.calibration, num_samples=args.num_samples, seq_len=args.seq_len, seed=args.seed
            ),
        )
    )


def fresh_model(job: Any) -> Any:
    """Loads the dense model, after what an earlier run left behind is gone."""
    from lord_quant.source import load_model

    gc.collect()
    return load_model(job.source, job.device)


def time_ours(job: Any) -> tuple[float, dict[str, float]]:
    """Returns the seconds of a whole run of ours, and those of its phases."""
    from lord_quant.pipeline import compress_model

    model = fresh_model(job)
    start = time.perf_counter()
    done = compress_model(model, job.plan, job.windows, job.config)
    synchronise(job)
    return time.perf_counter() - start, done.seconds


def time_optimum(job: Any) -> float:
    """Returns the seconds of unmodified Optimum GPTQ on the dense model.

    Raises:
        SystemExit: It left a linear layer as it was, so the times do not compare.
    """
    from lord_quant.backends import gptq
    from lord_quant.silence import hush

    module, model = gptq.host(), fresh_model(job)
    start = time.perf_counter()
    quantizer = module.GPTQQuantizer(
        bits=job.plan.bits,
        group_size=job.plan.group_size,
        dataset=job.windows.as_samples(),
        model_seqlen=job.windows.input_ids.shape[1],
    )
    with hush("transformers"):
        quantizer.quantize_model(model)
    synchronise(job)
    seconds = time.perf_counter() - start
    packed = sum(hasattr(layer, "qweight") for layer in model.modules())
    if packed != len(job.plan.layers):
        raise SystemExit(f"Optimum quantized {packed} linear layers; wanted {len(job.plan.layers)}")
    return seconds


def synchronise(job: Any) -> None:
    """Waits for a GPU, which computes behind our back."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns median, smallest and largest seconds of each side, the ratio, and median seconds per phase."""
    sides = {side: [run[side] for run in runs] for side in ("ours", "optimum")}
    summary: dict[str, Any] = {
        side: {"median": median(seconds), "min": min(seconds), "max": max(seconds)} for side, seconds in sides.items()
    }
    pairs = [run["ours"] / run["optimum"] for run in runs]
    summary["ratio_of_medians"] = summary["ours"]["median"] / summary["optimum"]["median"]
    summary |= {"ratio_min": min(pairs), "ratio_max": max(pairs)}
    names = dict.fromkeys(name for run in runs for name in run["phases"])
    return summary | {"phases": {name: median(run["phases"].get(name, 0.0) for run in runs) for name in names}}


def markdown(summary: dict[str, Any], stack: str) -> str:
    """Renders the summary."""
    lines = [
        [title, *(f"{summary[side][key]:.1f}" for key in ("median", "min", "max"))]
        for title, side in ((f"{stack} stack", "ours"), ("Optimum GPTQ, dense", "optimum"))
    ]
    lines.append(["ratio", *(f"{summary[key]:.2f}" for key in ("ratio_of_medians", "ratio_min", "ratio_max"))])
    phases = [[name, f"{seconds:.1f}"] for name, seconds in summary["phases"].items()]
    return f"{grid(['seconds', 'median', 'min', 'max'], lines)}\n\n{grid([f'{stack}: phase', 'seconds'], phases)}"


def settings(args: argparse.Namespace, job: Any) -> dict[str, Any]:
    """Returns what was run, on what; paths are not published."""
    import torch

    values = {key: value for key, value in vars(args).items() if key != "output"}
    values |= {"model": Path(args.model).resolve().name, "calibration": job.windows.source}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {name: version(name) for name in ("torch", "transformers", "optimum", "gptqmodel")}
    values |= {"windows_sha256": job.windows.sha256, "device": device, "threads": torch.get_num_threads()}
    return values | {"revision": revision(), "versions": versions}


if __name__ == "__main__":
    main()
