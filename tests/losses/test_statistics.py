# SPDX-License-Identifier: Apache-2.0
"""The sensitivity pass over tiny models, and the file it leaves."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_runs import BATCHES, sensitivities, slopes, whole_model_inputs
from models import tiny_model
from safetensors.torch import load_file, save_file

from lord_quant.config import GptqConfig, JointConfig
from lord_quant.errors import CheckpointError, NumericsError, OutputError
from lord_quant.losses.crossfit import Half
from lord_quant.losses.probe import probe
from lord_quant.losses.probing import measure_statistics
from lord_quant.losses.statistics import (
    METADATA,
    SoFar,
    Statistics,
    load_statistics,
    save_statistics,
)
from lord_quant.losses.steepness import RoundingSlope
from lord_quant.moments import Moments
from lord_quant.sensitivity import Expansion
from lord_quant.targets import dense_weight, find_linears


GPTQ, OPTIONS = GptqConfig(), JointConfig(refine=1)


def measured(model: Any, fisher: bool = True, **changes: Any) -> Statistics:
    text = BATCHES[::2], BATCHES[1::2]
    expansions = Expansion.measure(model, text[0], seed=0), Expansion.measure(model, text[1], seed=1)
    settings: dict[str, Any] = {"gptq": GPTQ, "options": OPTIONS, "dtype": torch.float64}
    settings |= {"so_far": SoFar(None, {"seed": 0})} | changes
    return measure_statistics(model, text, expansions if fisher else None, **settings)


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    return measured(tiny_model("llama"))


@pytest.mark.parametrize(("family", "fisher"), [("bigcode", True), ("codegen", False), ("qwen2", True)])
def test_every_layer_is_probed_on_what_it_sees_in_the_dense_model(family: str, fisher: bool) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    found = measured(model, fisher)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    sites = find_linears(model)
    names = [site.name for site in sites]
    assert list(found.losses) == names == list(found.sites)
    inputs = whole_model_inputs(model, names)
    minded = [sensitivities(model, names, BATCHES[half::2], seed=half) if fisher else {} for half in (0, 1)]
    steep = [slopes(model, names, BATCHES[half::2]) if fisher else {} for half in (0, 1)]
    raw = {}
    for order, site in enumerate(sites):
        x = torch.from_numpy(inputs[site.name])
        parts = x.split([batch.numel() for batch in BATCHES])
        moments = [
            Moments(part.mean(0), (part - part.mean(0)).T @ (part - part.mean(0)) / len(part), len(part)) for part in parts
        ]
        halves = zip(moments, minded, steep, strict=True)
        first, second = (
            Half(own, cared.get(site.name), falls.get(site.name), own.num_tokens if fisher else None)
            for own, cared, falls in halves
        )
        weight = dense_weight(model.get_submodule(site.name))
        seed = order + site.block * (len(found.groups) // 2)  # behind the groups of the first of two blocks
        expected = probe(weight, (first, second), has_bias=site.has_bias, gptq=GPTQ, options=OPTIONS, seed=seed)
        loss, raw[site.name] = found.losses[site.name], expected
        torch.testing.assert_close(loss.tail, expected.tail, rtol=1e-6, atol=1e-9 * float(expected.tail[0]))
        torch.testing.assert_close(loss.cut, expected.cut, rtol=1e-6, atol=1e-9 * float(expected.tail[0]))
    labels = sum(batch.numel() - len(batch) for batch in BATCHES)  # the last token of a window has no next one
    rounding = RoundingSlope.of(list(raw.values()), labels)
    for name, expected in raw.items():
        loss, counted = found.losses[name], rounding.counted(expected) if fisher else expected
        assert loss.dense == pytest.approx(counted.dense, rel=1e-3)
        assert loss.dense_orders == pytest.approx(expected.dense_orders, rel=1e-3, abs=1e-3 * expected.dense_orders.second)
        if loss.down is not None and counted.down is not None:
            assert loss.down.by_bits == pytest.approx(counted.down.by_bits, rel=1e-2)


def test_a_file_gives_back_what_was_written(statistics: Statistics, tmp_path: Path) -> None:
    save_statistics(statistics, tmp_path / "a.stats")
    again = load_statistics(tmp_path / "a.stats")
    assert again.origin == statistics.origin and again.sites == statistics.sites
    for name, loss in statistics.losses.items():
        other = again.losses[name]
        assert torch.equal(loss.tail, other.tail) and torch.equal(loss.cut, other.cut) and loss[2:] == other[2:]
    assert [path.name for path in tmp_path.iterdir()] == ["a.stats"]


class CutOff(Exception):
    """The pass ends here."""


def cut_off_in_block(index: int, path: Path, patch: pytest.MonkeyPatch) -> None:
    """Runs a pass over a llama until the second layer of a block is to be measured."""
    calls, per_block = [0], len(find_linears(tiny_model("llama"))) // 2 + 2  # and q, k and v and gate and up together

    def probe_until(*arguments: Any, **settings: Any) -> Any:
        calls[0] += 1
        if calls[0] == index * per_block + 2:
            raise CutOff
        return probe(*arguments, **settings)

    with patch.context() as context:
        context.setattr("lord_quant.losses.probing.probe", probe_until)
        with pytest.raises(CutOff):
            measured(tiny_model("llama"), so_far=SoFar(path, {"seed": 0}))


def test_a_pass_that_was_cut_off_goes_on_behind_the_last_block(
    statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "new" / "so-far"
    cut_off_in_block(0, kept, monkeypatch)
    assert not kept.exists()
    cut_off_in_block(1, kept, monkeypatch)
    with pytest.raises(CheckpointError, match=r"cut off had measured of the first 1 blocks.*start it again"):
        load_statistics(kept)
    model, before = tiny_model("llama"), SoFar(kept, {"seed": 0})
    names = before.probed_layers(model)
    assert before.blocks == 1 and names[0] == [] and len(names[1]) == len(before.statistics.losses) == 7
    seen: list[int] = []

    def counted(weight: torch.Tensor, *others: Any, **settings: Any) -> Any:
        seen.append(len(weight))
        return probe(weight, *others, **settings)

    monkeypatch.setattr("lord_quant.losses.probing.probe", counted)
    done = measured(model, so_far=before)
    assert len(seen) == 9  # seven layers, and both groups
    for name, one in (("whole", statistics), ("resumed", done)):
        save_statistics(one, tmp_path / name)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()
    again = SoFar(kept, {"seed": 0})
    assert again.blocks == 2 and again.statistics.losses.keys() == done.losses.keys()


def test_what_another_pass_kept_or_what_is_spoilt_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "so-far"
    cut_off_in_block(1, kept, monkeypatch)
    assert (SoFar(kept, {"seed": 0}).blocks, SoFar(kept, {"seed": 1}).blocks) == (1, 0)
    for blocks in (0, "1", True, None):
        spoil(kept, lambda about, tensors, blocks=blocks: about.update(blocks=blocks))
        assert SoFar(kept, {"seed": 0}).blocks == 0
    kept.write_bytes(b"spoilt")
    assert SoFar(kept, {"seed": 0}).statistics == Statistics({}, {}, {}, {"seed": 0})
    nowhere = SoFar(kept / "below a file", {"seed": 0})
    nowhere.keep(nowhere.statistics, 1)  # what cannot be kept is done again
    assert kept.read_bytes() == b"spoilt"


def spoil(path: Path, change: Any) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        about = json.loads(handle.metadata()[METADATA])
    tensors = load_file(path)
    change(about, tensors)
    save_file(tensors, path, metadata={METADATA: json.dumps(about)})


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda about, tensors: about.update(version=99), r"^statistics .* have version 99; wanted 8: measure again$"),
        (lambda about, tensors: tensors.pop(LAYER), "up_proj"),
        (lambda about, tensors: about["layers"][LAYER].update(pivoted={"two_factor": 1.0}), r"forms \['two_factor'\]"),
        (lambda about, tensors: tensors.update({LAYER: tensors[LAYER][:, 1:].clone()}), "does not fit its layer"),
        (lambda about, tensors: tensors[LAYER].fill_(torch.nan), "does not fit its layer"),
        (lambda about, tensors: about["layers"][LAYER].pop("dense"), "holds no statistics of this package"),
        (lambda about, tensors: about["layers"][LAYER].update(up="much"), "holds no statistics of this package"),
        (lambda about, tensors: about.pop("origin"), "holds no statistics of this package"),
    ],
)
def test_spoilt_files_are_refused(change: Any, error: str, statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "a.stats"
    save_statistics(statistics, path)
    spoil(path, change)
    with pytest.raises(CheckpointError, match=error):
        load_statistics(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_statistics(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_statistics(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="holds no statistics"):
        load_statistics(tmp_path / "weights.safetensors")


def test_a_file_that_cannot_be_written_leaves_nothing(statistics: Statistics, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        save_statistics(statistics, tmp_path / "file" / "a.stats")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        save_statistics(statistics, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_blocks_with_nan_are_named() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"hidden states behind transformer\.h\.1 "):
        measured(model, fisher=False)
