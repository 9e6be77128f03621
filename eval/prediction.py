# SPDX-License-Identifier: Apache-2.0
"""Predicted against measured loss: one layer compressed at a time, in many ways, everything else dense.

Layers of every type are chosen at random blocks. Each is truncated in float at several ranks, rounded dense at several
bits and group sizes, and compressed in ways of different form and bits that take the same bytes within 3 %, which is what
a plan chooses among. Measured is how much the cross entropy of held-out text rises over the dense model's, on the same
windows, its part of first order on more of them (`first_order.py`); also on calibration text, and the divergence from the
dense model's predictions, which has less noise.
Predicted is what `lord_quant/probe.py` says: in the metric of the loss, with and without its slope, and of plain output
error. Last, all layers of a block, of a type, and of the model are compressed together, to see whether losses add up.

    python eval/prediction.py --model DIR --calibration code.jsonl --heldout other.jsonl --output prediction.json

The tables lie beside the JSON as Markdown, the plot as PNG. Sensitivities are of as many calibration windows as for any
budget; a fourth of all are measured on, all for the part of first order.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agreement import BASES, KINDS, draw, summarise, tables
from provenance import digests, model_name, revision
from rows import Settings
from variants import Clock, write_json


if TYPE_CHECKING:
    import torch
    from bench import Layer
    from first_order import Change, Measured
    from torch import nn

    from lord_quant.probe import LayerLoss

RATIOS = (0.25, 0.5, 0.75, 0.9)
"""Rank ratios of truncation in float."""
RANK_STEP = 32
DENSE_ROUNDING = ((2, 64), (3, 64), (4, 64), (3, 32), (2, 128))
"""Bits and group size of layers rounded dense."""
SET_BITS = (2, 3, 4)
SET_WIDTH = 0.03
"""Largest difference in bytes within a set, relative to its smallest member."""
SETS, SET_MEMBERS = 2, 4
TOGETHER = {"truncated to 0.75": (0.75, 16, 64), "rounded to 3 bits": (None, 3, 64)}
"""What is done to many layers at once: rank ratio, bits, group size."""


class Choice(NamedTuple):
    """One way to compress a layer.

    Attributes:
        kind: `truncation`, `dense`, or the form of its rounded factors.
        rank: Rank of its factors, or None.
        bits: Of its weights; 16 for factors in float.
        group_size: Inputs per scale.
        num_bytes: Stored bytes, or None in float.
    """

    kind: str
    rank: int | None
    bits: int
    group_size: int
    num_bytes: int | None


class Losses(NamedTuple):
    """A layer's predicted losses, in nats per token.

    Attributes:
        fisher: All from the text that truncation is chosen on, in the metric of the loss.
        crossed: The same, truncation being chosen on one half of the calibration windows and measured on the other.
        sloped: With the slope of the text's loss besides: what a plan counts on.
    """

    fisher: LayerLoss
    crossed: LayerLoss
    sloped: LayerLoss


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
    setting = prepare(args)
    print(f"{len(setting.layers)} layers predicted ({clock})", flush=True)
    singles = list(compress_singles(setting, args.layers, args.seed))
    groups = list(compress_groups(setting, args.seed))
    print(f"{len(singles)} single compressions made ({clock})", flush=True)
    changes = [[single.change] for single in singles] + [group.changes for group in groups]
    seen = look(setting.model, setting.calibration, len(setting.calibration[::4]), changes, "on calibration text")
    found = look(setting.model, setting.heldout, args.windows, changes, "on held-out text")
    print(f"{len(changes)} changes measured ({clock})", flush=True)
    figures = [measured(held, own) for held, own in zip(found, seen, strict=True)]
    rows = [single.row | own for single, own in zip(singles, figures, strict=False)]
    pairs = equal_pairs(rows, found)
    together = [group.row | own for group, own in zip(groups, figures[len(rows) :], strict=True)]
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

    from lord_quant.budget import sensed_samples
    from lord_quant.calibration import sample_windows
    from lord_quant.corpus import load_corpus
    from lord_quant.source import inspect_source, load_model

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
    predicted = {
        layer.site.name: predict(layer, one, other, args.seed * len(layers) + at)
        for at, (layer, one, other) in enumerate(zip(layers, *halves, strict=True))
    }
    return Setting(model, layers, predicted, calibration, heldout)


def predict(layer: Layer, one: Layer, other: Layer, seed: int) -> Losses:
    """Predicts what a layer would lose; `one` and `other` are the same layer on either half of the calibration windows."""
    from lord_quant.crossfit import crossed_tail
    from lord_quant.targets import dense_weight

    halves = one.half(), other.half()
    fisher = layer.predict(seed, halves=halves)
    flat = halves[0]._replace(slope=None), halves[1]._replace(slope=None)
    crossed = crossed_tail(dense_weight(layer.module).detach(), flat, centred=True)  # factors get a bias
    return Losses(fisher, fisher._replace(tail=crossed), fisher._replace(tail=fisher.cut))


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


def choices(layer: Layer, loss: LayerLoss, seed: int) -> list[Choice]:
    """Returns the ways a layer is compressed: truncations, roundings, and sets of equal bytes; each once."""
    smaller = min(layer.site.in_features, layer.site.out_features)
    ranks = dict.fromkeys(min(smaller, max(1, round(ratio * smaller / RANK_STEP)) * RANK_STEP) for ratio in RATIOS)
    found = [Choice("truncation", rank, 16, RANK_STEP, None) for rank in ranks if rank < smaller]
    every = list(menu(layer, loss))
    found += [choice for choice in every if choice.kind == "dense" and (choice.bits, choice.group_size) in DENSE_ROUNDING]
    for members in equal_sets(every, seed):
        found += members
    return list(dict.fromkeys(found))


def menu(layer: Layer, loss: LayerLoss) -> Iterator[Choice]:
    """Yields what the planner may choose for a layer, form by form and width by width."""
    from lord_quant.layer_bytes import TWO_FACTOR
    from lord_quant.menu import DENSE, Menu

    for form in (DENSE, TWO_FACTOR, *loss.pivoted):
        for bits in SET_BITS:
            for size in loss.groups:
                for found in Menu((form,), (bits,), (size,)).of(layer.site, loss):
                    if found.up_group_size == size:  # both factors alike
                        yield Choice(form, found.rank, bits, size, found.num_bytes)


def equal_sets(every: Sequence[Choice], seed: int) -> list[list[Choice]]:
    """Returns sets of choices of nearly equal bytes and different form or bits: the most varied, and far apart."""
    generator = random.Random(seed)
    shuffled = generator.sample(list(every), len(every))  # which rank and group size stand for a form is left to chance
    sets = []
    for smallest in sorted(size(choice) for choice in every):
        near = [choice for choice in shuffled if smallest <= size(choice) <= (1 + SET_WIDTH) * smallest]
        distinct = {(choice.kind, choice.bits): choice for choice in near}
        by_kind = [[choice for choice in distinct.values() if choice.kind == kind] for kind in KINDS]
        in_turn = [choice for turn in zip_longest(*by_kind) for choice in turn if choice is not None]
        sets.append(in_turn[:SET_MEMBERS])
    # Sets with every form come first, then large ones.
    sets.sort(key=lambda members: (len({choice.kind for choice in members}), len(members)), reverse=True)
    chosen: list[list[Choice]] = []
    for members in sets:
        apart = all(abs(math.log(size(members[0]) / size(other[0]))) > 2 * SET_WIDTH for other in chosen)
        if len(members) > 1 and apart and len(chosen) < SETS:
            chosen.append(members)
    return chosen


def size(choice: Choice) -> int:
    """Returns the stored bytes of a choice that has them."""
    assert choice.num_bytes is not None
    return choice.num_bytes


def form_of(choice: Choice) -> str:
    """Returns the form of the factors, if there are any."""
    return "two_factor" if choice.kind in ("truncation", "dense") else choice.kind


def about(layer: Layer, choice: Choice) -> dict[str, Any]:
    """Returns what a row is about."""
    return {"layer": layer.site.name, "type": layer.kind, **choice._asdict()}


def foretold(losses: Losses, plain: LayerLoss, choice: Choice) -> dict[str, float]:
    """Returns the predictions for a choice: what truncation and rounding are said to cost, and what planning counts."""
    cut, rounded = parts(losses.fisher, choice)
    crossed, sloped = (parts(each, choice)[0] for each in (losses.crossed, losses.sloped))
    return {
        "truncation": cut,
        "rounding": rounded,
        "predicted": cut + rounded,
        "crossed": crossed + rounded,
        "sloped": sloped + rounded,
        "output_error": sum(parts(plain, choice)),
    }


def parts(loss: LayerLoss, choice: Choice) -> tuple[float, float]:
    """Returns the predicted losses of truncation and of rounding, as `menu.Menu` adds them up."""
    from lord_quant.layer_bytes import Packing

    if choice.rank is None:
        return 0.0, loss.of_dense(choice.bits, choice.group_size)
    tail = loss.tail.tolist()
    if choice.kind == "truncation":
        return tail[choice.rank], 0.0
    packing = Packing(choice.bits, choice.group_size)
    noise = loss.of_factors(choice.rank, packing, packing)
    return tail[choice.rank], noise * loss.pivoted.get(choice.kind, 1.0)


class Single(NamedTuple):
    """One layer compressed.

    Attributes:
        row: What it is about, and what is predicted.
        change: The layer in float.
    """

    row: dict[str, Any]
    change: Change


class Group(NamedTuple):
    """Layers compressed at once.

    Attributes:
        row: What it is about, and what is predicted.
        changes: The layers in float.
    """

    row: dict[str, Any]
    changes: list[Change]


def compress_singles(setting: Setting, count: int, seed: int) -> Iterator[Single]:
    """Yields a number of layers, each compressed in many ways."""
    from first_order import Change

    for layer in choose_layers(setting.layers, count, seed):
        losses = setting.predicted[layer.site.name]
        plain = layer.predict(seed, fisher=False)
        for choice in choices(layer, losses.fisher, seed):
            made = layer.compress(form_of(choice), choice.rank, choice.bits, choice.group_size, seed)
            yield Single(about(layer, choice) | foretold(losses, plain, choice), Change(layer.site, made))


def compress_groups(setting: Setting, seed: int) -> Iterator[Group]:
    """Yields all layers of a block, of a type, of the model compressed at once, with sums of their predictions."""
    from first_order import Change

    layers = setting.layers
    groups = {f"block {layer.site.block}": "block" for layer in layers} | {layer.kind: "type" for layer in layers}
    for label, (ratio, bits, group_size) in TOGETHER.items():
        made, foreseen = {}, {}
        for layer in layers:
            smaller = min(layer.site.in_features, layer.site.out_features)
            rank = None if ratio is None else max(1, round(ratio * smaller / RANK_STEP)) * RANK_STEP
            choice = Choice("dense" if rank is None else "truncation", rank, bits, group_size, None)
            made[layer.site] = Change(layer.site, layer.compress("two_factor", rank, bits, group_size, seed))
            foreseen[layer.site] = [sum(parts(each, choice)) for each in setting.predicted[layer.site.name]]
        for name, by in (groups | {"all layers": "model"}).items():
            sites = [layer.site for layer in layers if by == "model" or name in (f"block {layer.site.block}", layer.kind)]
            sums = [sum(each) for each in zip(*(foreseen[site] for site in sites), strict=True)]
            row = {"what": label, "group": name, "by": by, "layers": len(sites)}
            yield Group(row | dict(zip(BASES, sums, strict=True)), [made[site] for site in sites])


def look(
    model: nn.Module, windows: torch.Tensor, few: int, changes: Sequence[Sequence[Change]], label: str
) -> list[Measured]:
    """Returns what changes cost on a text (`first_order.measure`), with a progress bar."""
    from first_order import measure
    from tqdm import tqdm

    return list(tqdm(measure(model, windows, few, changes), label, len(changes), unit="change"))


def measured(heldout: Measured, calibration: Measured) -> dict[str, float]:
    """Returns what was measured, and the standard error and the part of first order of what counts."""
    return {
        "heldout": heldout.loss.mean,
        "heldout_error": heldout.loss.error,
        "heldout_slope": float(heldout.loss.slope.mean()),
        "calibration": calibration.loss.mean,
        "calibration_slope": float(calibration.loss.slope.mean()),
        "heldout_divergence": float(heldout.divergence.mean()),
        "calibration_divergence": float(calibration.divergence.mean()),
    }


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
