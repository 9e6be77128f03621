# SPDX-License-Identifier: Apache-2.0
"""Plans of layers that share a bottleneck, and of factors with bits of their own: bytes, ranks, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lord_quant.config import GptqConfig, LordConfig, LowrankConfig
from lord_quant.errors import ConfigError, RankError, TargetError
from lord_quant.plan import Plan, build_plan
from lord_quant.report import plan_table
from lord_quant.sizes.layer_bytes import linear_bytes, rank_step
from lord_quant.targets import LinearSite, siblings


ATTENTION = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "o_proj": 256}
MLP = {"gate_proj": 512, "up_proj": 512, "down_proj": 256}


def block(index: int = 0, biased: tuple[str, ...] = ()) -> list[LinearSite]:
    """A Llama-like block of width 256."""
    shapes = [(f"self_attn.{name}", 256, m) for name, m in ATTENTION.items()]
    shapes += [(f"mlp.{name}", 512 if name == "down_proj" else 256, m) for name, m in MLP.items()]
    return [LinearSite(f"h.{index}.{n}", index, i, o, n.rpartition(".")[2] in biased) for n, i, o in shapes]


def plan(sites: list[LinearSite] | None = None, itemsize: int = 4, **options: Any) -> Plan:
    """A grouped plan; options of either configuration, by name."""
    packing = {
        key: options.pop(key) for key in ("bits", "group_size", "bits_pattern", "group_size_pattern") if key in options
    }
    lowrank, gptq = LowrankConfig(**({"form": "grouped"} | options)), GptqConfig(**({"group_size": 32} | packing))
    return build_plan(sites or block(), lowrank, gptq, itemsize=itemsize, other_bytes=1000)


def by_leaf(plan: Plan) -> dict[str, Any]:
    return {layer.name.rpartition(".")[2]: layer for layer in plan.layers}


def test_bytes_of_a_grouped_plan_by_hand() -> None:
    sites = block(biased=("q_proj", "k_proj", "v_proj"))
    made = plan(
        sites, itemsize=2, rank_pattern={"q_proj": 128, "k_proj": 128, "v_proj": 128, "down_proj": 64}, group_size=64
    )
    layers = by_leaf(made)
    down = 256 * 128 // 2 + 2 * 128 * 4 + 128 * 4 // 2 + 4 * 256
    ups = {leaf: 128 * m // 2 + 2 * m * 2 + m * 2 // 2 + 4 * 128 for leaf, m in ATTENTION.items()}
    assert layers["q_proj"].weight_bytes == down + ups["q_proj"]
    assert (layers["k_proj"].weight_bytes, layers["v_proj"].weight_bytes) == (ups["k_proj"], ups["v_proj"])
    assert [layers[leaf].bias_bytes for leaf in ("q_proj", "k_proj", "v_proj")] == [512, 256, 256]
    assert layers["q_proj"].factor_shapes() == {".down": (256, 128), ".up": (128, 256)}
    assert layers["k_proj"].factor_shapes() == {".up": (128, 128)}
    assert sum(layers[leaf].weights for leaf in ("q_proj", "k_proj", "v_proj")) == 128 * (256 + 256 + 128 + 128)
    assert [layers[leaf].leader for leaf in ("q_proj", "k_proj", "o_proj", "down_proj")] == [
        "h.0.self_attn.q_proj",
        "h.0.self_attn.q_proj",
        "",
        "",
    ]
    assert made.group_pattern == {f"h.0.self_attn.{leaf}": "h.0.self_attn.q_proj" for leaf in ("k_proj", "v_proj")}
    assert made.form_pattern == {f"h.0.self_attn.{leaf}": "grouped" for leaf in ("q_proj", "k_proj", "v_proj")}
    assert layers["down_proj"].form == "two_factor" and layers["down_proj"].rank == 64  # none is fed what it is fed
    assert not made.mixed and made.scheme == f"lord-{made.param_ratio:.2f}-grouped-w4g64"
    assert made.tensor_bytes == 1000 + sum(layer.weight_bytes + layer.bias_bytes for layer in made.layers)


def test_bytes_of_factors_with_bits_of_their_own_by_hand() -> None:
    pattern = {"all": 8, "attention.up": 3, "q_proj.down": 2, "mlp.down_proj.down": 4}
    made = plan(rank_pattern={"re:[qkv]_proj": 64, "down_proj": 96}, bits_pattern=pattern)
    layers = by_leaf(made)
    q, k, down, gate = (layers[leaf] for leaf in ("q_proj", "k_proj", "down_proj", "gate_proj"))
    assert [(one.bits, one.up_bits) for one in (q, k, down, gate)] == [(2, 3), (2, 3), (4, 8), (8, 8)]
    shared = 256 * 64 * 2 // 8 + 2 * 64 * 8 + 64 * 8 * 2 // 8 + 4 * 256
    up = {m: 64 * m * 3 // 8 + 2 * m * 2 + m * 2 * 3 // 8 + 4 * 64 for m in (256, 128)}
    assert (q.weight_bytes, k.weight_bytes) == (shared + up[256], up[128])
    first = 512 * 96 * 4 // 8 + 2 * 96 * 16 + 96 * 16 * 4 // 8 + 4 * 512
    second = 96 * 256 + 2 * 256 * 3 + 256 * 3 + 4 * 96
    assert down.weight_bytes == first + second
    assert made.mixed and made.packings["h.0.self_attn.q_proj.down"] == (2, 32)
    attention = {"q_proj.down": 2, "q_proj.up": 3, "k_proj.up": 3, "v_proj.up": 3}
    assert made.bits_pattern == {
        **{f"h.0.self_attn.{name}": bits for name, bits in attention.items()},
        **{f"h.0.{name}": 8 for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj.up")},
    }


def test_factors_with_bits_of_their_own_in_every_form() -> None:
    for form in ("two_factor", "pivoted"):
        made = plan(form=form, rank_pattern={"gate_proj": 96}, bits_pattern={"gate_proj.up": 3})
        gate = by_leaf(made)["gate_proj"]
        outputs = 512 - 96 * (form == "pivoted")
        parts = [linear_bytes(256, 96, False, 4, 32, 4), linear_bytes(96, outputs, False, 3, 32, 4)]
        assert gate.weight_bytes == sum(part.weight for part in parts) + 2 * 512 * (form == "pivoted")
        assert made.bits_pattern == {"h.0.mlp.gate_proj.up": 3}


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ({"mlp.up": 3}, {"gate_proj": (4, 3), "up_proj": (4, 3)}),
        ({"mlp.up": 3, "mlp": 8}, {"gate_proj": (8, 8), "up_proj": (8, 8)}),
        ({"mlp": 8, "mlp.up": 3}, {"gate_proj": (8, 3), "up_proj": (8, 3)}),
        ({"*_proj.up": 3}, {"gate_proj": (4, 3), "q_proj": (4, 3)}),
        ({"re:(gate|up)_proj$": 3}, {"gate_proj": (3, 3), "q_proj": (4, 4)}),
        ({"re:down_proj|mlp.down": 3}, {"down_proj": (3, 3), "gate_proj": (4, 4)}),  # as it stands, it matches layers
        ({"h.0.mlp.gate_proj.down": 8}, {"gate_proj": (8, 4), "up_proj": (8, 4)}),
        ({"all.down": 8, "attention.down": 4}, {"gate_proj": (8, 4), "k_proj": (4, 4)}),
    ],
)
def test_what_a_bits_pattern_means(pattern: dict[str, int], found: dict[str, tuple[int, int]]) -> None:
    layers = by_leaf(plan(rank_ratio=0.25, bits_pattern=pattern))
    assert all(layers[leaf].rank for leaf in found)
    bits = {leaf: (layers[leaf].bits, layers[leaf].up_bits) for leaf in found}
    assert bits == found


def test_a_layer_called_up_is_not_taken_for_a_factor() -> None:
    sites = [LinearSite(f"h.0.mlp.{name}", 0, 256, 512, False) for name in ("up", "down")]
    bits = {
        layer.name: (layer.bits, layer.up_bits) for layer in plan(sites, rank_ratio=0.25, bits_pattern={"mlp.up": 3}).layers
    }
    assert bits == {"h.0.mlp.up": (3, 3), "h.0.mlp.down": (4, 4)}
    bits = {
        layer.name: (layer.bits, layer.up_bits)
        for layer in plan(sites, rank_ratio=0.25, bits_pattern={"mlp.up.up": 3}).layers
    }
    assert bits == {"h.0.mlp.up": (4, 3), "h.0.mlp.down": (4, 4)}


def test_bytes_of_factors_with_group_sizes_of_their_own_by_hand() -> None:
    """The group size of `up` is the step of ranks; a shared `down` has its leader's."""
    sizes = {"all": 64, "attention.up": 32, "gate_proj.down": 128}
    ranks = {"re:[qkv]_proj": 96, "gate_proj": 128, "down_proj": 64}
    made = plan(rank_pattern=ranks, group_size_pattern=sizes)
    layers = by_leaf(made)
    q, k, gate, down = (layers[leaf] for leaf in ("q_proj", "k_proj", "gate_proj", "down_proj"))
    assert [(one.group_size, one.up_group_size) for one in (q, k, gate, down)] == [(64, 32), (64, 32), (128, 64), (64, 64)]
    shared = 256 * 96 // 2 + 2 * 96 * 4 + 96 * 4 // 2 + 4 * 256
    up = {m: 96 * m // 2 + 2 * m * 3 + m * 3 // 2 + 4 * 96 for m in (256, 128)}
    assert (q.weight_bytes, k.weight_bytes) == (shared + up[256], up[128])
    first = 256 * 128 // 2 + 2 * 128 * 2 + 128 * 2 // 2 + 4 * 256
    assert gate.weight_bytes == first + 128 * 512 // 2 + 2 * 512 * 2 + 512 * 2 // 2 + 4 * 128
    assert made.mixed and made.group_size == 32
    usual = {f"h.0.{name}": 64 for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")}
    assert made.group_size_pattern == usual | {
        "h.0.self_attn.q_proj.down": 64,
        "h.0.mlp.gate_proj.down": 128,
        "h.0.mlp.gate_proj.up": 64,
    }
    again = plan(rank_pattern=made.rank_pattern, group_size_pattern=made.group_size_pattern)
    assert again == made
    with pytest.raises(RankError, match="gate_proj: rank 96; wanted a multiple of 64 up to 256, nearest: 128"):
        plan(rank_pattern={"gate_proj": 96}, group_size_pattern={"gate_proj.up": 64})


@pytest.mark.parametrize("key", ["o_proj.up", "k_proj.down", "gate_proj.up"])
def test_bits_of_a_factor_that_no_layer_will_have_are_refused(key: str) -> None:
    for pattern, value in (("bits_pattern", 3), ("group_size_pattern", 64)):
        with pytest.raises(RankError, match=f"{pattern} names factors that no layer will have: '{key}'; wanted a rank"):
            plan(rank_pattern={"q_proj": 64, "k_proj": 64}, **{pattern: {key: value}})
    with pytest.raises(TargetError, match="'qq_proj' matches no layer; did you mean 'q_proj'"):
        plan(rank_ratio=0.25, bits_pattern={"qq_proj.up": 3})


def test_the_limit_of_a_rank_is_that_of_all_outputs_together() -> None:
    """k and v alone have 128 outputs; q, k and v together have more than inputs."""
    assert by_leaf(plan(rank_pattern={"q_proj": 160, "k_proj": 160, "v_proj": 160}))["k_proj"].rank == 160
    assert by_leaf(plan(rank_pattern={"k_proj": 96, "v_proj": 96}))["k_proj"].rank == 96
    with pytest.raises(RankError, match="k_proj: rank 288; wanted a multiple of 32 up to 256, nearest: 256"):
        plan(rank_pattern={"q_proj": 288, "k_proj": 288, "v_proj": 288})
    with pytest.raises(RankError, match="k_proj: rank 160; wanted a multiple of 32 up to 128, nearest: 128"):
        plan(rank_pattern={"k_proj": 160}, form="two_factor")
    narrow = [LinearSite(f"h.0.attn.{name}", 0, 256, 32, False) for name in ("q_proj", "k_proj", "v_proj")]
    with pytest.raises(RankError, match="rank 128; wanted a multiple of 32 up to 96, nearest: 96"):
        plan(narrow, rank_pattern={"all": 128})


def test_ratios_are_of_the_merged_layer() -> None:
    ranks = {leaf: layer.rank for leaf, layer in by_leaf(plan(rank_ratio=0.5)).items()}
    assert ranks["q_proj"] == ranks["k_proj"] == ranks["v_proj"] == 128  # 512 x 256 together
    assert ranks["gate_proj"] == ranks["up_proj"] == 128 and ranks["o_proj"] is None
    ranks = {leaf: layer.rank for leaf, layer in by_leaf(plan(param_ratio=0.75)).items()}
    assert ranks["k_proj"] == 128 and ranks["gate_proj"] == 160  # 0.75 · 256 · 512 / 768; 0.75 · 256 · 1024 / 1280, up
    assert by_leaf(plan(rank_ratio=0.5, form="two_factor"))["k_proj"].rank == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"q_proj": 64, "k_proj": 96}}, "k_proj: rank 96; wanted that of h.0.self_attn.q_proj, 64"),
        (
            {"rank_ratio": 0.5, "group_size_pattern": {"v_proj": 64}},
            "v_proj: group size of `up` 64; wanted that of h.0.self_attn.q_proj, 32",
        ),
        # At 256 inputs per scale v would stay dense, and the others would be a group planned as if it were in.
        (
            {"rank_ratio": 0.5, "group_size_pattern": {"v_proj": 256}},
            "v_proj: group size 256; wanted that of h.0.self_attn.q_proj, 32",
        ),
        (
            {"rank_ratio": 0.5, "group_size_pattern": {"q_proj": 256, "k_proj": 256}},
            "v_proj: group size of `up` 32; wanted that of h.0.self_attn.q_proj, 256",
        ),
        (
            {"rank_ratio": 0.5, "bits_pattern": {"up_proj.up": 3}},
            "up_proj: bits of `up` 3; wanted that of h.0.mlp.gate_proj, 4",
        ),
        (
            {"rank_ratio": 0.5, "bits_pattern": {"k_proj": 8}},
            "k_proj: bits of `up` 8; wanted that of h.0.self_attn.q_proj, 4",
        ),
    ],
)
def test_layers_of_a_group_that_differ_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RankError, match="grouped layers share a bottleneck and must be alike") as caught:
        plan(**options)
    assert message in str(caught.value)


def test_mixed_biases_need_the_mean_correction() -> None:
    sites = block(biased=("q_proj",))
    with pytest.raises(RankError) as caught:
        plan(sites, rank_ratio=0.5, mean_correction=False)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["h.0.self_attn.k_proj", "h.0.self_attn.v_proj"]
    assert "bias False; wanted that of h.0.self_attn.q_proj, True" in lines[1]
    for kept in (plan(sites, rank_ratio=0.5), plan(block(biased=("q_proj", "k_proj", "v_proj")), rank_ratio=0.5)):
        assert {layer.biased for layer in kept.layers if layer.form == "grouped"} == {True}
    assert not any(layer.biased for layer in plan(rank_ratio=0.5, mean_correction=False).layers)


def test_layers_that_stay_dense_need_not_be_alike() -> None:
    made = plan(rank_pattern={"down_proj": 64}, bits_pattern={"k_proj": 8}, group_size_pattern={"v_proj": 64})
    assert made.rank_pattern == {"h.0.mlp.down_proj": 64} and made.group_pattern == {} and made.form_pattern == {}


def test_layers_without_a_partner_are_two_factors() -> None:
    made = plan(rank_ratio=0.25, targets=("k_proj", "o_proj", "down_proj", "gate_proj"))
    assert len(made.rank_pattern) == 4 and made.form_pattern == {} and made.group_pattern == {}
    same = plan(rank_ratio=0.25, targets=("k_proj", "o_proj", "down_proj", "gate_proj"), form="two_factor")
    assert made == same
    wide = [site._replace(in_features=128) if site.name.endswith("k_proj") else site for site in block()]
    assert plan(wide, rank_ratio=0.25).group_pattern == {  # another width is another input
        "h.0.self_attn.v_proj": "h.0.self_attn.q_proj",
        "h.0.mlp.up_proj": "h.0.mlp.gate_proj",
    }


def test_a_rank_pattern_groups_those_it_names() -> None:
    made = plan(rank_pattern={"q_proj": 64, "v_proj": 64})
    layers = by_leaf(made)
    assert made.group_pattern == {"h.0.self_attn.v_proj": "h.0.self_attn.q_proj"} and layers["k_proj"].rank is None
    assert layers["k_proj"].leader == "" and layers["v_proj"].leader == layers["q_proj"].name
    assert layers["q_proj"].weights + layers["v_proj"].weights == 64 * (256 + 256 + 128)
    with pytest.raises(RankError, match="up to 256"):
        plan(rank_pattern={"q_proj": 288, "v_proj": 288})


def test_a_form_pattern_groups_some_and_not_others() -> None:
    made = plan(form="two_factor", rank_ratio=0.25, form_pattern={"mlp": "grouped", "down_proj": "pivoted"})
    assert made.group_pattern == {"h.0.mlp.up_proj": "h.0.mlp.gate_proj"}
    assert by_leaf(made)["down_proj"].form == "pivoted" and by_leaf(made)["k_proj"].form == "two_factor"
    kept = plan(rank_ratio=0.25, form_pattern={"q_proj": "two_factor"})
    assert kept.group_pattern["h.0.self_attn.v_proj"] == "h.0.self_attn.k_proj"


def test_groups_do_not_reach_across_blocks() -> None:
    made = plan(block(0) + block(1), rank_ratio=0.25)
    assert len(made.group_pattern) == 6
    assert all(name.split(".")[1] == leader.split(".")[1] for name, leader in made.group_pattern.items())
    assert [[site.name for site in together] for together in siblings(block(1))] == [
        [f"h.1.self_attn.{leaf}_proj" for leaf in "qkv"],
        ["h.1.mlp.gate_proj", "h.1.mlp.up_proj"],
    ]


def test_a_plan_says_the_same_again_when_its_patterns_are_given_back() -> None:
    pattern = {"attention.up": 3, "q_proj.down": 8, "down_proj.down": 2}
    made = plan(block(0) + block(1), rank_ratio=0.25, bits_pattern=pattern)
    again = plan(
        block(0) + block(1),
        form="two_factor",
        rank_pattern=made.rank_pattern,
        form_pattern=made.form_pattern,
        bits_pattern=made.bits_pattern,
    )
    assert again == made


sizes = st.integers(1, 12).map(lambda k: 32 * k)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(sizes, min_size=2, max_size=3),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.sampled_from(["rank_ratio", "param_ratio"]),
    st.sampled_from([2, 3, 4, 8, 16]),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([32, 64, 128]),
    st.booleans(),
)
def test_laws_of_groups(
    inputs: int, outputs: list[int], kept: float, way: str, bits: int, up_bits: int, group: int, correct: bool
) -> None:
    """A group is the layer that all its outputs make: r (n + sum m) weights, equal bytes but for indices."""
    n, m = group * inputs, sum(outputs)
    sites = [LinearSite(f"h.0.{leaf}", 0, n, o, False) for leaf, o in zip(("q", "k", "v"), outputs, strict=False)]
    merged = [LinearSite("h.0.whole", 0, n, m, False)]
    packing: dict[str, Any] = {"bits": bits, "group_size": group}
    packing |= {"bits_pattern": {"all.up": up_bits}} if bits != 16 else {}
    try:
        one = plan(merged, form="two_factor", mean_correction=correct, **packing, **{way: kept}).layers[0]
    except RankError:
        assume(False)
    made = plan(sites, mean_correction=correct, **packing, **{way: kept})
    r = one.rank
    assert {layer.rank for layer in made.layers} == {r} and r % rank_step(group) == 0 and r <= min(n, m)
    assert sum(layer.weights for layer in made.layers) == r * (n + m) < n * m
    indices = 0 if bits == 16 else 4 * r * (len(sites) - 1)  # every `up` has its own
    assert sum(layer.weight_bytes for layer in made.layers) == one.weight_bytes + indices
    assert sum(layer.bias_bytes for layer in made.layers) == one.bias_bytes
    assert made.group_pattern == {site.name: sites[0].name for site in sites[1:]}
    products = {name: math.prod(shape) for layer in made.layers for name, shape in layer.factor_shapes().items()}
    assert products[".down"] == n * r and len(made.packings) == len(sites) + 1


def test_tables_show_form_leader_and_bits_of_both_factors() -> None:
    made = plan(rank_ratio=0.25, bits_pattern={"attention.up": 3})
    header, _, *lines = plan_table(made).splitlines()
    assert header.split()[:8] == ["layer", "out", "x", "in", "rank", "form", "bits", "group"]
    shown = {line.split()[0].rpartition(".")[2]: line.split()[3:] for line in lines if line.startswith("h.0")}
    assert shown["q_proj"][:2] == ["grouped", "4/3"] and shown["k_proj"][:3] == ["grouped", "(q_proj)", "4/3"]
    assert shown["o_proj"][:2] == ["two_factor", "4/3"] and shown["up_proj"][:3] == ["grouped", "(gate_proj)", "4"]


def test_the_naive_stack_refuses_groups_however_they_are_asked_for() -> None:
    for lowrank in ({"form": "grouped"}, {"form_pattern": {"mlp": "grouped"}}):
        with pytest.raises(
            ConfigError, match="'grouped': the naive stack decomposes every layer alone; wanted --stack joint"
        ):
            LordConfig("m", stack="naive", lowrank=LowrankConfig(rank_ratio=0.5, **lowrank))
        LordConfig("m", lowrank=LowrankConfig(rank_ratio=0.5, **lowrank))
