# SPDX-License-Identifier: Apache-2.0
"""Settings and their YAML: round trips, legal values, and what is said about others."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lord_quant.budget_config import BudgetConfig
from lord_quant.config import (
    BITS,
    FORMS,
    GROUP_SIZES,
    ORDERS,
    STACKS,
    CalibrationConfig,
    GptqConfig,
    JointConfig,
    LordConfig,
    LowrankConfig,
    merge,
    read_yaml,
)
from lord_quant.errors import BudgetError, ConfigError


CONFIGS = [
    LordConfig(model="m", lowrank=LowrankConfig(rank_ratio=0.75)),
    LordConfig(
        model="org/name",
        output="out",
        device="cuda:1",
        dtype="bfloat16",
        stack="naive",
        lowrank=LowrankConfig(
            rank_pattern={"mlp.c_fc": 96, "re:h\\.0\\.": 64},
            targets=("mlp", "*.c_attn"),
            ignore=("lm_head",),
            form="pivoted",
            form_pattern={"mlp.c_fc": "two_factor"},
            float64=True,
        ),
        calibration=CalibrationConfig(dataset="x.jsonl", text_key="code", num_samples=3, seq_len=5, seed=7, batch_size=2),
        gptq=GptqConfig(
            bits=3,
            group_size=32,
            sym=True,
            desc_act=True,
            act_group_aware=False,
            damp_percent=0.1,
            mse=2.4,
            true_sequential=False,
        ),
        joint=JointConfig(
            anchor=False,
            residual=False,
            rotate=False,
            refit=False,
            order="up_first",
            deflate=False,
            refine=0,
            two_sided=False,
            fisher=False,
            fisher_samples=3,
        ),
    ),
    LordConfig(
        model="m",
        lowrank=LowrankConfig(param_ratio=1, force_rank=True, mean_correction=False),
        gptq=GptqConfig(bits_pattern={"mlp": 3, "re:h\\.0\\.": 8}, group_size_pattern={"c_attn": 64}),
    ),
    LordConfig(
        model="m",
        lowrank=LowrankConfig(rank_ratio=1),
        budget=BudgetConfig(target_size="4GB", min_param_ratio=0.5, statistics="model.stats"),
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["defaults", "everything", "param_ratio", "budget"])
def test_yaml_round_trip(config: LordConfig, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    again = LordConfig.from_dict(read_yaml(path))
    assert again == config
    assert again.to_dict() == config.to_dict()


def test_every_section_is_looked_at_before_anything_is_refused() -> None:
    """One run names every problem; of one kind if there is one."""
    values = {
        "model": "m",
        "lowrank": {"rank_ratio": 2, "rank_ration": 1},
        "gptq": {"bits": 5},
        "budget": {"target_bpw": -1},
    }
    with pytest.raises(ConfigError) as caught:
        LordConfig.from_dict(values | {"calibration": 3})
    told = str(caught.value)
    assert "'rank_ration'; did you mean 'rank_ratio'?" in told and "bits is 5" in told and "target_bpw is -1" in told
    assert "section 'calibration' is int" in told
    with pytest.raises(BudgetError, match="target_bpw is -1"):
        LordConfig.from_dict({"model": "m", "budget": {"target_bpw": -1}})


def test_the_round_trip_covers_every_field() -> None:
    changed, defaults = CONFIGS[1].to_dict(), CONFIGS[0].to_dict()
    same = {
        f"{section}.{key}"
        for section in ("lowrank", "calibration", "gptq", "joint")
        for key, value in changed[section].items()
        if value == defaults[section][key]
    }
    third = {"lowrank.param_ratio", "lowrank.force_rank", "lowrank.mean_correction"}
    assert same == third | {"gptq.bits_pattern", "gptq.group_size_pattern"}


@pytest.mark.parametrize(
    ("values", "found", "nearest"),
    [
        ({"modle": "m"}, "modle", "model"),
        ({"model": "m", "lowrank": {"rank_ration": 0.5}}, "rank_ration", "rank_ratio"),
        ({"model": "m", "lowrank": {"rank_ratio": 1}, "gptq": {"groupsize": 128}}, "groupsize", "group_size"),
        ({"model": "m", "lowrank": {"rank_ratio": 1}, "calibration": {"num_sample": 1}}, "num_sample", "num_samples"),
        ({"model": "m", "lowrank": {"rank_ratio": 1}, "joint": {"ancor": False}}, "ancor", "anchor"),
        ({"model": "m", "lowrank": {"rank_ratio": 1}, "joints": {}}, "joints", "joint"),
    ],
)
def test_an_unknown_key_names_the_nearest(values: dict[str, Any], found: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"'{found}'; did you mean '{nearest}'"):
        LordConfig.from_dict(values)


def test_all_unknown_keys_of_a_mapping_are_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        LordConfig.from_dict({"model": "m", "zzzz": 1, "gtpq": {}, "stakc": "naive"})
    assert all(part in str(caught.value) for part in ("'zzzz'", "'gtpq'; did you mean 'gptq'", "'stack'", "known keys:"))


@pytest.mark.parametrize(
    ("section", "values", "parts"),
    [
        (GptqConfig, {"bits": 5}, ["bits is 5", "2, 3, 4, 8, 16", "nearest: 4"]),
        (GptqConfig, {"bits": 7}, ["bits is 7", "nearest: 8"]),
        (GptqConfig, {"bits": 4.0}, ["bits is 4.0", "2, 3, 4, 8, 16"]),
        (GptqConfig, {"bits": True}, ["bits is True"]),
        (GptqConfig, {"bits": "4"}, ["bits is '4'"]),
        (GptqConfig, {"group_size": 48}, ["group_size is 48", "32, 64, 128, 256", "nearest: "]),
        (GptqConfig, {"group_size": 120}, ["group_size is 120", "nearest: 128"]),
        (GptqConfig, {"group_size": -1}, ["group_size is -1", "nearest: 32"]),
        (GptqConfig, {"damp_percent": 0}, ["damp_percent is 0", "(0, 1)"]),
        (GptqConfig, {"damp_percent": 1}, ["damp_percent is 1", "(0, 1)"]),
        (GptqConfig, {"damp_percent": math.nan}, ["damp_percent is nan"]),
        (GptqConfig, {"damp_percent": "0.1"}, ["damp_percent is '0.1'"]),
        (GptqConfig, {"mse": -0.1}, ["mse is -0.1", "[0, 8]"]),
        (GptqConfig, {"mse": 8.5}, ["mse is 8.5", "[0, 8]"]),
        (GptqConfig, {"mse": math.nan}, ["mse is nan"]),
        (GptqConfig, {"mse": math.inf}, ["mse is inf"]),
        (GptqConfig, {"mse": True}, ["mse is True"]),
        (GptqConfig, {"mse": "2"}, ["mse is '2'"]),
        (GptqConfig, {"sym": 0}, ["sym is 0", "true or false"]),
        (GptqConfig, {"bits_pattern": {"mlp": 5}}, ["bits_pattern['mlp'] is 5", "2, 3, 4, 8;", "nearest: 4"]),
        (GptqConfig, {"bits_pattern": {"mlp": 16}}, ["bits_pattern['mlp'] is 16", "2, 3, 4, 8;", "nearest: 8"]),
        (GptqConfig, {"bits_pattern": {"mlp": 4.0}}, ["bits_pattern['mlp'] is 4.0"]),
        (GptqConfig, {"bits_pattern": {"mlp": "4"}}, ["bits_pattern['mlp'] is '4'"]),
        (GptqConfig, {"bits_pattern": {1: 4, "": 4}}, ["the key 1;", "the key '';", "layer pattern"]),
        (GptqConfig, {"bits_pattern": ["mlp=4"]}, ["bits_pattern is ['mlp=4']", "mapping of layer pattern to bits"]),
        (GptqConfig, {"bits_pattern": {"mlp": 4}, "bits": 16}, ["bits is 16 and bits_pattern is given", "2, 3, 4, 8"]),
        (
            GptqConfig,
            {"group_size_pattern": {"mlp": 48, "attn": True}},
            ["group_size_pattern['mlp'] is 48", "32, 64, 128, 256", "nearest: ", "group_size_pattern['attn'] is True"],
        ),
        (GptqConfig, {"group_size_pattern": 64}, ["group_size_pattern is 64", "mapping of layer pattern to group_size"]),
        (
            LowrankConfig,
            {"rank_ratio": 0.5, "form_pattern": {"mlp": "pivot", "attn": None}},
            ["form_pattern['mlp'] is 'pivot'", "did you mean 'pivoted'", "form_pattern['attn'] is None"],
        ),
        (LowrankConfig, {"rank_ratio": 0.5, "form_pattern": "pivoted"}, ["form_pattern is 'pivoted'", "mapping"]),
        (JointConfig, {"order": "up"}, ["order is 'up'", "auto, down_first, up_first"]),
        (JointConfig, {"order": "downfirst"}, ["order is 'downfirst'", "did you mean 'down_first'"]),
        (JointConfig, {"order": None}, ["order is None", "auto"]),
        (JointConfig, {"refine": -1}, ["refine is -1", "0 to 100"]),
        (JointConfig, {"refine": 101}, ["refine is 101", "0 to 100"]),
        (JointConfig, {"refine": 2.0}, ["refine is 2.0"]),
        (JointConfig, {"refine": True}, ["refine is True"]),
        *(
            (JointConfig, {name: 1}, [f"{name} is 1", "true or false"])
            for name in ("anchor", "residual", "rotate", "refit", "deflate", "two_sided", "fisher")
        ),
        (LowrankConfig, {"rank_ratio": 0.5, "form": "pivot"}, ["form is 'pivot'", "did you mean 'pivoted'"]),
        (LowrankConfig, {"rank_ratio": 0.5, "form": None}, ["form is None", "two_factor, pivoted"]),
        (LowrankConfig, {"rank_ratio": 0}, ["rank_ratio is 0", "(0, 1]"]),
        (LowrankConfig, {"rank_ratio": 1.5}, ["rank_ratio is 1.5", "(0, 1]"]),
        (LowrankConfig, {"rank_ratio": -0.5}, ["rank_ratio is -0.5", "(0, 1]"]),
        (LowrankConfig, {"rank_ratio": math.nan}, ["rank_ratio is nan"]),
        (LowrankConfig, {"rank_ratio": True}, ["rank_ratio is True"]),
        (LowrankConfig, {"rank_ratio": "0.5"}, ["rank_ratio is '0.5'"]),
        (LowrankConfig, {"param_ratio": 0.0}, ["param_ratio is 0.0", "(0, 1]"]),
        (LowrankConfig, {"param_ratio": 2}, ["param_ratio is 2", "(0, 1]"]),
        (LowrankConfig, {}, ["no rank is chosen", "rank_ratio", "param_ratio", "rank_pattern"]),
        (LowrankConfig, {"rank_ratio": 0.5, "param_ratio": 0.5}, ["rank_ratio and param_ratio", "exactly one"]),
        (LowrankConfig, {"rank_ratio": 0.5, "rank_pattern": {"a": 1}}, ["rank_ratio and rank_pattern", "exactly one"]),
        (LowrankConfig, {"rank_pattern": {"a": 0}}, ["rank_pattern['a'] is 0", "at least 1"]),
        (LowrankConfig, {"rank_pattern": {"a": 64.0}}, ["rank_pattern['a'] is 64.0"]),
        (LowrankConfig, {"rank_pattern": ["a=64"]}, ["rank_pattern is ['a=64']", "mapping"]),
        (LowrankConfig, {"rank_ratio": 0.5, "targets": ()}, ["targets is empty", "all"]),
        (LowrankConfig, {"rank_ratio": 0.5, "targets": "mlp"}, ["targets is 'mlp'", "list"]),
        (LowrankConfig, {"rank_ratio": 0.5, "ignore": ("",)}, ["ignore is ('',)"]),
        (CalibrationConfig, {"num_samples": 0}, ["num_samples is 0", "at least 1"]),
        (CalibrationConfig, {"num_samples": 1.5}, ["num_samples is 1.5"]),
        (CalibrationConfig, {"batch_size": 0}, ["batch_size is 0", "at least 1"]),
        (CalibrationConfig, {"seq_len": 1}, ["seq_len is 1", "at least 2"]),
        (CalibrationConfig, {"seed": -1}, ["seed is -1", "0 to 4294967295"]),
        (CalibrationConfig, {"seed": 2**32}, ["seed is 4294967296", "0 to 4294967295"]),
        (LowrankConfig, {"rank_pattern": {1: 64, None: 32}}, ["the key 1;", "the key None;", "layer pattern"]),
        (CalibrationConfig, {"text_key": None}, ["text_key is None", "'text'"]),
        (CalibrationConfig, {"text_key": 1}, ["text_key is 1"]),
        (CalibrationConfig, {"dataset": ""}, ["dataset is ''", "python-stdlib"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_an_illegal_value_says_what_was_found_and_wanted(section: type, values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"dtype": "float23"}, ["dtype is 'float23'", "bfloat16", "did you mean 'float32'"]),
        ({"dtype": "int8"}, ["dtype is 'int8'", "auto, float32"]),
        ({"stack": "naiv"}, ["stack is 'naiv'", "did you mean 'naive'"]),
        ({"stack": "join"}, ["stack is 'join'", "joint, naive", "did you mean 'joint'"]),
        (
            {"stack": "naive", "gptq": {"bits_pattern": {"mlp": 8}, "group_size_pattern": {"mlp": 32}}},
            ["bits_pattern and group_size_pattern given: the naive stack packs all layers alike; wanted --stack joint"],
        ),
        ({"model": ""}, ["model is not given"]),
        ({"model": 3}, ["model is 3; wanted a folder or a hub name, as text"]),
        ({"output": 3}, ["output is 3", "folder"]),
        ({"output": ["a"], "device": 0}, ["output is ['a']", "device is 0", "'cuda:0'"]),
        ({"device": None}, ["device is None"]),
    ],
)
def test_illegal_run_settings(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        LordConfig.from_dict({"model": "m", "lowrank": {"rank_ratio": 0.5}} | values)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_all_problems_of_a_section_are_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        GptqConfig(bits=5, group_size=48, damp_percent=2)
    assert all(name in str(caught.value) for name in ("bits is 5", "group_size is 48", "damp_percent is 2"))
    with pytest.raises(ConfigError) as caught:
        LowrankConfig(rank_ratio=3, param_ratio=3, targets=())
    assert all(name in str(caught.value) for name in ("rank_ratio is 3", "param_ratio is 3", "targets", "exactly one"))
    with pytest.raises(ConfigError) as caught:
        CalibrationConfig(num_samples=0, seq_len=0, seed=-1)
    assert all(name in str(caught.value) for name in ("num_samples", "seq_len", "seed"))
    with pytest.raises(ConfigError) as caught:
        JointConfig(anchor="yes", order="first", refine=None)
    assert all(name in str(caught.value) for name in ("anchor is 'yes'", "order is 'first'", "refine is None"))


def test_configurations_are_frozen() -> None:
    for part in (CONFIGS[0], *(getattr(CONFIGS[0], name) for name in ("lowrank", "gptq", "calibration", "joint"))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


@pytest.mark.parametrize("section", ["lowrank", "gptq", "calibration", "joint"])
def test_a_section_that_is_no_mapping(section: str) -> None:
    with pytest.raises(ConfigError, match=f"'{section}' is str; wanted a mapping"):
        LordConfig.from_dict({"model": "m", "lowrank": {"rank_ratio": 0.5}} | {section: "nonsense"})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("model: m\n1: x\n", "1"),
        ("model: m\non: x\n", "True"),
        ("model: m\nlowrank: {rank_ratio: 1}\ngptq: {4: bits, null: x}\n", "None"),
    ],
    ids=["number", "on", "section"],
)
def test_a_key_that_is_no_string_is_a_configuration_error(text: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"unknown key in .*\n(  .*\n)*  {found}; wanted a name\n"):
        LordConfig.from_dict(read_yaml(path))


def test_a_budget_takes_the_place_of_ranks() -> None:
    config = LordConfig.from_dict({"model": "m", "budget": {"target_bpw": 3}, "lowrank": {"targets": ["mlp"]}})
    assert config.budget == BudgetConfig(target_bpw=3)
    assert (config.lowrank.rank_ratio, config.lowrank.targets) == (1, ("mlp",))
    assert LordConfig.from_dict({"model": "m", "budget": None, "lowrank": {"rank_ratio": 1}}).budget is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": {"target_bwp": 3}}, "unknown key in section 'budget':\n  'target_bwp'; did you mean 'target_bpw'"),
        ({"budget": 3}, "section 'budget' is int; wanted a mapping"),
        ({"budgets": {"target_bpw": 3}}, "'budgets'; did you mean 'budget'"),
        (
            {"lowrank": {"rank_ratio": 0.5, "force_rank": True}, "gptq": {"bits_pattern": {"mlp": 3}}},
            "a budget and force_rank, rank_ratio, bits_pattern are given; wanted one or the other",
        ),
        ({"lowrank": {"rank_pattern": {"mlp": 32}}}, "a budget and rank_pattern are given"),
        ({"stack": "naive"}, "a budget is given for the naive stack"),
    ],
)
def test_what_makes_no_sense_beside_a_budget_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LordConfig.from_dict({"model": "m", "budget": {"target_bpw": 3}} | values)


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ConfigError, match="model is not given"):
        LordConfig.from_dict({"lowrank": {"rank_ratio": 0.5}})


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "holds list"), ("", "holds NoneType"), ("a: [", "is not YAML")],
    ids=["list", "empty", "bad"],
)
def test_read_yaml_refuses(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"run.yaml.*{message}"):
        read_yaml(path)


def test_read_yaml_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml.*No such file"):
        read_yaml(tmp_path / "absent.yaml")


def test_every_listed_value_is_legal() -> None:
    assert [GptqConfig(bits=bits).bits for bits in BITS] == [2, 3, 4, 8, 16]
    assert [GptqConfig(group_size=size).group_size for size in GROUP_SIZES] == [32, 64, 128, 256]
    assert [LowrankConfig(rank_ratio=1, form=form).form for form in FORMS] == list(FORMS)
    assert FORMS == ("two_factor", "pivoted", "column_pivoted", "grouped")
    assert [JointConfig(order=order).order for order in ORDERS] == ["auto", "down_first", "up_first"]
    assert [LordConfig("m", stack=stack, lowrank=LowrankConfig(rank_ratio=1)).stack for stack in STACKS] == [
        "joint",
        "naive",
    ]
    assert (JointConfig(refine=0).refine, JointConfig(refine=100).refine, GptqConfig(mse=0).mse) == (0, 100, 0)
    assert LowrankConfig(rank_ratio=1).rank_ratio == LowrankConfig(param_ratio=1.0).param_ratio == 1


settings_tree = st.recursive(
    st.integers(), lambda leaves: st.dictionaries(st.sampled_from("abc"), leaves, max_size=3), max_leaves=8
)
mappings = st.dictionaries(st.sampled_from("abc"), settings_tree, max_size=3)


@given(mappings, mappings)
def test_merge_lays_one_mapping_over_another(base: dict[str, Any], override: dict[str, Any]) -> None:
    before = copy.deepcopy((base, override))
    merged = merge(base, override)
    assert (base, override) == before
    assert set(merged) == set(base) | set(override)
    for key in merged:
        if key not in override:
            assert merged[key] == base[key]
        elif isinstance(override[key], dict) and isinstance(base.get(key), dict):
            assert merged[key] == merge(base[key], override[key])
        else:
            assert merged[key] == override[key]
    assert merge(merged, override) == merged


@pytest.mark.parametrize("number", ["0010", "1:30", "-007", "1:30.5"])
def test_numbers_with_more_than_one_reading_are_refused(number: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\nlowrank: {{rank_ratio: 1}}\ncalibration: {{seed: {number}}}\n")
    with pytest.raises(ConfigError, match=rf"found the number {number}, which has more than one reading"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-2", 0.01), ("2E+1", 20.0), ("-3e0", -3.0), ("0.05", 0.05), ("1_000", 1000)]
)
def test_numbers_are_read_as_flags_are(text: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"a: {text}\n")
    assert read_yaml(path) == {"a": value} and type(read_yaml(path)["a"]) is type(value)
