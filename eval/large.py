# SPDX-License-Identifier: Apache-2.0
"""How long a model of StarCoder-15.5B's shape takes on one GPU, from a few of its blocks.

The model has the width, vocabulary and heads of the large one, random weights, and only some of its blocks: all of them are
alike, and one is at work at a time. It is decomposed alone, and decomposed with both factors quantized, by the real command
line in a process of its own. Seconds per block times the number of blocks are a projection of the whole run; memory does
not depend on that number.

    python eval/large.py --tokenizer DIR --calibration code.jsonl --output large.json
    python eval/large.py --width 2048 --blocks 3 --all-blocks 24 ...        # another model

The table lies beside the JSON as Markdown.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from processes import COMMAND_LINE, measured
from provenance import revision
from random_model import make_model
from tables import grid
from variants import Clock, write_json


SCHEMES = {"decomposed": ("--bits", "16"), "decomposed, both factors at 4 bits": ("--bits", "4", "--group-size", "128")}
NOTE = (
    "All blocks: seconds of the blocks that ran times how many there are in the whole model over how many ran, loading, "
    "sensitivities, compressing and writing; **projected**, the rest is measured. The process's imports are not counted."
)


def main() -> None:
    """Makes the model, compresses it every way, prints the table, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="model folder whose tokenizer is used")
    parser.add_argument("--calibration", required=True, metavar="DATA", help="calibration text: file or folder")
    parser.add_argument("--width", type=int, default=6144, help="hidden size (default: 6144)")
    parser.add_argument("--vocabulary", type=int, default=49152, help="rows of the embedding (default: 49152)")
    parser.add_argument("--blocks", type=int, default=3, help="blocks that run (default: 3)")
    parser.add_argument("--all-blocks", type=int, default=40, help="blocks of the whole model (default: 40)")
    parser.add_argument("--rank-ratio", type=float, default=0.75, help="forced on all layers (default: 0.75)")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows (default: 128)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per window (default: 2048)")
    parser.add_argument("--device", default="cuda", help="where to run (default: cuda)")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "tokenizer", "calibration")}
    settings |= {"hardware": _hardware(args.device), "revision": revision()}
    clock, rows = Clock(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        settings["weight_bytes"] = make_model(
            args.tokenizer, model, args.width, args.blocks, args.vocabulary, device=args.device
        )
        for scheme in args.schemes:
            rows.append({"scheme": scheme} | run(model, scheme, args))
            print(f"{scheme}: {rows[-1]} ({clock})", flush=True)
            write_json(args.output, {"settings": settings, "rows": rows})
    shown = f"{title(settings)}\n\n{table(rows, args.blocks, args.all_blocks)}\n\n{NOTE}"
    args.output.with_suffix(".md").write_text(f"{shown}\n", encoding="utf-8")
    print(f"\n{shown}\n\nwritten to {args.output} and {args.output.with_suffix('.md')}")


def run(model: Path, scheme: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compresses a model; returns seconds by phase, and bytes."""
    output = model.parent / "output"
    cost = measured(
        COMMAND_LINE, "lord", "quantize", "--no-verify", "--overwrite", "--model", str(model), "--output", str(output),
        "--stack", "joint", "--rank-ratio", str(args.rank_ratio), "--force-rank", "--dataset", args.calibration,
        "--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len), "--device", args.device, *SCHEMES[scheme],
    )  # fmt: skip
    report = json.loads((output / "lord_report.json").read_text(encoding="utf-8"))
    return {
        "seconds": report["seconds"],
        "wall_s": round(cost.wall_s, 1),
        "gpu_bytes": cost.gpu_bytes,
        "peak_bytes": cost.peak_bytes,
        "bpw": report["totals"]["bpw"],
    }


def table(rows: list[dict[str, Any]], blocks: int, all_blocks: int) -> str:
    """Renders what was measured, per block and in all, and what follows for the whole model."""
    cells = []
    for row in rows:
        seconds = row["seconds"]["total"]
        gpu = "" if row["gpu_bytes"] is None else f"{row['gpu_bytes'] / 1e9:.1f}"
        cells.append([row["scheme"], f"{row['bpw']:.2f}", f"{seconds:.1f}", f"{seconds / blocks:.1f}",
                      f"{seconds / blocks * all_blocks / 60:.1f}", gpu, f"{row['peak_bytes'] / 1e9:.1f}"])  # fmt: skip
    heads = ["", "bits per weight", f"{blocks} blocks, s", "a block, s", f"all {all_blocks} blocks, min"]
    return grid([*heads, "GPU memory, GB", "memory, GB"], cells)


def title(settings: dict[str, Any]) -> str:
    """Says what ran where."""
    shape = f"{settings['blocks']} blocks of width {settings['width']}, vocabulary {settings['vocabulary']}, random weights"
    tokens = f"{settings['num_samples']} x {settings['seq_len']} tokens"
    return f"{shape}, rank ratio {settings['rank_ratio']:g}, {tokens}, {settings['hardware']}"


def _hardware(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


if __name__ == "__main__":
    main()
