# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of a joint run as a model gets deeper, beside Optimum GPTQ of the same dense model.

Models are StarCoder-shaped with random weights and differ in the number of blocks alone. Every run is the real command line
in a process of its own, whose peak resident memory is what the system says at its end; subtracted is that of a process that
imports everything and does nothing. Optimum GPTQ is the naive stack without decomposition.

    python eval/memory.py --tokenizer DIR --calibration code.jsonl --output memory.json
    python eval/memory.py --width 2048 --blocks 12 24 ...      # StarCoder-1B's shape

The table lies beside the JSON as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from processes import COMMAND_LINE, IMPORTS, measured
from provenance import revision
from random_model import make_model
from tables import grid
from variants import Clock, write_json


SCHEMES = {
    "joint": ("--stack", "joint", "--rank-ratio", "0.5"),
    "Optimum GPTQ": ("--stack", "naive", "--rank-ratio", "1"),
}
NOTE = (
    "Memory: peak resident memory of the whole process less that of one that imports everything, MB. Weights: those of the "
    "dense model as it is stored, in bfloat16. Seconds: of the run as its report has them, imports not counted."
)


def main() -> None:
    """Runs all sizes, prints the table, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="model folder whose tokenizer is used")
    parser.add_argument("--calibration", required=True, metavar="DATA", help="calibration text: file or folder")
    parser.add_argument("--width", type=int, default=1024, help="hidden size (default: 1024)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 12], help="sizes (default: 6 12)")
    parser.add_argument("--num-samples", type=int, default=8, help="calibration windows (default: 8)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    clock, rows = Clock(), list[dict[str, Any]]()
    baseline = measured(IMPORTS).peak_bytes
    settings: dict[str, Any] = {"baseline_mb": round(baseline / 1e6)}
    settings |= {name: getattr(args, name) for name in ("width", "num_samples", "seq_len")}
    settings |= {"threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1), "revision": revision()}
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            size = make_model(args.tokenizer, model, args.width, blocks)
            common = ("--dataset", args.calibration, "--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len))
            for scheme in args.schemes:
                flags = (*SCHEMES[scheme], *common, "--bits", "4", "--group-size", "128")
                rows.append({"blocks": blocks, "scheme": scheme, "weight_bytes": size} | run(model, flags, baseline))
                print(f"{blocks} blocks, {scheme}: {rows[-1]} ({clock})", flush=True)
                write_json(args.output, {"settings": settings, "rows": rows})
    shown = f"{table(rows)}\n\n{NOTE}"
    args.output.with_suffix(".md").write_text(f"{shown}\n", encoding="utf-8")
    print(f"\n{shown}\n\nwritten to {args.output} and {args.output.with_suffix('.md')}")


def run(model: Path, flags: tuple[str, ...], baseline: int) -> dict[str, Any]:
    """Compresses a model; returns megabytes above the baseline's bytes, and seconds."""
    output = model.parent / "output"
    cost = measured(COMMAND_LINE, "lord", "quantize", "--no-verify", "--model", str(model), "--output", str(output), *flags)
    report = json.loads((output / "lord_report.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)
    return {"memory_mb": round((cost.peak_bytes - baseline) / 1e6), "seconds": report["seconds"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Renders the rows, and how memory and time of the deepest model compare with the shallowest one's."""
    cells = []
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        own = [row for row in rows if row["scheme"] == scheme]
        for row in own:
            cells.append([scheme, str(row["blocks"]), f"{row['weight_bytes'] / 1e6:.0f}", f"{row['memory_mb']}",
                          f"{row['seconds']['total']:.0f}"])  # fmt: skip
        first, last = own[0], own[-1]
        if first is not last:
            cells.append([f"{scheme}, ratio", f"{last['blocks'] / first['blocks']:.2f}",
                          f"{last['weight_bytes'] / first['weight_bytes']:.2f}",
                          f"{last['memory_mb'] / first['memory_mb']:.2f}",
                          f"{last['seconds']['total'] / first['seconds']['total']:.2f}"])  # fmt: skip
    return grid(["", "blocks", "weights, MB", "memory, MB", "seconds"], cells)


if __name__ == "__main__":
    main()
