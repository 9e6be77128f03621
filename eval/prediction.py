# SPDX-License-Identifier: Apache-2.0
"""Predicted against measured loss: one layer compressed at a time, in many ways, everything else dense.

Layers of every type are chosen at random blocks. Each is truncated in float at several ranks, rounded dense at several
bits and group sizes, and compressed in ways of different form and bits that take the same bytes within 3 %, which is what
a plan chooses among. Measured is how much the cross entropy of held-out text rises over the dense model's, on the same
windows, its part of first order on more of them if asked for (`first_order.py`); also on calibration text, and the
divergence from the dense model's predictions, which has less noise.
Predicted is what `lord_quant/losses/probe.py` says: in the metric of the loss, with and without its slope, and of plain
output error. Last, all layers of a block, of a type, and of the model are compressed together: do losses add up?

    python eval/prediction.py --model DIR --calibration code.jsonl --heldout other.jsonl --output prediction.json

The tables lie beside the JSON as Markdown, the plot as PNG. Sensitivities are of as many calibration windows as for any
budget; a fourth of all are measured on, all for the part of first order.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agreement import BASES, draw, summarise, tables
from choices import RANK_STEP, SET_WIDTH, Choice, choices, form_of, parts
from provenance import digests, model_name, revision
from rows import Settings
from variants import Clock, write_json


if TYPE_CHECKING:
    import torch
    from bench import Layer
    from first_order import Change, Measured
    from torch import nn

    from lord_quant.losses.probe import LayerLoss

FIGURES = (
    "heldout",
    "heldout_error",
    "heldout_slope",
    "calibration",
    "calibration_slope",
    "heldout_divergence",
    "calibration_divergence",
)
"""What is measured of a compression, in nats per token."""
TOGETHER = {"truncated to 0.75": (0.75, 16, 64), "rounded to 3 bits": (None, 3, 64)}
"""What is done to many layers at once: rank ratio, bits, group size."""


class Losses(NamedTuple):
    """A layer's predicted losses, in nats per token.

    Attributes:
        fisher: All from the text that truncation is chosen on, in the metric of the loss.
        crossed: What truncation to every rank loses, chosen on one half of the calibration windows, on the other.
        counted: What a plan counts on, with the slope of the text's loss in truncation (`cut`) and in rounding.
    """

    fisher: LayerLoss
    crossed: list[float]
    counted: LayerLoss

    def of(self, choice: Choice) -> dict[str, float]:
        """Returns the predictions for a choice."""
        cut, rounded = parts(self.fisher, choice)
        crossed, sloped = (
            0.0 if choice.rank is None else float(tail[choice.rank]) for tail in (self.crossed, self.counted.cut)
        )
        return {"predicted": cut + rounded, "crossed": crossed + rounded, "sloped": sloped + parts(self.counted, choice)[1]}


def main() -> None:
    """Runs the experiment, prints the tables, writes JSON, Markdown and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the dense model")
    parser.add_argument("--calibration", required=True, metavar="DATA", help="calibration text: file or folder")
    parser.add_argument("--heldout", required=True, metavar="DATA", help="text to measure on, disjoint from the former")
    parser.add_argument("--num-samples", type=int, default=48, help="calibration windows (default: 48)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--windows", type=int, default=48, help="held-out windows of --seq-len tokens (default: 48)")
    parser.add_argument("--slope-windows", type=int, help="those for the part of first order (default: as many)")
    parser.add_argument("--seed", type=int, default=0, help="of windows, layers and probes (default: 0)")
    parser.add_argument("--layers", type=int, default=8, help="layers compressed one at a time (default: 8)")
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE.json",
        help="predict again what these results hold, and keep what was measured",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="results; tables go beside it")
    args = parser.parse_args()
    args.slope_windows = args.slope_windows or args.windows
    if args.layers < 1:
        raise SystemExit(f"--layers {args.layers}; wanted at least 1")
    if args.slope_windows < args.windows:
        raise SystemExit(f"--slope-windows {args.slope_windows}; wanted at least --windows, {args.windows}")
    clock, published = Clock(), digests([args.model])
    text = Settings(args.calibration, args.heldout, args.num_samples, args.seq_len, args.windows, False).published()
    settings = {name: value for name, value in text.items() if name != "humaneval"}
    settings |= {"slope_windows": args.slope_windows, "seed": args.seed, "layers": args.layers}
    content: dict[str, Any] = {"settings": settings, "models": published, "revision": revision()}
    earlier = None if args.measured is None else json.loads(args.measured.read_text(encoding="utf-8"))
    odd = [] if earlier is None else [name for name in ("settings", "models") if earlier[name] != content[name]]
    if odd:
        raise SystemExit(f"--measured {args.measured}: other {' and '.join(odd)}; wanted the same")
    setting = prepare(args)
    print(f"{len(setting.layers)} layers predicted ({clock})", flush=True)
    singles, groups = list(single_cases(setting, args.layers, args.seed)), list(group_cases(setting))
    if earlier is None:
        changes = compress([*singles, *groups], args.seed)
        print(f"{len(singles)} compressions of single layers made, {len(groups)} of several ({clock})", flush=True)
        seen = look(setting.model, setting.calibration, len(setting.calibration[::4]), changes, "on calibration text")
        found = look(setting.model, setting.heldout, args.windows, changes, "on held-out text")
        figures = [measured(held, own) for held, own in zip(found, seen, strict=True)]
        pairs = equal_pairs([case.row for case in singles], found)
    else:
        figures, pairs = measured_before([*singles, *groups], earlier), earlier["pairs"]
        content["measured_at"] = earlier.get("measured_at", earlier["revision"])
    rows, together = (
        [case.row | own for case, own in zip(cases, part, strict=True)]
        for cases, part in ((singles, figures[: len(singles)]), (groups, figures[len(singles) :]))
    )
    content |= {"rows": rows, "pairs": pairs, "together": together, "summary": summarise(rows, pairs)}
    write_json(args.output, content)
    shown = tables(content)
    args.output.with_suffix(".md").write_text(f"{shown}\n", encoding="utf-8")
    draw(rows, content["summary"], model_name(args.model), args.output.with_suffix(".png"))
    print(f"\n{shown}\n\nwritten to {args.output}, .md and .png after {clock}")


class Setting(NamedTuple):
    """What is compressed and measured on.

    Attributes:
        model: The dense model.
        layers: Its linear layers.
        predicted: Their losses, by path.
        calibration: Calibration windows with shape (windows, seq_len).
        heldout: Held-out windows likewise.
    """

    model: nn.Module
    layers: list[Layer]
    predicted: dict[str, Losses]
    calibration: torch.Tensor
    heldout: torch.Tensor


def prepare(args: argparse.Namespace) -> Setting:
    """Loads model and text, and predicts."""
    from lord_quant.silence import import_hosts

    import_hosts()
    import torch
    from bench import collect

    from lord_quant.blocks.source import inspect_source, load_model
    from lord_quant.calibration import sample_windows
    from lord_quant.corpus import load_corpus
    from lord_quant.losses.crossfit import crossed_tail
    from lord_quant.losses.sensing import sensed_samples
    from lord_quant.losses.steepness import RoundingSlope
    from lord_quant.targets import dense_weight

    source = inspect_source(args.model)
    how = {"seq_len": args.seq_len, "seed": args.seed}
    corpora = load_corpus(args.calibration, split="calibration"), load_corpus(args.heldout, split="heldout")
    calibration = sample_windows(corpora[0], source.tokenizer, num_samples=args.num_samples, **how).input_ids
    heldout = sample_windows(corpora[1], source.tokenizer, num_samples=args.slope_windows, **how).input_ids
    model = load_model(source, torch.device("cpu"))
    backward = calibration[: sensed_samples(args.seq_len)]
    layers = collect(model, calibration.split(4), backward.split(4), args.seed)
    parts = zip(*(each.split(-(-len(each) // 2)) for each in (calibration, backward)), strict=True)
    halves = [collect(model, own.split(4), back.split(4), args.seed + at) for at, (own, back) in enumerate(parts)]
    fisher, crossed = {}, {}
    for at, (layer, *both) in enumerate(zip(layers, *halves, strict=True)):
        one, other = (each.half() for each in both)
        fisher[layer.site.name] = layer.predict(args.seed * len(layers) + at, halves=(one, other))
        flat = one._replace(slope=None), other._replace(slope=None)
        tail = crossed_tail(dense_weight(layer.module).detach(), flat, centred=True)  # factors get a bias
        crossed[layer.site.name] = tail.tolist()
    slope = RoundingSlope.of(list(fisher.values()), backward[:, 1:].numel())
    predicted = {name: Losses(loss, crossed[name], slope.counted(loss)) for name, loss in fisher.items()}
    return Setting(model, layers, predicted, calibration, heldout)


def choose_layers(layers: Sequence[Layer], count: int, seed: int) -> list[Layer]:
    """Chooses layers, all types in turn, each at blocks drawn without repetition."""
    generator = random.Random(seed)
    by_kind: dict[str, list[Layer]] = {}
    for layer in layers:
        by_kind.setdefault(layer.kind, []).append(layer)
    for own in by_kind.values():
        generator.shuffle(own)
    turns = max(len(own) for own in by_kind.values())
    return [own[turn] for turn in range(turns) for own in by_kind.values() if turn < len(own)][:count]


def about(layer: Layer, choice: Choice) -> dict[str, Any]:
    """Returns what a row is about."""
    return {"layer": layer.site.name, "type": layer.kind, **choice._asdict()}


def foretold(losses: Losses, plain: LayerLoss, choice: Choice) -> dict[str, float]:
    """Returns all predictions for a choice, and what truncation and rounding are said to cost in the metric alone."""
    cut, rounded = parts(losses.fisher, choice)
    return {"truncation": cut, "rounding": rounded, **losses.of(choice), "output_error": sum(parts(plain, choice))}


class Case(NamedTuple):
    """What is compressed at once.

    Attributes:
        row: What it is about, and what is predicted.
        parts: Layers, and what becomes of each.
    """

    row: dict[str, Any]
    parts: list[tuple[Layer, Choice]]


def single_cases(setting: Setting, count: int, seed: int) -> Iterator[Case]:
    """Yields a number of layers, each in many ways."""
    for layer in choose_layers(setting.layers, count, seed):
        losses = setting.predicted[layer.site.name]
        plain = layer.predict(seed, fisher=False)
        for choice in choices(layer, losses.fisher, seed):
            yield Case(about(layer, choice) | foretold(losses, plain, choice), [(layer, choice)])


def group_cases(setting: Setting) -> Iterator[Case]:
    """Yields all layers of a block, of a type, of the model at once, with sums of their predictions."""
    layers = setting.layers
    groups = {f"block {layer.site.block}": "block" for layer in layers} | {layer.kind: "type" for layer in layers}
    for label, (ratio, bits, group_size) in TOGETHER.items():
        chosen = []
        for layer in layers:
            smaller = min(layer.site.in_features, layer.site.out_features)
            rank = None if ratio is None else max(1, round(ratio * smaller / RANK_STEP)) * RANK_STEP
            chosen.append((layer, Choice("dense" if rank is None else "truncation", rank, bits, group_size, None)))
        for name, by in (groups | {"all layers": "model"}).items():
            own = [part for part in chosen if by == "model" or name in (f"block {part[0].site.block}", part[0].kind)]
            foreseen = [setting.predicted[layer.site.name].of(choice) for layer, choice in own]
            sums = {base: sum(each[base] for each in foreseen) for base in BASES}
            yield Case({"what": label, "group": name, "by": by, "layers": len(own)} | sums, own)


def compress(cases: Sequence[Case], seed: int) -> list[list[Change]]:
    """Compresses the layers of all cases, each way once."""
    from first_order import Change

    made: dict[tuple[str, Choice], Change] = {}
    for layer, choice in (part for case in cases for part in case.parts):
        key = layer.site.name, choice
        if key not in made:
            settings = choice.rank, choice.bits, choice.group_size
            made[key] = Change(layer.site, layer.compress(form_of(choice), *settings, seed))
    return [[made[layer.site.name, choice] for layer, choice in case.parts] for case in cases]


def look(
    model: nn.Module, windows: torch.Tensor, few: int, changes: Sequence[Sequence[Change]], label: str
) -> list[Measured]:
    """Returns what changes cost on a text (`first_order.measure`), with a progress bar."""
    from first_order import measure
    from tqdm import tqdm

    return list(tqdm(measure(model, windows, few, changes), label, len(changes), unit="change"))


def measured(heldout: Measured, calibration: Measured) -> dict[str, float]:
    """Returns what was measured, with the standard error and the part of first order of what counts, as `FIGURES` says."""
    values = (
        heldout.loss.mean,
        heldout.loss.error,
        float(heldout.loss.slope.mean()),
        calibration.loss.mean,
        float(calibration.loss.slope.mean()),
        float(heldout.divergence.mean()),
        float(calibration.divergence.mean()),
    )
    return dict(zip(FIGURES, values, strict=True))


def measured_before(cases: Sequence[Case], earlier: dict[str, Any]) -> list[dict[str, float]]:
    """Returns what was measured of the same cases in an earlier run.

    Raises:
        SystemExit: It compressed something else.
    """
    rows = [*earlier["rows"], *earlier["together"]]
    names = ("layer", *Choice._fields, "what", "group")  # those of single layers, of several
    if [[row.get(name) for name in names] for row in rows] != [[case.row.get(name) for name in names] for case in cases]:
        raise SystemExit("--measured: the results are of other compressions; wanted those of the same layers and ways")
    return [{name: row[name] for name in FIGURES if name in row} for row in rows]  # older ones tell no slopes


def equal_pairs(rows: Sequence[dict[str, Any]], found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Returns the pairs of rows of one layer that take the same bytes.

    Args:
        rows: The rows.
        found: What was measured of them on held-out text, perhaps of others after them.

    Returns:
        Of each pair the places of its rows and how many standard errors lie between them, paired by window.
    """
    pairs = []
    for one, row in enumerate(rows):
        for other, than in enumerate(rows[:one]):
            sizes = (row["num_bytes"], than["num_bytes"])
            if row["layer"] != than["layer"] or None in sizes or max(sizes) > (1 + SET_WIDTH) * min(sizes):
                continue
            apart = found[one].loss.less(found[other].loss)
            pairs.append({"rows": [other, one], "errors_apart": abs(apart.mean) / max(apart.error, 1e-30)})
    return pairs


if __name__ == "__main__":
    main()
