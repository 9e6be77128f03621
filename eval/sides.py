# SPDX-License-Identifier: Apache-2.0
"""What two-sided rounding saves, layer by layer, on text it was not chosen on.

The calibration text is cut in two. One half says how a layer is rounded, in its metric of inputs and outputs; the other
says what that costs, in its own: ½ tr G D H Dᵀ nats per token. Layers stay dense, or are truncated to half their rank, of
which only what rounding adds is counted. Compared is rounding with outputs taken as independent, as GPTQ takes them,
polished alike; one half's first few windows tell what metrics of few tokens are worth.

    python eval/sides.py --model DIR --calibration code.jsonl --output sides.json

The table lies beside the JSON as Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from provenance import digests, model_name, revision
from tables import grid
from variants import Clock, write_json


if TYPE_CHECKING:
    from bench import Layer
    from torch import nn

BITS = (2, 3, 4)
FLOAT = 16
GROUP_SIZE = 64
FORMS = ("dense", "two_factor", "pivoted", "column_pivoted")
FEW = 8
"""Windows that a metric of few tokens is measured on."""
NOTE = (
    "Loss that rounding adds, two-sided over one-sided, on the half of the text that did not choose: medians over layers "
    "and over 2, 3 and 4 bits, with the smallest and largest. few, of dense layers: with the outputs' metric from the "
    "first {few} windows. over pivoted: two-sided, over what it adds in the pivoted form at the same rank and bits."
)
WAYS = ("two-sided", "few", "over pivoted")
"""Columns of the table."""


def main() -> None:
    """Runs all layers, prints the table, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the dense model")
    parser.add_argument("--calibration", required=True, metavar="DATA", help="calibration text: file or folder")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows, both halves (default: 128)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 2, 4], help="which blocks (default: 0 2 4)")
    parser.add_argument("--seed", type=int, default=0, help="of windows and rotations (default: 0)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="results; the table goes beside it")
    args = parser.parse_args()
    clock, settings = (
        Clock(),
        {key: value for key, value in vars(args).items() if key in ("num_samples", "seq_len", "seed")},
    )
    settings |= text_of(args.calibration)
    content: dict[str, Any] = {"settings": settings, "models": digests([args.model]), "revision": revision()}
    rows: list[dict[str, Any]] = []
    for chooses, judges, few in collected(args):
        if chooses.site.block in args.blocks:
            rows += compare(chooses, judges, few, args.seed)
            print(f"{chooses.site.name} ({clock})", flush=True)
    content |= {"rows": rows, "summary": summarise(rows)}
    write_json(args.output, content)
    shown = f"### {model_name(args.model)}\n\n{table(content['summary'])}\n\n{NOTE.format(few=FEW)}"
    args.output.with_suffix(".md").write_text(f"{shown}\n", encoding="utf-8")
    print(f"\n{shown}\n\nwritten to {args.output} and .md after {clock}")


def text_of(calibration: str) -> dict[str, str]:
    """Returns what the text is called, and its digest; paths are not published."""
    from lord_quant.corpus import load_corpus

    corpus = load_corpus(calibration, split="calibration")
    return {"calibration": corpus.source, "calibration_sha256": corpus.sha256}


def collected(args: argparse.Namespace) -> list[tuple[Layer, Layer, Layer]]:
    """Returns every layer as one half of the text sees it, as the other does, and as the first few windows do."""
    from lord_quant.silence import import_hosts

    import_hosts()
    import torch
    from bench import collect

    from lord_quant.blocks.source import inspect_source, load_model
    from lord_quant.calibration import sample_windows
    from lord_quant.corpus import load_corpus

    source = inspect_source(args.model)
    corpus = load_corpus(args.calibration, split="calibration")
    how = {"num_samples": args.num_samples, "seq_len": args.seq_len, "seed": args.seed}
    one, other = sample_windows(corpus, source.tokenizer, **how).input_ids.tensor_split(2)
    model = load_model(source, torch.device("cpu"))
    parts = ((one, one), (other, other), (one, one[:FEW]))
    seen = [collect(model, own.split(4), back.split(4), args.seed + at) for at, (own, back) in enumerate(parts)]
    return list(zip(*seen, strict=True))


def compare(chooses: Layer, judges: Layer, few: Layer, seed: int) -> list[dict[str, Any]]:
    """Rounds one layer in every form at every width, one-sided and two-sided."""
    from lord_quant.config import JointConfig

    one, two = (JointConfig(two_sided=both) for both in (False, True))
    rows = []
    for form in FORMS:
        rank = None if form == "dense" else half_rank(chooses)
        cut = 0.0 if rank is None else loss_on(judges, chooses.compress(form, rank, FLOAT, GROUP_SIZE, seed))
        for bits in BITS:
            made = {
                "one-sided": chooses.compress(form, rank, bits, GROUP_SIZE, seed, one),
                "two-sided": chooses.compress(form, rank, bits, GROUP_SIZE, seed, two),
            }
            if rank is None:  # factors of few tokens are also truncated otherwise
                made["few"] = few.compress(form, rank, bits, GROUP_SIZE, seed, two)
            lost = {way: loss_on(judges, layer) - cut for way, layer in made.items()}
            rows.append({"layer": chooses.site.name, "kind": chooses.kind, "form": form, "bits": bits, "lost": lost})
    return rows


def half_rank(layer: Layer) -> int:
    """Returns half the full rank, a multiple of the group size."""
    return max(1, min(layer.site.in_features, layer.site.out_features) // 2 // GROUP_SIZE) * GROUP_SIZE


def loss_on(layer: Layer, made: nn.Module) -> float:
    """Returns ½ tr G D H Dᵀ, D what was made of a layer instead of it: nats per token where its bias takes up the mean."""
    from lord_quant.halves import energy
    from lord_quant.targets import dense_weight

    error = (dense_weight(made) - dense_weight(layer.module)).detach()
    return energy(error, layer.moments.covariance, layer.sensitivity) / 2


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns, by type of layer and form, losses over those they are compared with: median, smallest and largest."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        for kind in (row["kind"], "all"):
            groups.setdefault((kind, row["form"]), []).append(row)
    pivoted = {(row["layer"], row["bits"]): row["lost"] for row in rows if row["form"] == "pivoted"}

    def ratio(row: dict[str, Any], way: str) -> float | None:
        lost, other = row["lost"], row["lost"]["one-sided"]
        if way == "over pivoted":
            if row["form"] in ("dense", "pivoted"):
                return None
            way, other = "two-sided", pivoted.get((row["layer"], row["bits"]), {}).get("two-sided", 0.0)
        return lost[way] / other if way in lost and other > 0 else None

    lines = []
    for (kind, form), found in sorted(groups.items(), key=lambda item: (item[0][0] == "all", item[0])):
        line: dict[str, Any] = {"kind": kind, "form": form, "n": len(found)}
        for way in WAYS:
            ratios = [each for each in (ratio(row, way) for row in found) if each is not None]
            line[way] = {"median": median(ratios), "min": min(ratios), "max": max(ratios)} if ratios else None
        lines.append(line)
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Renders the summary."""
    cells = [[line["kind"], line["form"], line["n"], *(_cell(line[way]) for way in WAYS)] for line in lines]
    return grid(["layers", "form", "n", *WAYS], cells)


def _cell(values: dict[str, float] | None) -> str:
    if values is None:
        return "-"
    return f"{values['median']:.2f} ({values['min']:.2f} … {values['max']:.2f})"


if __name__ == "__main__":
    main()
