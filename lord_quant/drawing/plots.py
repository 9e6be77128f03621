# SPDX-License-Identifier: Apache-2.0
"""Draws a plan and what it was chosen from, or budgets measured: pictures, and their numbers as JSON, in a folder.

Needs matplotlib (`pip install lord-quant[plot]`), which is imported only when something is drawn, and of which only figures
are used: no backend is chosen and nothing global is changed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lord_quant.checkpoint import atomic_folder, check_output
from lord_quant.drawing.plot_data import Fate, PlotData, Point, SweepData, UniformPoint
from lord_quant.errors import ConfigError
from lord_quant.files.claim import claimed
from lord_quant.files.reading import parse_json
from lord_quant.report import both_text, to_json


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERS = "plots.json"
MARK, VERSION = "lord_plots", 1
"""What tells a folder of plots: the version of its numbers."""
DPI = 130
LOWEST = 1e-6
"""Shares of a loss below this are not shown."""
MARKERS = {"two_factor": "o", "pivoted": "D", "column_pivoted": "d"}
OTHER_MARKER = "s"
DASHES = {"attention": "-", "mlp": "--", "other": ":"}
DEPTHS, BITS = "viridis", "YlGnBu"
COLUMN, ROW = 1.75, 0.29
"""Inches a cell of the table of layers takes."""


def check_plots(output: str | Path, *, overwrite: bool = False) -> Path:
    """Checks that plots can be drawn and their folder written, before any work.

    Raises:
        ConfigError: Matplotlib is missing.
        OutputError: The folder cannot be written, or holds something else than plots.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"plots need matplotlib ({error}); wanted: pip install 'lord-quant[plot]'") from error
    kind = f"folder of plots ({NUMBERS} and its pictures, nothing else)"
    return check_output(output, overwrite=overwrite, kind=kind, is_kind=_is_plots_folder)


def write_plots(data: PlotData | SweepData, output: Path, *, overwrite: bool = False) -> None:
    """Draws and writes everything; the folder appears by one rename.

    Args:
        data: The numbers.
        output: What `check_plots` returned.
        overwrite: Whether plots that stand there give way.

    Raises:
        OutputError: It cannot be written.
    """
    with claimed(output), atomic_folder(output, overwrite=overwrite) as staging:
        numbers = {MARK: VERSION, **dataclasses.asdict(data)}
        (staging / NUMBERS).write_text(to_json(numbers), encoding="utf-8")
        for name, figure in _drawn(data).items():
            figure.savefig(staging / f"{name}.png", dpi=DPI)


def _drawn(data: PlotData | SweepData) -> dict[str, Figure]:
    if isinstance(data, SweepData):
        return {SWEEP: draw_sweep(data)}
    return {name: draw(data) for name, draw in PICTURES.items()}


def _is_plots_folder(path: Path) -> bool:
    names = {each.name for each in path.iterdir()}
    try:
        numbers = parse_json((path / NUMBERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(numbers, dict)
        and MARK in numbers
        and names <= {NUMBERS, *(f"{name}.png" for name in (*PICTURES, SWEEP))}
    )


def draw_spectra(data: PlotData) -> Figure:
    """Draws truncation loss over rank: a plot per type of layer, a line per block, a mark where the plan cuts."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    types = list(dict.fromkeys(each.type for each in data.spectra))
    columns = min(4, len(types))
    rows = math.ceil(len(types) / columns)
    figure = Figure(figsize=(max(6.0, 3.4 * columns + 1), 2.9 * rows + 1), layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    last, colours = max(each.block for each in data.spectra), colormaps[DEPTHS]
    for axes, name in zip(plots.flat, types, strict=False):
        for each in (each for each in data.spectra if each.type == name):
            colour = colours(each.block / max(1, last))
            axes.plot(each.rank_ratios, each.shares, color=colour, linewidth=1)
            if each.kept is not None:
                marker = MARKERS.get(each.kept.form, OTHER_MARKER)
                style = {"marker": marker, "s": 30, "edgecolors": "black", "linewidths": 0.7, "zorder": 3}
                axes.scatter(each.kept.rank_ratio, each.kept.share, color=[colour], **style)
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    for axes in plots.flat[len(types) :]:
        axes.set_axis_off()
    shown = [share for each in data.spectra for share in each.shares[: int(0.97 * len(each.shares))] if share > 0]
    plots[0, 0].set(yscale="log", xlim=(0, 1), ylim=(max(LOWEST, min(shown, default=LOWEST)), 1.5))
    for axes in plots.flat[max(0, len(types) - columns) : len(types)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("rank ratio, r / min(m, n)")
    for axes in plots[:, 0]:
        axes.set_ylabel("truncation loss / loss at rank 0")
    depths = ScalarMappable(Normalize(0, max(1, last)), colours)
    figure.colorbar(depths, ax=plots, label="block", fraction=0.03, ticks=MaxNLocator(nbins=8, integer=True))
    forms = dict.fromkeys(each.kept.form for each in data.spectra if each.kept is not None)
    figure.suptitle("What truncation loses; marks: ranks kept (layers without one stay dense)", fontsize=11)
    _legend_of_marks(figure, forms)
    return figure


def draw_layers(data: PlotData) -> Figure:
    """Draws what each layer got: blocks by types, coloured by stored bits per weight."""
    from matplotlib.figure import Figure

    types = list(dict.fromkeys(each.type for each in data.layers))
    blocks = sorted({each.block for each in data.layers})
    grid = [[math.nan] * len(types) for _ in blocks]
    for each in data.layers:
        grid[blocks.index(each.block)][types.index(each.type)] = each.bpw
    figure = Figure(figsize=(max(6.5, COLUMN * len(types) + 2), max(3.2, ROW * len(blocks) + 1.5)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap=BITS, aspect="auto")
    low, high = (pick(each.bpw for each in data.layers) for pick in (min, max))
    dark = low + 0.55 * (high - low)
    for each in data.layers:
        colour = "white" if each.bpw > dark else "black"
        place = (types.index(each.type), blocks.index(each.block))
        axes.text(*place, describe(each), color=colour, fontsize=7.5, ha="center", va="center")
    axes.set_xticks(range(len(types)), types, fontsize=9)
    axes.set_yticks(range(len(blocks)), [str(block) for block in blocks], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_ylabel("block")
    for edge in range(1, max(len(types), len(blocks))):
        axes.axhline(edge - 0.5, color="white", linewidth=1.2)
        axes.axvline(edge - 0.5, color="white", linewidth=1.2)
    axes.set(xlim=(-0.5, len(types) - 0.5), ylim=(len(blocks) - 0.5, -0.5))
    figure.colorbar(image, ax=axes, label="stored bits per weight, all in", fraction=0.05, aspect=30)
    chosen = data.frontier.chosen
    figure.suptitle(f"What every layer got: {chosen.bpw:.3f} bits per weight; r rank, b bits, g group size", fontsize=11)
    return figure


def describe(fate: Fate) -> str:
    """Says in a few characters what becomes of a layer."""
    packing = f"{both_text(fate.bits, fate.up_bits)}b g{both_text(fate.group_size, fate.up_group_size)}"
    return f"{fate.form} {packing}" if fate.rank is None else f"{fate.form} r{fate.rank}, {packing}"


def draw_types(data: PlotData) -> Figure:
    """Draws what each type of layer would lose over the share of its weights removed by two factors."""
    figure, axes = _figure_and_axes()
    shown = []
    for index, curve in enumerate(data.types):
        colour, label = f"C{index % 10}", f"{curve.type} (x{curve.layers})"
        removed = [100 * share for share in curve.removed]
        axes.plot(removed, curve.losses, color=colour, linestyle=DASHES[curve.kind], label=label)
        axes.plot(100 * curve.parity_removed, curve.parity_loss, "o", color=colour, zorder=3)
        # Without their first few directions some layers lose hundreds of nats; that would flatten all the rest.
        shown += [loss for share, loss in zip(removed, curve.losses, strict=True) if -10 <= share <= 98 and loss > 0]
    axes.axvline(0, color="0.4", linewidth=1, zorder=1)
    highest = max(shown, default=1.0)
    axes.set(
        yscale="log",
        xlim=(-10, 100),
        ylim=(0.7 * max(min(shown, default=LOWEST), LOWEST * highest), 1.5 * highest),
        xlabel="share of the weights of these layers removed by two factors, % (dots: parity, as many weights as dense)",
        ylabel=f"predicted loss, {data.unit}, all blocks",
        title="Sensitivity of layer types to truncation alone",
    )
    axes.legend(frameon=False, title="attention ──   MLP - -", alignment="left", loc="lower right")
    return figure


def draw_parity(data: PlotData) -> Figure:
    """Draws parity over aspect ratio: curves of the forms, and the model's shapes by weights and by stored bytes."""
    parity, aspects = data.parity, data.parity.curves[0].aspects
    figure, axes = _figure_and_axes()
    styles = {"two_factor": "-", "pivoted": "-."}
    for curve in parity.curves:
        label = f"{curve.form}, {curve.layers} equal layers" if curve.layers > 1 else curve.form
        style = styles.get(curve.form, ("--", ":")[curve.layers % 2])
        axes.plot(curve.aspects, curve.rank_ratios, color="0.35", linewidth=1.3, linestyle=style, label=label)
    for index, shape in enumerate(parity.shapes):
        colour, aspect = f"C{index % 10}", shape.out_features / shape.in_features
        for form, ratio in shape.weights.items():
            axes.plot([aspect, aspect], [ratio, shape.stored[form]], color=colour, linewidth=1)
            axes.plot(aspect, ratio, "o", color=colour, zorder=3)
            axes.plot(aspect, shape.stored[form], "v", color=colour, markerfacecolor="white", zorder=3)
        axes.plot([], [], "o", color=colour, label=f"{shape.out_features} x {shape.in_features}: {_few(shape.types)}")
    axes.plot([], [], "o", color="black", label="as many weights")
    stored = f"as many stored bytes ({parity.bits} bits, groups of {parity.group_size})"
    axes.plot([], [], "v", color="black", markerfacecolor="white", label=stored)
    exponents = range(math.ceil(math.log2(aspects[0])), math.floor(math.log2(aspects[-1])) + 1)
    lowest = min(ratio for shape in parity.shapes for ratio in shape.stored.values())
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        [2.0**each for each in exponents], [f"1/{2**-each}" if each < 0 else str(2**each) for each in exponents]
    )
    axes.set(
        ylim=(min(0.4, lowest - 0.05), 1.05),
        xlabel="aspect ratio of a layer: outputs m / inputs n",
        ylabel="rank ratio at parity, of the full rank of what is decomposed",
        title="Parity: below it, factors are smaller than the dense layer",
    )
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.set_size_inches(9.5, 6 + 0.12 * len(labels))
    return figure


def draw_frontier(data: PlotData) -> Figure:
    """Draws predicted loss over bits per weight: plans, uniform ones, the one chosen."""
    figure, axes = _figure_and_axes()
    _plot_predictions(axes, data.frontier.planned, data.frontier.uniform)
    chosen = data.frontier.chosen
    label = f"chosen: {chosen.bpw:.3f} bits, predicted loss {chosen.loss:.3g}"
    axes.plot(chosen.bpw, chosen.loss, "*", color="gold", markeredgecolor="black", markersize=17, zorder=4, label=label)
    axes.set(
        yscale="log",
        xlabel="stored bits per weight of the linear layers, all in",
        ylabel=f"predicted loss, {data.unit}",
        title="Predicted loss over budgets",
    )
    axes.legend(frameon=False)
    return figure


def draw_sweep(data: SweepData) -> Figure:
    """Draws measured and predicted loss over bits per weight; on axes of their own where their units differ."""
    figure, axes = _figure_and_axes()
    _plot_predictions(axes, data.planned, data.uniform)
    alike = data.unit == "nats per token"
    other = axes if alike else axes.twinx()
    bpw, losses = [point.bpw for point in data.measured], [point.loss for point in data.measured]
    other.plot(bpw, losses, "o-", color="C0", label="measured", zorder=4)
    label = "stored bits per weight of the linear layers, all in"
    axes.set(yscale="log", xlabel=label, ylabel=f"predicted loss, {data.unit}", title="Budgets, measured and predicted")
    other.set(yscale="log" if min(losses) > 0 else "linear")
    other.set_ylabel("loss over the dense model, nats per token")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _plot_predictions(axes: Axes, planned: Sequence[Point], uniform: Sequence[UniformPoint]) -> None:
    axes.plot(
        [point.bpw for point in planned], [point.loss for point in planned], ".-", color="C3", label="planned", zorder=3
    )
    sizes = sorted({point.group_size for point in uniform})
    for index, size in enumerate(sizes):
        alike = sorted((point for point in uniform if point.group_size == size), key=lambda point: point.bits)
        bpw, losses = [point.bpw for point in alike], [point.loss for point in alike]
        grey, marker = 0.65 - 0.5 * index / max(1, len(sizes) - 1), "os^D"[index % 4]
        label = f"uniform, {_listed(point.bits for point in alike)} bits, groups of {size}"
        axes.plot(bpw, losses, color=str(grey), marker=marker, linestyle="", label=label)


PICTURES: dict[str, Callable[[PlotData], Figure]] = {
    "spectra": draw_spectra,
    "layers": draw_layers,
    "types": draw_types,
    "parity": draw_parity,
    "frontier": draw_frontier,
}
SWEEP = "sweep"


def _figure_and_axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _legend_of_marks(figure: Figure, forms: Iterable[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color="0.5", markeredgecolor="black", linestyle="", marker=MARKERS.get(form, OTHER_MARKER), label=form
        )
        for form in forms
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _few(types: Sequence[str], most: int = 4) -> str:
    return ", ".join(types[:most]) + (f" and {len(types) - most} more" if len(types) > most else "")
