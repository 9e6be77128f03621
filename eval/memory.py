# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of a joint run as a model gets deeper, beside Optimum GPTQ of the same dense model.

Models are StarCoder-shaped with random weights and differ in the number of blocks alone. Every run is the real command line
in a process of its own, whose peak resident memory is what the system says at its end; subtracted is that of a process that
imports everything and does nothing. Optimum GPTQ is the naive stack without decomposition. A run may be given a limit of
processor time: what it took until then is a lower bound of what all of it takes.

    python eval/memory.py --tokenizer DIR --calibration code.jsonl --output memory.json
    python eval/memory.py --width 2048 --blocks 12 24 --limit 900 ...      # StarCoder-1B's shape

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

from processes import COMMAND_LINE, IMPORTS, Cost, measured
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
    "dense model as it is stored, in bfloat16. Seconds: of all processors, those of the imports subtracted. ≥: the run was "
    "ended at its limit of time."
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
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="processor seconds after which Optimum GPTQ is ended"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    clock, rows = Clock(), list[dict[str, Any]]()
    baseline = measured(IMPORTS)
    settings: dict[str, Any] = {"baseline_mb": round(baseline.peak_bytes / 1e6)}
    settings |= {name: getattr(args, name) for name in ("width", "num_samples", "seq_len")}
    settings |= {"threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1), "revision": revision()}
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            size = make_model(args.tokenizer, model, args.width, blocks)
            common = ("--dataset", args.calibration, "--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len))
            for scheme in args.schemes:
                flags = (*SCHEMES[scheme], *common, "--bits", "4", "--group-size", "128")
                limit = None if scheme == "joint" else args.limit
                took = run(model, flags, baseline, limit)
                rows.append({"blocks": blocks, "scheme": scheme, "weight_bytes": size} | took)
                print(f"{blocks} blocks, {scheme}: {rows[-1]} ({clock})", flush=True)
                write_json(args.output, {"settings": settings, "rows": rows})
    shown = f"{table(rows)}\n\n{NOTE}"
    args.output.with_suffix(".md").write_text(f"{shown}\n", encoding="utf-8")
    print(f"\n{shown}\n\nwritten to {args.output} and {args.output.with_suffix('.md')}")


def run(model: Path, flags: tuple[str, ...], baseline: Cost, limit: float | None) -> dict[str, Any]:
    """Compresses a model; returns megabytes and processor seconds above the baseline's, and seconds by phase."""
    output = model.parent / "output"
    flags = ("--no-verify", "--model", str(model), "--output", str(output), *flags)
    cost = measured(COMMAND_LINE, "lord", "quantize", *flags, limit=limit)
    report = json.loads((output / "lord_report.json").read_text(encoding="utf-8")) if cost.finished else {"seconds": None}
    shutil.rmtree(output, ignore_errors=True)
    return {
        "memory_mb": round((cost.peak_bytes - baseline.peak_bytes) / 1e6),
        "processor_s": round(cost.processor_s - baseline.processor_s, 1),
        "finished": cost.finished,
        "seconds": report["seconds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Renders the rows, and how memory and time of the deepest model compare with the shallowest one's."""
    cells = []
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        own = [row for row in rows if row["scheme"] == scheme]
        for row in own:
            least = "" if row["finished"] else "≥ "
            cells.append([scheme, str(row["blocks"]), f"{row['weight_bytes'] / 1e6:.0f}", f"{least}{row['memory_mb']}",
                          f"{least}{row['processor_s']:.0f}"])  # fmt: skip
        first, last = own[0], own[-1]
        if first is not last and first["finished"] and last["finished"]:
            cells.append([f"{scheme}, ratio", f"{last['blocks'] / first['blocks']:.2f}",
                          f"{last['weight_bytes'] / first['weight_bytes']:.2f}",
                          f"{last['memory_mb'] / first['memory_mb']:.2f}",
                          f"{last['processor_s'] / first['processor_s']:.2f}"])  # fmt: skip
    return grid(["", "blocks", "weights, MB", "memory, MB", "seconds"], cells)


if __name__ == "__main__":
    main()
