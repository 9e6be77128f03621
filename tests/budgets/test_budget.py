# SPDX-License-Identifier: Apache-2.0
"""Budgets of a real folder: what can be reached, what a plan file says, whose plan it is."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lord_quant.artifact.stored import measure
from lord_quant.budget_config import BudgetConfig
from lord_quant.budgets.budget import Planner, _rounded_up, refuse_unreachable
from lord_quant.budgets.menu import DENSE, Menu
from lord_quant.budgets.plan_file import apply_plan, read_plan, write_plan
from lord_quant.config import CalibrationConfig, JointConfig, LordConfig, LowrankConfig, merge
from lord_quant.errors import BudgetError, ConfigError, GroupSizeError, LordError, OutputError, RankError
from lord_quant.files.claim import claimed
from lord_quant.losses.sensing import sense, sensed_samples, statistics_of, unplanned
from lord_quant.losses.statistics import Statistics
from lord_quant.runs.execution import execute
from lord_quant.runs.pipeline import make_plan, prepare


@pytest.fixture(scope="module")
def config(model_folder: Callable[..., Path], corpus_file: Path) -> LordConfig:
    return LordConfig(
        model=str(model_folder("compressible")),
        lowrank=LowrankConfig(rank_ratio=1),
        calibration=CalibrationConfig(dataset=str(corpus_file), num_samples=4, seq_len=64),
        joint=JointConfig(fisher_samples=2, refine=1),
    )


@pytest.fixture(scope="module")
def statistics(config: LordConfig) -> Statistics:
    return sense(config)


@pytest.fixture(scope="module")
def planner(config: LordConfig, statistics: Statistics) -> Planner:
    return Planner(config, statistics, Menu())


def test_the_pass_says_what_it_was_made_from(config: LordConfig, statistics: Statistics) -> None:
    origin = statistics.origin
    assert origin["calibration_sha256"] == prepare(config).windows.sha256
    assert origin["num_tokens"] == 256 and origin["fisher_samples"] == 2 and len(origin["model_sha256"]) == 64
    assert not any("/" in str(value) for value in origin.values())


def test_a_run_that_is_cut_off_does_not_measure_again(config: LordConfig, statistics: Statistics, tmp_path: Path) -> None:
    asked = LordConfig.from_dict(
        config.to_dict() | {"output": str(tmp_path / "new" / "out"), "lowrank": {}, "budget": {"target_bpw": 3.0}}
    )
    first = statistics_of(asked, keep=True)
    assert first.origin == statistics.origin
    (kept,) = (tmp_path / "new").iterdir()
    made = kept.stat().st_mtime_ns
    again = statistics_of(LordConfig.from_dict(merge(asked.to_dict(), {"budget": {"target_bpw": 4.0}})), keep=True)
    assert kept.stat().st_mtime_ns == made
    assert all(torch.equal(again.losses[name].cut, loss.cut) for name, loss in first.losses.items())
    kept.write_bytes(b"spoilt")
    statistics_of(asked, keep=True)
    assert kept.stat().st_size > 1000
    statistics_of(LordConfig.from_dict(merge(asked.to_dict(), {"calibration": {"seed": 1}})), keep=True)  # another run's
    assert len(list((tmp_path / "new").iterdir())) == 2
    planned = apply_plan(asked, Planner(asked, first, Menu()).settings(Planner(asked, first, Menu()).choose(asked.budget)))
    execute(prepare(planned), verify=False)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


@given(st.integers(2, 2**18))
def test_a_pass_sees_so_many_tokens_however_long_windows_are(seq_len: int) -> None:
    samples = sensed_samples(seq_len)
    assert samples >= 1 and (samples - 1) * seq_len < 2**16 <= samples * seq_len


@pytest.mark.parametrize("bpw", [2.6, 3.0, 4.1])
def test_a_plan_takes_what_was_asked_for_and_so_do_its_files(
    bpw: float, planner: Planner, config: LordConfig, tmp_path: Path
) -> None:
    allocation = planner.choose(BudgetConfig(target_bpw=bpw))
    assert bpw - 0.15 < planner.bpw(allocation) <= bpw
    planned = apply_plan(config, planner.settings(allocation))
    _, plan = make_plan(planned)
    assert plan.bpw == pytest.approx(planner.bpw(allocation), rel=1e-12)
    if bpw == 3.0:
        execute(prepare(LordConfig.from_dict(merge(planned.to_dict(), {"output": str(tmp_path / "out")}))), verify=False)
        stored = measure(tmp_path / "out")
        assert stored.bpw == pytest.approx(planner.bpw(allocation), rel=1e-12)
        assert stored.tensor_bytes == plan.tensor_bytes == planner.settings(allocation)["planned"]["tensor_bytes"]


def test_a_size_counts_the_whole_checkpoint(planner: Planner, config: LordConfig) -> None:
    size = planner.settings(planner.choose(BudgetConfig(target_bpw=3.0)))["planned"]["tensor_bytes"]
    allocation = planner.choose(BudgetConfig(target_size=size))
    assert 0.995 * size < make_plan(apply_plan(config, planner.settings(allocation)))[1].tensor_bytes <= size


@pytest.mark.slow
def test_layers_that_cannot_be_packed_count_and_stay_as_they_are(
    config: LordConfig, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The gate of a shared expert has one output."""
    config = dataclasses.replace(config, model=str(model_folder("qwen2_moe")), output=str(tmp_path / "out"))
    planner = Planner(config, sense(config), Menu())
    allocation = planner.choose(BudgetConfig(target_bpw=4.0))
    run = apply_plan(config, planner.settings(allocation))
    job = prepare(run)
    assert "such as model.layers.0.mlp.shared_expert_gate (1x128), stay in float" in " ".join(job.warnings)
    execute(job, verify=False)
    stored = measure(tmp_path / "out")
    assert 3.85 < stored.bpw <= 4.0 and stored.bpw == pytest.approx(planner.bpw(allocation), rel=1e-12)
    assert stored.tensor_bytes == job.plan.tensor_bytes == planner.settings(allocation)["planned"]["tensor_bytes"]
    name = "model.layers.1.mlp.shared_expert_gate.weight"
    assert torch.equal(families.stored_tensors(tmp_path / "out")[name], families.stored_tensors(config.model)[name])
    size = BudgetConfig(target_size=stored.tensor_bytes)
    assert planner.choose(size).num_bytes == allocation.num_bytes
    with pytest.raises(GroupSizeError, match="the naive stack packs every layer, and cannot model"):
        prepare(dataclasses.replace(config, budget=None, stack="naive", output=None))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_float_plan_counts_biases_as_they_are_stored(dtype: str, config: LordConfig, statistics: Statistics) -> None:
    run = LordConfig.from_dict(merge(config.to_dict(), {"dtype": dtype}))
    planner = Planner(run, statistics, Menu(bits=(16,), group_sizes=(32,)))
    allocation = planner.choose(BudgetConfig(target_bpw=12.0 if dtype == "bfloat16" else 24.0))
    settings = planner.settings(allocation)
    plan = make_plan(apply_plan(run, settings))[1]
    assert plan.rank_pattern and plan.bpw == pytest.approx(planner.bpw(allocation), rel=1e-12)
    assert settings["planned"]["tensor_bytes"] == plan.tensor_bytes


def test_the_smallest_plan_below_a_loss_is_found(planner: Planner) -> None:
    reference = planner.choose(BudgetConfig(target_bpw=3.0))
    found = planner.choose(BudgetConfig(max_loss=reference.loss))
    assert found.loss <= reference.loss and found.num_bytes <= reference.num_bytes
    tighter = planner.choose(BudgetConfig(max_loss=reference.loss / 4))
    assert tighter.loss <= reference.loss / 4 and tighter.num_bytes > found.num_bytes


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        (
            BudgetConfig(target_bpw=0.1),
            r"no plan is as small as 0\.1; what can be reached is \d\.\d+ to \d\.\d+ bits per weight",
        ),
        (BudgetConfig(target_size=1000), r"no plan is as small as 1000; what can be reached is \d+ to \d+ bytes in all"),
        (BudgetConfig(max_loss=1e-30), r"no plan loses as little as 1e-30 .*what can be reached is .* to "),
    ],
)
def test_budgets_out_of_reach_say_what_can_be_reached(budget: BudgetConfig, error: str, planner: Planner) -> None:
    with pytest.raises(BudgetError, match=error):
        planner.choose(budget)


@given(st.floats(1e-12, 1e6, exclude_min=True))
def test_a_bound_that_is_told_is_rounded_up(value: float) -> None:
    told = float(_rounded_up(value))
    assert value * (1 - 1e-12) <= told <= value * 1.0011


def test_a_bound_that_is_told_can_be_asked_for(planner: Planner) -> None:
    for budget, field in ((BudgetConfig(target_bpw=0.1), "target_bpw"), (BudgetConfig(max_loss=1e-30), "max_loss")):
        with pytest.raises(BudgetError) as caught:
            planner.choose(budget)
        told = float(str(caught.value).rpartition("can be reached is ")[2].split()[0])
        assert planner.choose(BudgetConfig(**{field: told})).num_bytes > 0


def test_the_frontier_leaves_out_what_cannot_be_reached(planner: Planner) -> None:
    points = planner.frontier([0.1, 2.5, 3.0, 4.0])
    assert points[0] is None
    losses = [point.loss for point in points[1:] if point is not None]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)


def test_layers_that_are_no_targets_stay_dense(config: LordConfig, statistics: Statistics) -> None:
    import dataclasses

    limited = dataclasses.replace(config, lowrank=LowrankConfig(rank_ratio=1, targets=("mlp",), ignore=(r"re:\.h\.0\.",)))
    chosen = Planner(limited, statistics, Menu()).choose(BudgetConfig(target_bpw=2.2)).chosen
    ranked = {name for name, each in chosen.items() if each.rank is not None}
    assert ranked and all("h.1.mlp" in name for name in ranked)


def test_a_floor_under_what_is_kept_holds_and_costs(planner: Planner, config: LordConfig, statistics: Statistics) -> None:
    budget = BudgetConfig(target_bpw=2.3)
    floored = Planner(config, statistics, Menu(min_param_ratio=0.8))
    free, limited = planner.choose(budget), floored.choose(budget)
    plans = [make_plan(apply_plan(config, planner.settings(each)))[1] for each in (free, limited)]
    least = [min(layer.weights / layer.dense_weights for layer in plan.layers) for plan in plans]
    assert least[0] < 0.8 <= least[1] and limited.loss > free.loss


def test_a_run_whose_budget_was_not_spent_is_refused(config: LordConfig) -> None:
    waiting = LordConfig.from_dict(merge(config.to_dict(), {"budget": {"target_bpw": 3}}))
    with pytest.raises(ConfigError, match="the run has a budget, and nothing was chosen for it"):
        prepare(waiting)
    assert prepare(unplanned(waiting)).config.budget is None


def test_a_menu_without_candidates_is_refused(config: LordConfig, statistics: Statistics) -> None:
    with pytest.raises(BudgetError, match="no candidate is left for"):
        Planner(config, statistics, Menu(forms=()))


@pytest.fixture
def changed_model(config: LordConfig, tmp_path: Path) -> str:
    """The same architecture with one weight changed."""
    folder = shutil.copytree(config.model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.attn.c_proj.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_plans_and_statistics_of_another_model_are_refused(
    planner: Planner, config: LordConfig, statistics: Statistics, changed_model: str, tmp_path: Path
) -> None:
    other = LordConfig.from_dict(merge(config.to_dict(), {"model": changed_model}))
    with pytest.raises(BudgetError, match="statistics were made for another model"):
        Planner(other, statistics, Menu())
    write_plan(planner.settings(planner.choose(BudgetConfig(target_bpw=3.0))), tmp_path / "plan.yaml")
    with pytest.raises(BudgetError, match=r"plan '.*plan\.yaml' was made for another model"):
        read_plan(tmp_path / "plan.yaml", changed_model)


def unaware(config: LordConfig) -> LordConfig:
    """A run that does not say how many windows its backward pass takes."""
    return LordConfig.from_dict(merge(config.to_dict(), {"joint": {"fisher_samples": None}}))


def test_statistics_of_another_solver_or_of_output_errors_are_told_apart(
    config: LordConfig, statistics: Statistics
) -> None:
    other = LordConfig.from_dict(merge(config.to_dict(), {"gptq": {"sym": True}, "joint": {"rotate": False, "refine": 2}}))
    with pytest.raises(BudgetError, match="settings: sym False, now True, rotate True, now False, refine 1, now 2"):
        Planner(other, statistics, Menu())
    blind = statistics._replace(origin=statistics.origin | {"fisher_samples": 0})
    with pytest.raises(BudgetError, match="settings: fisher False, now True; wanted the same"):
        Planner(config, blind, Menu())
    seeing = LordConfig.from_dict(merge(config.to_dict(), {"joint": {"fisher": False}}))
    with pytest.raises(BudgetError, match="settings: fisher True, now False; wanted the same"):
        Planner(seeing, statistics, Menu())
    planner = Planner(seeing, blind, Menu())
    with pytest.raises(BudgetError, match="max_loss is in nats, and losses without a backward pass are output errors"):
        planner.choose(BudgetConfig(max_loss=0.1))
    settings = planner.settings(planner.choose(BudgetConfig(target_bpw=2.6)))
    assert not apply_plan(unaware(config), settings).joint.fisher, "run in the same metric"


@pytest.mark.parametrize(
    "menu", [Menu(), Menu(bits=(3,), forms=(DENSE,)), Menu(bits=(16,), group_sizes=(32,)), Menu(min_param_ratio=0.8)]
)
def test_shapes_alone_tell_how_small_a_plan_can_be(menu: Menu, config: LordConfig, statistics: Statistics) -> None:
    """Before anything is measured: the same bounds, to the byte, as with what layers really lose."""
    told = []
    for known in (statistics, None):
        for budget in (BudgetConfig(target_size=1000), BudgetConfig(target_bpw=0.1)):
            with pytest.raises(BudgetError, match="no plan is as small") as caught:
                Planner(config, known, menu).choose(budget)
            told.append(str(caught.value).partition(" to ")[0])
    assert told[:2] == told[2:]
    smallest = int(told[0].rpartition(" ")[2])
    refuse_unreachable(config, menu, [BudgetConfig(target_size=smallest)])
    with pytest.raises(BudgetError, match="no plan is as small"):
        refuse_unreachable(config, menu, [BudgetConfig(max_loss=1e-9), BudgetConfig(target_size=smallest - 1)])


def test_what_nobody_will_measure_or_allow_is_refused_before_anything_is(config: LordConfig) -> None:
    seeing = LordConfig.from_dict(merge(config.to_dict(), {"joint": {"fisher": False}}))
    with pytest.raises(BudgetError, match="losses without a backward pass are output errors"):
        refuse_unreachable(seeing, Menu(), [BudgetConfig(max_loss=0.1)])
    with pytest.raises(BudgetError, match="no candidate is left for"):
        refuse_unreachable(config, Menu(forms=()), [BudgetConfig(target_bpw=4.0)])


def test_what_an_output_keeps_is_not_measured_while_another_run_writes_there(config: LordConfig, tmp_path: Path) -> None:
    asked = LordConfig.from_dict(
        config.to_dict() | {"output": str(tmp_path / "out"), "lowrank": {}, "budget": {"target_bpw": 3.0}}
    )
    with claimed(tmp_path / "out"), pytest.raises(OutputError, match="another run is writing"):
        statistics_of(asked, keep=True)
    assert not list(tmp_path.iterdir())


def test_a_model_is_the_same_wherever_it_lies_and_however_it_is_stored(
    config: LordConfig, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(config.model, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for changes in ({"model": "./moved"}, {"dtype": "bfloat16"}):
        Planner(LordConfig.from_dict(merge(config.to_dict(), changes)), statistics, Menu())


def test_a_plan_file_is_a_configuration_that_can_be_edited(planner: Planner, config: LordConfig, tmp_path: Path) -> None:
    allocation = planner.choose(BudgetConfig(target_bpw=2.3))
    settings, path = planner.settings(allocation), tmp_path / "plan.yaml"
    write_plan(settings, path)
    assert [each.name for each in tmp_path.iterdir()] == ["plan.yaml"]
    written = yaml.safe_load(path.read_text())
    assert len(written["planned"].pop("plan_sha256")) == 64 and written == settings
    sections = read_plan(path, config.model)
    assert LordConfig.from_dict(merge({"model": "m"}, sections)).gptq == apply_plan(config, settings).gptq
    ranks = settings["lowrank"]["rank_pattern"]
    name = next(iter(ranks))
    ranks[name] = 33
    write_plan(settings, path)
    edited = apply_plan(config, read_plan(path, config.model))
    with pytest.raises(RankError, match=f"{name}: rank 33; wanted a multiple of"):
        make_plan(edited)
    ranks["transformer.h.9.attn.c_attn"] = 32
    write_plan(settings, path)
    with pytest.raises(LordError, match=r"h\.9"):
        make_plan(apply_plan(config, read_plan(path, config.model)))


@pytest.mark.parametrize("text", ["lowrank: {}", "planned: 3", "planned: {}\nmodel: x", "[1]"])
def test_what_is_no_plan_is_refused(text: str, config: LordConfig, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"is no plan|wanted a mapping"):
        read_plan(tmp_path / "plan.yaml", config.model)


def test_a_plan_is_run_in_the_metric_it_was_made_in(planner: Planner, config: LordConfig) -> None:
    """As many windows in the backward pass of the run as in the sensitivity pass, unless the run says otherwise."""
    settings = planner.settings(planner.choose(BudgetConfig(target_bpw=2.6)))
    assert settings["joint"] == {"fisher_samples": 2}
    assert apply_plan(unaware(config), settings).joint.fisher_samples == 2
    spoken = LordConfig.from_dict(merge(config.to_dict(), {"joint": {"fisher_samples": 3}}))
    assert apply_plan(spoken, settings).joint.fisher_samples == 3
