# SPDX-License-Identifier: Apache-2.0
"""The main job on the embedded model: five rows, one table, made by the real command line. `make demo` runs this.

The embedded model has memorised HumanEval on purpose, so that its pass@1 carries a signal when it is compressed. The
column shows what compression destroys; it says nothing about coding ability.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tabulate import tabulate
from variants import Clock, Variant, compress, lord, variants, write_json


HERE = Path(__file__).resolve().parent
MODEL = "pycoder-starcoder-humaneval"
NOTE = (
    "The model has memorised HumanEval on purpose: its pass@1 is a signal of what compression destroys, and says nothing "
    "about coding ability (answers are cut after 320 tokens; the longest solution has 315). "
    "Bits per byte and perplexity are on standard-library files that were not used for calibration; "
    "the model may have been trained on them."
)
EVALUATION = (
    "--tasks", "lord_humaneval,lord_code_ppl", "--perplexity", "--max-windows", "16",
    "--dtype", "float32", "--batch-size", "41", "--gen-kwargs", "max_gen_toks=320",
)  # fmt: skip
HEADERS = ("", "on disk", "bpw", "bits per byte", "perplexity", "HumanEval pass@1", "s to compress")


def main() -> None:
    """Compresses, evaluates, prints the table, writes JSON, Markdown and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("out/demo"), help="folder for demo.json, demo.md, demo.png")
    parser.add_argument("--rank-ratio", type=float, default=0.75)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clock = Clock()
    print("HumanEval runs code that the model generates, in a sandbox; running this demo is the consent it asks for.\n")
    common: tuple[str, ...] = ("--group-size", str(args.group_size), "--num-samples", str(args.num_samples))
    common += ("--seq-len", str(args.seq_len), "--seed", str(args.seed))
    table = variants(args.rank_ratio)
    workers = min(2, os.cpu_count() or 1)
    threads = max(1, (os.cpu_count() or 1) // workers)
    print(f"{len(table)} rows, {workers} at a time, {threads} thread(s) each; a few minutes.")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        # The copy's short name is what reports record as the base model.
        model = shutil.copytree(HERE / "models" / MODEL, Path(folder) / MODEL)
        # The row that takes longest goes first: a broken model generates until the limit.
        jobs = {
            variant.label: pool.submit(run_row, variant, str(model), Path(folder), common, threads)
            for variant in table[::-1]
        }
        rows = [add_sizes(jobs[variant.label].result()) for variant in table]
    settings = {key: value for key, value in vars(args).items() if key != "results"}
    settings |= {"model": MODEL, "rows_at_a_time": workers, "threads_each": threads, "evaluation": " ".join(EVALUATION)}
    shown = markdown(rows)
    write_json(args.results / "demo.json", {"settings": settings, "note": NOTE, "rows": rows})
    (args.results / "demo.md").write_text(f"{shown}\n\n{NOTE}\n", encoding="utf-8")
    draw(rows, args.results / "demo.png")
    print(f"\n{shown}\n\n{NOTE}\n\ntook {clock}; written to {args.results}/demo.json, demo.md, demo.png")


def run_row(variant: Variant, model: str, folder: Path, common: tuple[str, ...], threads: int) -> dict[str, Any]:
    """Makes and evaluates one row, in processes of their own; returns its scores and where it is."""
    # Unpacking 8-bit layers once instead of at every call changes no bit of the result.
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", "GPTQ_TORCH_CACHE_WEIGHTS": "1"}
    where, seconds = compress(variant, model, folder, common, quiet=True, environment=environment)
    if seconds is not None:
        print(f"  {variant.label}: compressed in {seconds:.0f} s", flush=True)
    output = folder / f"{Path(where).name}.json"
    lord(
        "eval", "--model", where, *EVALUATION,
        "--confirm-run-unsafe-code", "--output", str(output),
        quiet=True, environment=environment,
    )  # fmt: skip
    print(f"  {variant.label}: evaluated", flush=True)
    scores = json.loads(output.read_text(encoding="utf-8"))
    return {
        "label": variant.label,
        "where": where,
        "bits_per_byte": scores["metrics"]["lord_code_ppl"]["bits_per_byte"],
        "perplexity": scores["perplexity"]["perplexity"],
        "pass@1": scores["metrics"]["lord_humaneval"]["pass@1"],
        "seconds_to_compress": seconds,
    }


def add_sizes(row: dict[str, Any]) -> dict[str, Any]:
    """Replaces where a row's checkpoint is by what is stored there."""
    import lord_quant
    from lord_quant.silence import import_hosts

    import_hosts()
    stored = lord_quant.measure(row.pop("where"))
    return row | {"bytes_on_disk": stored.file_bytes, "bpw": stored.bpw}


def cells(row: dict[str, Any]) -> list[str]:
    """Renders one row."""
    seconds = row["seconds_to_compress"]
    return [
        row["label"],
        f"{row['bytes_on_disk'] / 1e6:.2f} MB",
        f"{row['bpw']:.2f}",
        f"{row['bits_per_byte']:.4f}",
        f"{row['perplexity']:.3f}",
        f"{row['pass@1']:.3f}",
        "-" if seconds is None else f"{seconds:.0f}",
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Renders the table."""
    return tabulate(
        [cells(row) for row in rows], HEADERS, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 6)
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws perplexity and pass@1 against stored bits per weight, with the table below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 1.5])
    left, right, below = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, :])
    panels = ((left, "perplexity", "perplexity (lower is better)"), (right, "pass@1", "HumanEval pass@1, memorised"))
    for axes, key, title in panels:
        for index, row in enumerate(rows):
            axes.scatter(row["bpw"], row[key], color=f"C{index}", s=60, zorder=3, label=row["label"])
        axes.set(xscale="log", xlabel="stored bits per weight of the linear layers, all in", title=title)
        axes.set_xlim(3.4, 20)
        axes.set_xticks([4, 8, 16], ["4", "8", "16"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    right.set_ylim(-0.05, 1.05)
    left.legend(frameon=False)
    below.axis("off")
    table = below.table([cells(row) for row in rows], colLabels=HEADERS, loc="center", cellLoc="right")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
