# SPDX-License-Identifier: Apache-2.0
"""What decomposition and quantization cost in perplexity, each alone and stacked naively.

Every row is a checkpoint written by the real command line and loaded again; bytes and bits per weight are summed over the
tensors in its files. Calibration and held-out text must be disjoint; that is the caller's responsibility.

    python eval/reference.py --model DIR --calibration code.jsonl --heldout other.jsonl --output results.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate
from variants import Clock, Variant, compress, lord, variants, write_json


def main() -> None:
    """Runs all rows and seeds, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--rank-ratio", type=float, default=0.75)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=320, help="held-out windows of --seq-len tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--humaneval", action="store_true", help="also greedy pass@1; runs generated code")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    clock = Clock()
    rows = []
    for variant in variants(args.rank_ratio, gptq_bits=(4, 3), stacked_bits=(8, 4)):
        for seed in args.seeds if variant.flags else args.seeds[:1]:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure_row(variant, seed, Path(folder), args) | {"label": variant.label, "seed": seed})
            print(rows[-1], flush=True)
    dense = rows[0]["perplexity"]
    for row in rows:
        row["over_dense"] = row["perplexity"] / dense - 1
    settings = {
        key: Path(value).name if key in ("model", "calibration", "heldout") else value for key, value in vars(args).items()
    }
    settings.pop("output")
    write_json(args.output, {"settings": settings, "rows": rows})
    table = [[r["label"], r["seed"], f"{r['bpw']:.3f}", f"{r['perplexity']:.3f}", f"{r['over_dense']:+.2%}"] for r in rows]
    print(tabulate(table, ["", "seed", "bpw", "perplexity", "over dense"], disable_numparse=True))
    print(f"took {clock}; written to {args.output}")


def measure_row(variant: Variant, seed: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Compresses, reloads and measures one row."""
    import torch

    from lord_quant.silence import import_hosts

    import_hosts()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lord_quant
    from lord_quant.corpus import load_corpus
    from lord_quant.evaluation.perplexity import corpus_perplexity

    common: tuple[str, ...] = ("--group-size", str(args.group_size), "--force-rank", "--dataset", args.calibration)
    common += ("--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len), "--seed", str(seed))
    where, seconds = compress(variant, args.model, folder, common)
    stored = lord_quant.measure(where)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    result = corpus_perplexity(
        model,
        AutoTokenizer.from_pretrained(where),
        load_corpus(args.heldout),
        window=args.seq_len,
        max_windows=args.windows,
        batch_size=8,
    )
    scores: dict[str, Any] = {}
    if args.humaneval:
        output = folder / "humaneval.json"
        flags = ("--dtype", "float32", "--batch-size", "41", "--confirm-run-unsafe-code", "--output", str(output))
        lord("eval", "--model", where, "--tasks", "lord_humaneval", *flags)
        scores["pass@1"] = json.loads(output.read_text(encoding="utf-8"))["metrics"]["lord_humaneval"]["pass@1"]
    return scores | {
        "bpw": stored.bpw,
        "tensor_bytes": stored.tensor_bytes,
        "perplexity": result.perplexity,
        "num_tokens": result.num_tokens,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
