# SPDX-License-Identifier: Apache-2.0
"""What is drawn is what was counted; where it may be written; that it appears whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lord_quant.budgets.menu import DENSE, Candidate
from lord_quant.budgets.planner import total
from lord_quant.drawing import plots
from lord_quant.drawing.parity import parity_of
from lord_quant.drawing.plot_data import Frontier, PlotData, Point, SweepData, UniformPoint, fates, spectra, type_curves
from lord_quant.drawing.plots import check_plots, describe, write_plots
from lord_quant.errors import ConfigError, OutputError
from lord_quant.files.claim import claimed
from lord_quant.losses.probe import LayerLoss
from lord_quant.losses.statistics import Statistics
from lord_quant.plan import PACK_MULTIPLE
from lord_quant.sizes.layer_bytes import PIVOTED, TWO_FACTOR
from lord_quant.targets import LinearSite


BLOCKS, TYPES = 3, {"attn.qkv": (64, 96), "mlp.up": (64, 256), "mlp.down": (256, 64)}


@pytest.fixture(scope="module")
def data() -> PlotData:
    sites = [
        LinearSite(f"h.{block}.{name}", block, *shape, True) for block in range(BLOCKS) for name, shape in TYPES.items()
    ]
    tail = torch.cat((torch.logspace(0, -3, 64, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))
    losses = {site.name: LayerLoss(tail, tail, {4: 0.01}, {32: 1.0}, 32, None, None, {}) for site in sites}
    statistics = Statistics(losses, {site.name: site for site in sites}, {}, {})
    forms = {"attn.qkv": (DENSE, None), "mlp.up": (TWO_FACTOR, PACK_MULTIPLE), "mlp.down": (PIVOTED, PACK_MULTIPLE)}
    chosen = {site.name: Candidate(3000, 0.1, *forms[site.name.split(".", 2)[2]], 4, 32, 4, 32) for site in sites}
    frontier = Frontier([Point(2.0, 1.0), Point(3.0, 0.1)], [UniformPoint(4, 32, 4.6, 0.05)], Point(2.5, 0.4))
    allocation = total(chosen)
    return PlotData(
        {"seed": 0}, "nats per token", spectra(statistics, allocation), fates(statistics, allocation),
        type_curves(statistics), parity_of(sites, True), frontier,
    )  # fmt: skip


def lines(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def marks(axes: Any) -> list[tuple[float, float]]:
    return [tuple(point) for collection in axes.collections for point in collection.get_offsets().tolist()]


def test_spectra_show_every_layer_and_every_rank_kept(data: PlotData) -> None:
    shown = {axes.get_title(): axes for axes in plots.draw_spectra(data).axes}
    assert set(shown) >= set(TYPES)
    for name in TYPES:
        mine = [each for each in data.spectra if each.type == name]
        assert lines(shown[name]) == [(each.rank_ratios, each.shares) for each in mine]
        kept = [(each.kept.rank_ratio, each.kept.share) for each in mine if each.kept is not None]
        assert marks(shown[name]) == kept and len(kept) == (0 if name == "attn.qkv" else BLOCKS)


def test_the_grid_has_every_layer_at_its_place(data: PlotData) -> None:
    axes = plots.draw_layers(data).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(TYPES)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(texts) == BLOCKS * len(TYPES)
    assert [texts[column, 2] for column in range(3)] == ["dense 4b g32", "two_factor r32, 4b g32", "pivoted r32, 4b g32"]
    assert texts[1, 0] == describe(data.layers[1])
    other = dataclasses.replace(data.layers[1], bits=3, group_size=128, up_group_size=64)
    assert describe(other) == "two_factor r32, 3/4b g128/64"
    colours = axes.images[0].get_array().tolist()
    assert colours == [[pytest.approx(8 * 3000 / (m * n)) for n, m in TYPES.values()]] * BLOCKS


def test_layers_that_some_blocks_lack_leave_gaps(data: PlotData) -> None:
    fewer = dataclasses.replace(data, layers=data.layers[1:])
    axes = plots.draw_layers(fewer).axes[0]
    assert len(axes.texts) == BLOCKS * len(TYPES) - 1
    assert axes.images[0].get_array().mask.sum() == 1


def test_types_parity_and_frontier_show_their_numbers_and_units(data: PlotData) -> None:
    types = plots.draw_types(data).axes[0]
    for curve in data.types:
        assert ([100 * share for share in curve.removed], curve.losses) in lines(types)
        assert ([100 * curve.parity_removed], [curve.parity_loss]) in lines(types)
    drawn = lines(plots.draw_parity(data).axes[0])
    for each in data.parity.curves:
        assert (each.aspects, each.rank_ratios) in drawn
    for shape in data.parity.shapes:
        for ratio in (*shape.weights.values(), *shape.stored.values()):
            assert ([shape.out_features / shape.in_features], [ratio]) in drawn
    frontier = plots.draw_frontier(data).axes[0]
    assert lines(frontier) == [([2.0, 3.0], [1.0, 0.1]), ([4.6], [0.05]), ([2.5], [0.4])]
    assert "nats per token" in types.get_ylabel() and "nats per token" in frontier.get_ylabel()
    other = dataclasses.replace(data, unit="squared output error")
    assert "squared output error" in plots.draw_types(other).axes[0].get_ylabel()
    assert "squared output error" in plots.draw_frontier(other).axes[0].get_ylabel()


def test_a_sweep_shows_measured_beside_predicted_and_never_in_another_unit(data: PlotData) -> None:
    measured = [Point(2.1, 0.9), Point(2.9, 0.2)]
    sweep = SweepData({}, "nats per token", data.frontier.planned, data.frontier.uniform, measured)
    (axes,) = plots.draw_sweep(sweep).axes
    assert lines(axes) == [([2.0, 3.0], [1.0, 0.1]), ([4.6], [0.05]), ([2.1, 2.9], [0.9, 0.2])]
    assert axes.get_yscale() == "log"
    better = [Point(2.1, -0.1)]  # than the dense model
    other = dataclasses.replace(sweep, unit="squared output error", measured=better)
    axes, beside = plots.draw_sweep(other).axes
    assert lines(beside) == [([2.1], [-0.1])] and beside.get_yscale() == "linear" and len(lines(axes)) == 2
    assert "squared output error" in axes.get_ylabel() and "nats per token" in beside.get_ylabel()


@pytest.mark.parametrize("count", [1, 5, 9])
def test_any_number_of_types_has_its_plots(count: int, data: PlotData) -> None:
    many = [dataclasses.replace(data.spectra[0], type=f"t{index}") for index in range(count)]
    figure = plots.draw_spectra(dataclasses.replace(data, spectra=many))
    titled = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in titled] == [f"t{index}" for index in range(count)]
    below = titled[-min(4, count) :]
    assert all(axes.get_xlabel() for axes in below) and not any(axes.get_xlabel() for axes in titled[: -len(below)])


# The folder


def plots_folder(path: Path, *names: str) -> Path:
    path.mkdir()
    (path / "plots.json").write_text('{"lord_plots": 1}')
    for name in names:
        (path / name).write_bytes(b"")
    return path


def test_only_plots_are_replaced_and_only_when_asked(tmp_path: Path) -> None:
    assert check_plots(tmp_path / "new" / "deeper") == tmp_path / "new" / "deeper"
    ours = plots_folder(tmp_path / "ours", "types.png")
    with pytest.raises(OutputError, match=r"ours' is not empty; wanted a new folder, or --overwrite"):
        check_plots(ours)
    assert check_plots(ours, overwrite=True) == ours
    mixed = plots_folder(tmp_path / "mixed", "types.png", "thesis.tex")
    broken = plots_folder(tmp_path / "broken")
    (broken / "plots.json").write_text("{")
    foreign = plots_folder(tmp_path / "foreign")
    (foreign / "plots.json").write_text('{"plots": []}')
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    (model / "model.safetensors").write_bytes(b"")
    for folder in (mixed, broken, foreign, model):
        with pytest.raises(OutputError, match=r"not empty and no folder of plots \(plots\.json and its pictures"):
            check_plots(folder, overwrite=True)
    with pytest.raises(OutputError, match="is a file; wanted a folder"):
        check_plots(model / "config.json")
    assert not (tmp_path / "new").exists()


def test_a_missing_library_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    with pytest.raises(ConfigError, match=r"plots need matplotlib .*pip install 'lord-quant\[plot\]'"):
        check_plots(tmp_path / "out")


def test_what_cannot_be_finished_leaves_nothing_behind(data: PlotData, tmp_path: Path) -> None:
    ours = plots_folder(tmp_path / "ours", "types.png")
    broken = dataclasses.replace(data, about={"seed": float("nan")})  # no JSON
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_plots(broken, ours, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert sorted(path.name for path in ours.iterdir()) == ["plots.json", "types.png"]
    with claimed(ours), pytest.raises(OutputError, match=r"another run is writing .*ours'"):
        write_plots(data, ours, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"output '.*file/out' cannot be written"):
        write_plots(data, tmp_path / "file" / "out")


@pytest.mark.slow
def test_pictures_and_numbers_appear_together(data: PlotData, tmp_path: Path) -> None:
    from matplotlib.image import imread

    out = check_plots(tmp_path / "a" / "out")
    write_plots(data, out)
    names = {"spectra", "layers", "types", "parity", "frontier"}
    assert {path.name for path in out.iterdir()} == {"plots.json", *(f"{name}.png" for name in names)}
    for name in names:
        picture = imread(out / f"{name}.png")
        assert min(picture.shape[:2]) > 300 and picture.std() > 0.05
    numbers = json.loads((out / "plots.json").read_text())
    assert numbers == {"lord_plots": 1, **json.loads(json.dumps(dataclasses.asdict(data)))}
    write_plots(data, check_plots(out, overwrite=True), overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
