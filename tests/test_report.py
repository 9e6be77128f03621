# SPDX-License-Identifier: Apache-2.0
"""The report, its tables and the model card: their figures, and nothing of this machine."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lord_quant.artifact.model_card import model_card
from lord_quant.backends.gptq import GptqRecord
from lord_quant.calibration import as_windows
from lord_quant.config import CalibrationConfig, GptqConfig, LordConfig, LowrankConfig
from lord_quant.corpus import load_corpus
from lord_quant.engine import DecompositionRecord
from lord_quant.outcomes import StackRecord
from lord_quant.plan import Plan, build_plan
from lord_quant.report import (
    both_text,
    build_report,
    form_text,
    human_bytes,
    human_seconds,
    package_versions,
    plan_dict,
    plan_summary,
    plan_table,
    report_table,
    to_json,
)
from lord_quant.targets import LinearSite


def make(
    model: str = "org/model", dataset: str = "python-stdlib", output: str = "out", blocks: int = 2, **gptq: Any
) -> tuple:
    sites = [
        LinearSite(f"h.{i}.{name}", i, inputs, outputs, bias)
        for i in range(blocks)
        for name, inputs, outputs, bias in (("attn.c_proj", 256, 256, True), ("mlp.c_fc", 256, 1024, False))
    ]
    config = LordConfig(
        model=model,
        output=output,
        lowrank=LowrankConfig(rank_ratio=0.5),
        calibration=CalibrationConfig(dataset=dataset),
        gptq=GptqConfig(**({"bits": 4, "group_size": 32} | gptq)),
    )
    return config, build_plan(sites, config.lowrank, config.gptq, itemsize=4, other_bytes=12345)


def report_of(config: LordConfig, plan: Plan, loss: float | None = 0.5, source: str = "text") -> dict[str, Any]:
    windows = as_windows(torch.arange(24).view(3, 8), source)
    decomposed = [DecompositionRecord(name, rank, 0.25, rank, 24, 0.125, ()) for name, rank in plan.rank_pattern.items()]
    quantized = [
        GptqRecord(layer.name + suffix, loss, 0.1, 0.25)
        for layer in plan.layers
        for suffix in layer.factor_shapes()
        if plan.bits != 16
    ]
    return build_report(config, plan, windows, decomposed, quantized, {"decompose": 1.5, "quantize": 2.25}, ["careful"])


@pytest.mark.parametrize("bits", [4, 16])
def test_a_report_is_json_and_says_what_was_done(bits: int) -> None:
    config, plan = make(bits=bits)
    report = report_of(config, plan)
    assert json.loads(to_json(report)) == report
    assert report["base_model"] == "org/model" and report["scheme"] == plan.scheme and report["warnings"] == ["careful"]
    assert report["seconds"] == {"decompose": 1.5, "quantize": 2.25, "total": 3.75}
    assert report["calibration"]["num_tokens"] == 24 and report["calibration"]["seq_len"] == 8
    assert report["config"]["gptq"]["bits"] == bits and report["config"]["lowrank"]["rank_ratio"] == 0.5
    assert [layer["name"] for layer in report["layers"]] == [layer.name for layer in plan.layers]
    dense, lowrank = report["layers"][:2]
    assert dense["rank"] is None and "rel_output_error" not in dense
    assert lowrank["rank"] == 128 and lowrank["rel_output_error"] == 0.25 and lowrank["decompose_seconds"] == 0.125
    assert set(dense["gptq"]) == ({"weight"} if bits == 4 else set())
    assert set(lowrank["gptq"]) == ({"down", "up"} if bits == 4 else set())


def test_totals_are_sums_over_layers() -> None:
    config, plan = make()
    report = report_of(config, plan)
    totals, layers = report["totals"], report["layers"]
    weights = sum(layer["in_features"] * layer["out_features"] for layer in layers)
    added = sum(layer["out_features"] * 2 for layer in layers if layer["adds_bias"])
    own = sum(layer["out_features"] * 2 for layer in layers if layer["name"].endswith("c_proj"))
    assert added > 0
    assert totals["layers"] == len(layers) == 4
    assert totals["decomposed_layers"] == sum(layer["rank"] is not None for layer in layers) == 2
    assert totals["linear_bytes"] == sum(layer["bytes"] for layer in layers)
    assert totals["tensor_bytes"] == totals["linear_bytes"] + 12345
    assert totals["param_ratio"] == sum(layer["weights"] for layer in layers) / weights
    assert totals["bpw"] == pytest.approx(8 * (totals["linear_bytes"] - own) / weights)
    mean = sum(layer["bpw"] * layer["in_features"] * layer["out_features"] for layer in layers) / weights
    assert totals["bpw"] == pytest.approx(mean)
    assert plan_dict(plan)["totals"] == totals and json.loads(to_json(plan_dict(plan))) == plan_dict(plan)


def test_the_plan_summary_gives_the_plans_totals() -> None:
    _, plan = make()
    linear = sum(layer.weight_bytes + layer.bias_bytes for layer in plan.layers)
    text = plan_summary(plan)
    assert len(text.splitlines()) == 3
    for part in (
        plan.scheme,
        "2 of 4 layers decomposed",
        "4 bits, group size 32",
        f"linear layers {human_bytes(linear)}, {plan.bpw:.3f} bits per weight",
        f"{plan.param_ratio:.3f} of weights kept",
        f"{human_bytes(linear + 12345)} of tensors, {human_bytes(12345)} of them",
    ):
        assert part in text, text


def test_the_plan_table_has_a_line_per_layer_with_the_reason_why_one_stays_dense() -> None:
    _, plan = make()
    lines = plan_table(plan).splitlines()
    for layer in plan.layers:
        (line,) = [line for line in lines if line.startswith(f"{layer.name} ")]
        assert f"{layer.out_features}x{layer.in_features}" in line and f"{layer.bpw:.2f}" in line
        assert (str(layer.rank) if layer.rank else layer.note) in line
    assert plan_summary(plan) in plan_table(plan)


def test_a_mixed_plan_shows_how_every_layer_is_packed() -> None:
    own = {"bits_pattern": {"mlp.c_fc": 3}, "group_size_pattern": {"h.1.attn.c_proj": 64}}
    config, plan = make(**own)
    header, _, *lines = plan_table(plan).splitlines()
    assert header.split() == ["layer", "out", "x", "in", "rank", "bits", "group", "kept", "bytes", "bpw", "note"]
    for line, layer in zip(lines, plan.layers, strict=False):
        assert line.split()[:5] == [
            layer.name,
            f"{layer.out_features}x{layer.in_features}",
            str(layer.rank or "dense"),
            str(layer.bits),
            str(layer.group_size),
        ]
    assert "-mixed (3, 4 bits, group size 32, 64)" in plan_summary(plan)
    values = plan_dict(plan)
    assert values["bits_pattern"] == {"h.0.mlp.c_fc": 3, "h.1.mlp.c_fc": 3}
    assert values["group_size_pattern"] == {"h.1.attn.c_proj": 64}
    assert [layer["bits"] for layer in values["layers"]] == [4, 3, 4, 3]
    assert [layer["group_size"] for layer in values["layers"]] == [32, 32, 64, 32]
    report = report_of(config, plan)
    assert report["format_version"] == 3 and report_of(*make())["format_version"] == 2
    assert report["config"]["gptq"]["bits_pattern"] == {"mlp.c_fc": 3}
    assert "GPTQ to 3, 4 bits, group size 32, 64;" in model_card(report)
    assert "GPTQ to 4 bits, group size 32;" in model_card(report_of(*make()))
    assert "bits" not in plan_table(make()[1]).splitlines()[0] and json.loads(to_json(report)) == report


def test_no_path_of_this_machine_is_published(tmp_path: Path) -> None:
    model, data, output = tmp_path / "my-model", tmp_path / "my-data.txt", tmp_path / "secret-output"
    model.mkdir()
    data.write_text("some text")
    for given in (data, tmp_path):
        config, plan = make(str(model), str(given), str(output))
        source = load_corpus(str(data)).source
        report = report_of(config, plan, source=source)
        published = to_json(report) + model_card(report) + report_table(report)
        assert str(tmp_path) not in published and str(tmp_path.parent) not in published
        assert "secret-output" not in published and str(Path.home()) not in published
        assert report["base_model"] == "my-model" and report["config"]["model"] == "my-model"
        assert report["config"]["calibration"]["dataset"] == given.name
        assert "base_model: my-model\n" in model_card(report)
    for gone in (str(tmp_path / "gone" / "my-model"), "../gone/my-model", "~/my-model", "a/b/my-model"):
        config, plan = make(gone, str(data), str(output))
        assert report_of(config, plan)["base_model"] == "my-model"
    config, plan = make("org/my-model", str(data), str(output))
    assert report_of(config, plan)["base_model"] == "org/my-model"


def test_a_run_that_went_on_says_what_its_seconds_leave_out() -> None:
    report = report_of(*make())
    assert "| seconds to compress " in model_card(report)
    assert "seconds to compress, without 3 blocks that were finished before" in model_card(report | {"blocks_resumed": 3})


def test_relative_paths_are_reduced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for given, name in ((".", "here"), ("model", "model"), ("./model", "model"), ("../here/model", "model")):
        assert report_of(*make(given))["base_model"] == name


def test_json_without_nan() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError):
            to_json({"loss": bad})
    assert to_json({"a": None}).endswith("}\n")


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_loss_that_is_no_number_does_not_spoil_the_report(loss: float | None) -> None:
    report = report_of(*make(), loss=loss)
    parsed = json.loads(to_json(report), parse_constant=lambda name: pytest.fail(name))
    assert parsed["layers"][1]["gptq"]["down"]["loss"] is None
    assert " - / - " in report_table(report)
    model_card(report)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (10_900_000, "10.9 MB"), (999_949, "999.9 kB"),
        (999_950, "1.0 MB"), (26_400_000_000, "26.4 GB"), (3_140_000_000_000, "3.14 TB"), (-1500, "-1.5 kB"),
    ],
)  # fmt: skip
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (1.25, "1.2 s"), (9.94, "9.9 s"), (42, "42 s"), (59.4, "59 s"), (60, "1 min 0 s"),
        (190, "3 min 10 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 0 min"), (7500, "2 h 5 min"), (100_000, "27 h 46 min"),
    ],
)  # fmt: skip
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_the_report_table_has_a_line_per_layer_or_per_kind_when_there_are_many() -> None:
    report = report_of(*make(blocks=3))
    lines = report_table(report).splitlines()
    assert sum(line.startswith("h.") for line in lines) == 6
    short = report_table(report, longest=5)
    (line,) = [line for line in short.splitlines() if line.startswith("mlp.c_fc (x3)")]
    assert [cell for cell in line.split() if cell != "/"][2:] == [
        "1024x256",
        "128",
        "0.25",
        "0.5",
        "0.5",
        "0.1",
        *line.split()[-2:],
    ]
    assert float(line.split()[-1]) == pytest.approx(3 * (0.125 + 2 * 0.25), abs=0.006)
    assert f"{report['totals']['bpw']:.3f} bits per weight" in short and "total 3.8 s" in short


def test_the_report_table_notes_remedies_and_ranks_beyond_the_numerical_rank() -> None:
    config, plan = make()
    windows = as_windows(torch.arange(24).view(3, 8), "text")
    records = [DecompositionRecord(name, rank, 0.25, 5, 24, 0.1, ("float64",)) for name, rank in plan.rank_pattern.items()]
    report = build_report(config, plan, windows, records, [], {})
    names = ["h.0.mlp.c_fc", "h.1.mlp.c_fc"]
    noise = "numerical rank below the rank kept: some kept directions are rounding noise"
    assert report["remedies"] == [{"remedy": "float64", "layers": names}, {"remedy": noise, "layers": names}]
    assert re.search(r"^float64 +2  h\.0\.mlp\.c_fc$", report_table(report), re.MULTILINE)


def test_damping_that_was_raised_is_a_remedy_and_a_run_that_needed_none_says_so() -> None:
    config, plan = make()
    windows = as_windows(torch.arange(24).view(3, 8), "text")
    solved = [GptqRecord(name, 0.5, 0.02 if name.endswith("1.mlp.c_fc.up") else 0.01, 0.25) for name in plan.packings]
    report = build_report(config, plan, windows, [], solved, {})
    raised = "GPTQ of up: damping raised from 0.01 to 0.02"
    assert report["remedies"] == [{"remedy": raised, "layers": ["h.1.mlp.c_fc"]}]
    assert raised in report_table(report)
    solved = [record for record in solved if record.damp_percent == 0.01]
    quiet = build_report(config, plan, windows, [], solved, {})
    assert quiet["remedies"] == [] and "remedies      none" in report_table(quiet)


@pytest.mark.parametrize("blocks", [2, 5])
def test_a_joint_report_tells_truncation_from_all_that_was_lost(blocks: int) -> None:
    config, plan = make(blocks=blocks)
    windows = as_windows(torch.arange(24).view(3, 8), "text")
    records = [
        StackRecord(
            name=layer.name,
            rank=layer.rank,
            rel_output_error=0.25 if layer.rank else None,
            rel_stacked_error=0.375 if layer.rank else 0.0625,
            effective_rank=99 if layer.rank else None,
            num_tokens=24,
            seconds=0.125,
            remedies=(),
            largest_coefficient=None,
        )
        for layer in plan.layers
    ]
    report = build_report(config, plan, windows, records, [], {"stack": 1.0})
    assert json.loads(to_json(report)) == report
    dense, lowrank = report["layers"][:2]
    assert dense["rel_stacked_error"] == 0.0625 and dense["form"] == "dense" and "rel_output_error" not in dense
    assert (lowrank["rel_output_error"], lowrank["rel_stacked_error"]) == (0.25, 0.375)
    assert lowrank["form"] == "two_factor" and "largest_coefficient" not in lowrank
    for table in (report_table(report), report_table(report, longest=3)):
        header, _, first, second = table.splitlines()[:4]
        assert header.split("  ")[0] == "layer" and "truncation" in header and "all in" in header
        assert "0.0625" in first and "0.25" in second and "0.375" in second
    naive = report_table(report_of(config, plan)).splitlines()[0]
    assert "truncation" in naive and "all in" not in naive


def test_a_short_table_keeps_dense_and_decomposed_layers_of_a_kind_apart() -> None:
    """They have other parts, and only one of them has a truncation."""
    sites = [LinearSite(f"h.{i}.mlp.c_fc", i, 256, 1024, False) for i in range(3)]
    lowrank = LowrankConfig(rank_pattern={"h.1.mlp.c_fc": 64, "h.2.mlp.c_fc": 64})
    config = LordConfig(model="org/model", lowrank=lowrank, gptq=GptqConfig(bits=4, group_size=32))
    report = report_of(config, build_plan(sites, lowrank, config.gptq, itemsize=4, other_bytes=0))
    dense, lowranks = report_table(report, longest=1).splitlines()[2:4]
    assert dense.startswith("mlp.c_fc (x1)") and lowranks.startswith("mlp.c_fc (x2)")
    seconds = [sum(part["seconds"] for layer in report["layers"][at] for part in layer["gptq"].values())
               for at in (slice(0, 1), slice(1, 3))]  # fmt: skip
    assert seconds == [0.25, 1.0] and "0.25" in dense and f"{1.0 + 2 * 0.125:.2f}" in lowranks


def test_a_pivoted_report_names_the_form_and_its_largest_coefficient() -> None:
    config, _ = make()
    lowrank = LowrankConfig(rank_ratio=0.5, form="pivoted")
    sites = [LinearSite(f"h.{i}.mlp.c_fc", i, 256, 1024, False) for i in range(2)]
    plan = build_plan(sites, lowrank, config.gptq, itemsize=4, other_bytes=0)
    windows = as_windows(torch.arange(24).view(3, 8), "text")
    records = [
        DecompositionRecord(name, rank, 0.25, rank, 24, 0.125, (), largest_coefficient=1.04)
        for name, rank in plan.rank_pattern.items()
    ]
    report = build_report(config, plan, windows, records, [], {})
    assert {(layer["form"], layer["largest_coefficient"]) for layer in report["layers"]} == {("pivoted", 1.04)}
    assert report["scheme"] == plan.scheme and "-pivoted-w4g32" in plan.scheme
    assert plan_dict(plan)["form_pattern"] == {"h.0.mlp.c_fc": "pivoted", "h.1.mlp.c_fc": "pivoted"}


@pytest.mark.parametrize("blocks", [1, 5])
def test_a_grouped_report_names_leaders_and_counts_the_shared_factor_once(blocks: int) -> None:
    sites = [LinearSite(f"h.{i}.mlp.{name}_proj", i, 256, 512, False) for i in range(blocks) for name in ("gate", "up")]
    lowrank = LowrankConfig(rank_ratio=0.5, form="grouped")
    gptq = GptqConfig(bits=4, group_size=32, bits_pattern={"all.up": 3})
    config = LordConfig(model="org/model", lowrank=lowrank, gptq=gptq)
    plan = build_plan(sites, lowrank, gptq, itemsize=4, other_bytes=0)
    windows = as_windows(torch.arange(24).view(3, 8), "text")
    solved = [GptqRecord(name, None if "up_proj" in name else 0.5, 0.1, 0.25) for name in plan.packings]
    report = build_report(config, plan, windows, [], solved, {})
    assert json.loads(to_json(report)) == report and report["format_version"] == 3
    leader, follower = report["layers"][:2]
    assert leader["leader"] == follower["leader"] == "h.0.mlp.gate_proj" and leader["form"] == follower["form"] == "grouped"
    assert (follower["bits"], follower["up_bits"]) == (4, 3)
    assert leader["gptq"].keys() == {"down", "up"} and follower["gptq"].keys() == {"up"}
    assert (leader["weights"], follower["weights"]) == (128 * (256 + 512), 128 * 512)
    totals = report["totals"]
    assert totals["param_ratio"] == 128 * (256 + 1024) / (256 * 1024)
    assert totals["linear_bytes"] == sum(layer["bytes"] for layer in report["layers"])
    assert plan_dict(plan)["group_pattern"] == {f"h.{i}.mlp.up_proj": f"h.{i}.mlp.gate_proj" for i in range(blocks)}
    assert "GPTQ to 3, 4 bits, group size 32" in model_card(report) and "grouped-mixed" in report["scheme"]
    for table in (report_table(report), report_table(report, longest=1)):
        first, second = table.splitlines()[2:4]
        assert "0.5 / 0.5" in first and "0.5" not in second.replace("512", "")


@pytest.mark.parametrize(("down", "up", "text"), [(4, 4, "4"), (4, 3, "4/3"), (None, None, "-"), (16, 16, "16")])
def test_both_text(down: int | None, up: int | None, text: str) -> None:
    assert both_text(down, up) == text


def test_form_text() -> None:
    leader = "model.layers.0.self_attn.q_proj"
    assert form_text("grouped", leader, leader) == "grouped" and form_text("pivoted", leader, "") == "pivoted"
    assert form_text("grouped packed", "model.layers.0.self_attn.k_proj", leader) == "grouped packed (q_proj)"


def test_the_model_card_has_front_matter_and_the_measured_figures() -> None:
    import yaml

    config, plan = make()
    report = report_of(config, plan)
    report["totals"]["file_bytes_on_disk"] = 7_000_000
    card = model_card(report)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "org/model" and front["library_name"] == "transformers" and "gptq" in front["tags"]
    for part in (
        f"{plan.bpw:.3f}",
        f"{plan.param_ratio:.3f}",
        "2 of 4",
        "7.0 MB",
        "0.2500 (0.2500)",
        "3 x 8 tokens of text",
    ):
        assert part in card, card
    float_card = model_card(report_of(*make(bits=16)))
    assert "gptq" not in yaml.safe_load(float_card.split("---\n")[1])["tags"] and "GPTQ to" not in float_card


def test_package_versions_leaves_out_what_is_not_installed() -> None:
    assert package_versions(["pytest", "no-such-package-at-all"]) == {"pytest": pytest.__version__}
