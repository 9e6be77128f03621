# SPDX-License-Identifier: Apache-2.0
"""Ranks, forms and bytes that a plan gives every layer, and the plans that are refused."""

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plans import WITH_BIAS, WITHOUT_BIAS, plan, ratio, shapes, site, sites_of, ways

from lord_quant.config import BITS, GptqConfig
from lord_quant.errors import RankError, TargetError
from lord_quant.sizes.layer_bytes import linear_bytes, rank_step
from lord_quant.targets import LinearSite


@pytest.mark.parametrize(
    ("arguments", "weight", "bias"),
    [
        # qweight + scales + qzeros + g_idx, worked out by hand
        ((128, 256, True, 4, 64, 4), 16384 + 1024 + 256 + 512, 512),
        ((128, 256, False, 8, 128, 4), 32768 + 512 + 256 + 512, 0),
        ((96, 64, True, 3, 32, 2), 2304 + 384 + 72 + 384, 128),
        ((64, 32, False, 2, 64, 2), 512 + 64 + 8 + 256, 0),
        ((192, 32, False, 4, 128, 2), 3072 + 128 + 32 + 768, 0),  # a short last group
        ((128, 256, True, 16, 64, 4), 131072, 1024),
        ((128, 256, True, 16, 64, 2), 65536, 512),
        ((128, 256, False, 16, 64, 2), 65536, 0),
    ],
)
def test_bytes_of_one_layer(arguments: tuple, weight: int, bias: int) -> None:
    assert linear_bytes(*arguments) == (weight, bias)


def test_bytes_and_bits_per_weight_of_a_plan_by_hand() -> None:
    sites = [site("up", 256, 1024), site("down", 1024, 256, True)]
    result = plan(sites, itemsize=2, gptq=GptqConfig(bits=4, group_size=64), rank_pattern={"up": 128})
    up, down = result.layers
    # up: 256 -> 128 -> 1024 with a bias of its own making; down stays dense and is packed
    up_down = 256 * 128 // 2 + 2 * 128 * 4 + 128 * 4 // 2 + 4 * 256
    up_up = 128 * 1024 // 2 + 2 * 1024 * 2 + 1024 * 2 // 2 + 4 * 128
    assert (up.rank, up.adds_bias, up.weight_bytes, up.bias_bytes) == (128, True, up_down + up_up, 2 * 1024)
    dense = 1024 * 256 // 2 + 2 * 256 * 16 + 256 * 16 // 2 + 4 * 1024
    assert (down.rank, down.adds_bias, down.weight_bytes, down.bias_bytes) == (None, False, dense, 2 * 256)
    counted = up_down + up_up + 2 * 1024 + dense  # the bias that was there does not count, the added one does
    assert result.bpw == 8 * counted / (2 * 256 * 1024)
    assert up.bpw == 8 * (up_down + up_up + 2 * 1024) / (256 * 1024) and down.bpw == 8 * dense / (256 * 1024)
    assert result.tensor_bytes == 1000 + counted + 2 * 256
    assert result.param_ratio == (128 * (256 + 1024) + 1024 * 256) / (2 * 256 * 1024)
    assert result.scheme == f"lord-{result.param_ratio:.2f}-w4g64"
    assert result.rank_pattern == {"h.0.up": 128}
    assert up.factor_shapes() == {".down": (256, 128), ".up": (128, 1024)} and down.factor_shapes() == {"": (1024, 256)}


def test_bytes_and_bits_per_weight_of_a_pivoted_plan_by_hand() -> None:
    sites = [site("up", 256, 1024), site("down", 1024, 256, True), site("wide", 1024, 32768 + 32)]
    gptq = GptqConfig(bits=4, group_size=64)
    result = plan(sites, itemsize=2, gptq=gptq, rank_pattern={"up": 128, "wide": 64}, form="pivoted")
    up, down, wide = result.layers
    # up: 256 -> 128 -> 896 with biases of its own making on both; an order of int16
    up_down = 256 * 128 // 2 + 2 * 128 * 4 + 128 * 4 // 2 + 4 * 256
    up_up = 128 * 896 // 2 + 2 * 896 * 2 + 896 * 2 // 2 + 4 * 128
    assert (up.rank, up.adds_bias, up.bias_bytes) == (128, True, 2 * 128 + 2 * 896)
    assert up.weight_bytes == up_down + up_up + 2 * 1024
    assert up.factor_shapes() == {".down": (256, 128), ".up": (128, 896)}
    assert up.weights == 256 * 128 + 128 * 896 == 128 * (256 + 1024) - 128**2
    # wide: more outputs than int16 can count, an order of int32
    wide_down = 1024 * 64 // 2 + 2 * 64 * 16 + 64 * 16 // 2 + 4 * 1024
    wide_up = 64 * 32736 // 2 + 2 * 32736 + 32736 // 2 + 4 * 64
    assert wide.weight_bytes == wide_down + wide_up + 4 * 32800
    assert down.rank is None and down.weight_bytes == 1024 * 256 // 2 + 2 * 256 * 16 + 256 * 16 // 2 + 4 * 1024
    counted = up.weight_bytes + up.bias_bytes + wide.weight_bytes + wide.bias_bytes + down.weight_bytes
    assert result.bpw == 8 * counted / (2 * 256 * 1024 + 1024 * 32800)
    assert result.tensor_bytes == 1000 + counted + 2 * 256
    assert result.form_pattern == {"h.0.up": "pivoted", "h.0.wide": "pivoted"} and set(result.rank_pattern) == {
        "h.0.up",
        "h.0.wide",
    }
    assert result.scheme == f"lord-{result.param_ratio:.2f}-pivoted-w4g64"
    assert plan(sites, gptq=gptq, rank_ratio=0.25).form_pattern == {}
    assert plan(sites, gptq=gptq, rank_ratio=1, form="pivoted").scheme == "dense-w4g64"


def test_bytes_of_a_column_pivoted_plan_by_hand() -> None:
    sites, gptq = [site("up", 256, 1024), site("down", 1024, 256, True)], GptqConfig(bits=4, group_size=64)
    result = plan(sites, itemsize=2, gptq=gptq, rank_pattern={"up": 128, "down": 64}, form="column_pivoted")
    up, down = result.layers
    # up: 128 of 256 inputs -> 128 -> 1024 with a bias of its own making; an order of int16
    up_down = 128 * 128 // 2 + 2 * 128 * 2 + 128 * 2 // 2 + 4 * 128
    up_up = 128 * 1024 // 2 + 2 * 1024 * 2 + 1024 * 2 // 2 + 4 * 128
    assert (up.rank, up.adds_bias, up.bias_bytes) == (128, True, 2 * 1024)
    assert up.weight_bytes == up_down + up_up + 2 * 256
    assert up.factor_shapes() == {".down": (128, 128), ".up": (128, 1024)}
    assert up.weights == 128 * (256 + 1024) - 128**2
    down_down = 960 * 64 // 2 + 2 * 64 * 15 + 64 * 15 // 2 + 4 * 960
    down_up = 64 * 256 // 2 + 2 * 256 + 256 // 2 + 4 * 64
    assert (down.weight_bytes, down.bias_bytes) == (down_down + down_up + 2 * 1024, 2 * 256)
    assert result.form_pattern == dict.fromkeys(("h.0.up", "h.0.down"), "column_pivoted")


def test_ranks_of_the_column_pivoted_form_leave_whole_groups_of_inputs() -> None:
    """Ranks are taken off the inputs of `down`, so its group size must divide them too."""
    sites = [site("up", 512, 1024)]
    sizes = {"group_size": 32, "group_size_pattern": {"up.down": 128}}
    gptq = GptqConfig(bits=4, **sizes)
    assert plan(sites, gptq=gptq, rank_ratio=0.3, form="column_pivoted").layers[0].rank == 256
    assert plan(sites, gptq=gptq, rank_ratio=0.3).layers[0].rank == 160
    for rank, nearest in ((160, 128), (600, 384)):  # 512 of 512 inputs would be the layer itself
        with pytest.raises(RankError, match=f"rank {rank}; wanted a multiple of 128 up to 384, nearest: {nearest}"):
            plan(sites, gptq=gptq, rank_pattern={"up": rank}, form="column_pivoted")


def test_float_plans_count_stored_floats() -> None:
    half = plan(WITH_BIAS, itemsize=2, gptq=GptqConfig(bits=16), rank_ratio=1)
    assert half.bpw == 16 and half.scheme == "dense-float"
    assert plan(WITH_BIAS, itemsize=4, gptq=GptqConfig(bits=16), rank_ratio=1).bpw == 32
    lowrank = plan(WITH_BIAS, itemsize=2, gptq=GptqConfig(bits=16), rank_ratio=0.5)
    assert lowrank.bpw == pytest.approx(16 * lowrank.param_ratio) and lowrank.scheme.endswith("-float")


def ranks(sites: list[LinearSite], way: str, kept: float, bits: int, group: int, force: bool = False) -> list[int | None]:
    """Ranks in order; all None where the plan refuses because nothing would be decomposed."""
    try:
        result = plan(sites, gptq=GptqConfig(bits=bits, group_size=group), force_rank=force, **{way: kept})
    except RankError as error:
        assert "no layer would be decomposed" in str(error)
        return [None] * len(sites)
    return [layer.rank for layer in result.layers]


@settings(max_examples=200, deadline=None)
@given(shapes, ways, ratio, st.sampled_from([32, 64, 128, 256]), st.sampled_from(BITS), st.booleans())
def test_laws_of_ranks(drawn: list, way: str, kept: float, group: int, bits: int, force: bool) -> None:
    sites = sites_of(drawn, group)
    found = ranks(sites, way, kept, bits, group, force)
    assert found == ranks(sites, way, kept, 4, group, force)  # the same ranks at every bit width, 16 included
    for item, rank in zip(sites, found, strict=True):
        n, m = item.in_features, item.out_features
        wanted = kept * min(m, n) if way == "rank_ratio" else kept * m * n / (m + n)
        snapped = next(multiple for multiple in range(group, 10**6, group) if multiple >= wanted * (1 - 1e-6))
        if rank is None:
            if kept < 1:
                assert snapped * (m + n) >= m * n if not force else min(m, n) < group
            continue
        assert rank % math.lcm(32, group) == 0 and 0 < rank <= min(m, n)
        assert rank == min(snapped, min(m, n) // group * group)  # snapped up, wherever that is possible
        assert force or rank * (m + n) < m * n


@settings(max_examples=100, deadline=None)
@given(shapes, ways, st.lists(ratio, min_size=2, max_size=6), st.sampled_from([32, 64, 128]))
def test_rank_never_falls_when_more_is_kept(drawn: list, way: str, kept: list[float], group: int) -> None:
    sites = sites_of(drawn, group)
    rows = [ranks(sites, way, value, 4, group) for value in sorted(kept)]
    for fewer, more in pairwise(rows):
        for a, b in zip(fewer, more, strict=True):
            assert (a or math.inf) <= (b or math.inf)  # dense keeps everything


@settings(max_examples=100, deadline=None)
@given(shapes, ways, ratio, st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64, 128]))
def test_totals_are_sums_and_decomposition_saves_bytes(drawn: list, way: str, kept: float, bits: int, group: int) -> None:
    sites = sites_of(drawn, group)
    gptq = GptqConfig(bits=bits, group_size=group)
    assume(any(ranks(sites, way, kept, bits, group)))
    result, dense = plan(sites, gptq=gptq, **{way: kept}), plan(sites, gptq=gptq, rank_ratio=1)
    assert result.tensor_bytes == 1000 + sum(layer.weight_bytes + layer.bias_bytes for layer in result.layers)
    assert sum(layer.weights for layer in result.layers) < sum(layer.weights for layer in dense.layers)
    assert result.param_ratio < dense.param_ratio == 1
    for layer, whole in zip(result.layers, dense.layers, strict=True):
        assert layer.adds_bias == (layer.rank is not None and not layer.has_bias)
        assert (layer.bias_bytes > 0) == (layer.has_bias or layer.adds_bias)
        if layer.rank is None:
            assert layer.weight_bytes == whole.weight_bytes


@settings(max_examples=100, deadline=None)
@given(shapes, ways, ratio, st.sampled_from([2, 3, 4, 8, 16]), st.sampled_from([32, 64, 128]), st.booleans(), st.booleans())
def test_laws_of_the_pivoted_form(
    drawn: list, way: str, kept: float, bits: int, group: int, correct: bool, force: bool
) -> None:
    """Ranks are those of two factors wherever both forms decompose; rank² weights fewer; sizes always agree."""
    sites, gptq = sites_of(drawn, group), GptqConfig(bits=bits, group_size=group)
    settings = {way: kept, "mean_correction": correct, "force_rank": force}
    try:
        two, one = (plan(sites, gptq=gptq, form=form, **settings) for form in ("two_factor", "pivoted"))
    except RankError as error:
        assert "no layer would be decomposed" in str(error)
        assume(False)
    for item, a, b in zip(sites, two.layers, one.layers, strict=True):
        assert item.out_features % 32 == 0 and (b.rank is None or b.rank < item.out_features)
        assert a.rank is None or b.rank == a.rank or a.rank == item.out_features
        if b.rank is None:
            assert a.rank is not None or (b.weight_bytes, b.bias_bytes) == (a.weight_bytes, a.bias_bytes)
            continue
        r, n, m = b.rank, item.in_features, item.out_features
        assert b.weights == r * (n + m) - r * r and (force or b.weights < b.dense_weights)
        assert {name: math.prod(shape) for name, shape in b.factor_shapes().items()} == {".down": n * r, ".up": r * (m - r)}
        biased = item.has_bias or correct
        parts = [linear_bytes(n, r, biased, bits, group, 4), linear_bytes(r, m - r, biased, bits, group, 4)]
        assert b.weight_bytes == sum(part.weight for part in parts) + 2 * m
        assert b.bias_bytes == sum(part.bias for part in parts) == (0 if not biased else (4 if bits == 16 else 2) * m)
        assert b.adds_bias == (correct and not item.has_bias)


def test_the_pivoted_form_shrinks_layers_that_two_factors_would_not() -> None:
    sites = [site("square", 256, 256)]
    assert plan(sites, rank_ratio=0.75, form="pivoted").rank_pattern == {"h.0.square": 192}
    with pytest.raises(RankError, match="rank 192 would not make it smaller"):
        plan(sites, rank_ratio=0.75)


def test_at_full_rank_the_pivoted_form_is_the_layer_itself_and_stays_dense_with_a_note() -> None:
    sites = [site("tall", 256, 1024), site("wide", 1024, 256)]
    result = plan(sites, rank_ratio=0.99, form="pivoted", force_rank=True)
    tall, wide = result.layers
    assert wide.rank is None and wide.note == "dense: the pivoted form at rank 256 is the layer itself"
    assert tall.rank == 256 and not tall.note and result.form_pattern == {"h.0.tall": "pivoted"}
    result = plan(sites, rank_pattern={"wide": 256, "tall": 224}, form="pivoted")
    assert result.rank_pattern == {"h.0.tall": 224} and result.layers[1].note.startswith("dense: the pivoted form")
    tall, wide = plan(sites, rank_ratio=0.99, form="column_pivoted", force_rank=True).layers
    assert tall.rank is None and tall.note == "dense: the column_pivoted form at rank 256 is the layer itself"
    assert wide.rank == 256 and not wide.note


def test_the_hint_of_a_pivoted_plan_names_the_largest_rank_that_shrinks() -> None:
    sites = [site("tall", 256, 1024)]
    assert plan(sites, rank_pattern={"tall": 224}, form="pivoted").rank_pattern == {"h.0.tall": 224}
    with pytest.raises(RankError, match="largest rank that shrinks it: 224"):
        plan(sites, rank_ratio=0.99, form="pivoted")


def test_snapping_is_not_misled_by_rounding() -> None:
    # 0.3 * 320 is 96.00000000000001 or 95.99999999999999, depending on how it is written
    sites = [site("linear", 320, 1280)]
    assert plan(sites, rank_ratio=0.3).rank_pattern == {"h.0.linear": 96}
    assert plan(sites, rank_ratio=0.1 + 0.2).rank_pattern == {"h.0.linear": 96}
    assert plan(sites, rank_ratio=0.301).rank_pattern == {"h.0.linear": 128}


def test_the_smallest_ratio_still_keeps_one_step() -> None:
    for way in ("rank_ratio", "param_ratio"):
        assert set(plan(WITH_BIAS, **{way: 1e-300}).rank_pattern.values()) == {32}


@pytest.mark.parametrize("way", ["rank_ratio", "param_ratio"])
def test_keeping_everything_decomposes_nothing(way: str) -> None:
    result = plan(WITHOUT_BIAS, **{way: 1}, force_rank=True)
    assert result.rank_pattern == {} and result.param_ratio == 1
    assert not any(layer.note or layer.adds_bias for layer in result.layers)
    assert result.scheme == "dense-w4g32"


def test_mean_correction_off_adds_no_bias() -> None:
    on, off = (plan(WITHOUT_BIAS, rank_ratio=0.5, mean_correction=value) for value in (True, False))
    assert on.mean_correction and not off.mean_correction
    assert on.rank_pattern == off.rank_pattern
    for with_bias, without in zip(on.layers, off.layers, strict=True):
        assert not without.adds_bias and without.bias_bytes == 0
        assert with_bias.weight_bytes == without.weight_bytes
        assert with_bias.adds_bias == (with_bias.rank is not None)
        assert with_bias.counted_bytes - without.counted_bytes == (2 * with_bias.out_features if with_bias.rank else 0)
    assert [layer.bias_bytes for layer in plan(WITH_BIAS, rank_ratio=0.5, mean_correction=False).layers] == [
        2 * item.out_features for item in WITH_BIAS
    ]


def test_only_targets_are_decomposed() -> None:
    result = plan(WITH_BIAS, rank_ratio=0.25, targets=("mlp", "c_attn"), ignore=("mlp.c_fc",))
    assert set(result.rank_pattern) == {"h.0.attn.c_attn", "h.0.mlp.c_proj"}
    with pytest.raises(TargetError, match="did you mean"):
        plan(WITH_BIAS, rank_ratio=0.25, targets=("c_atn",))


def test_explicit_ranks_are_taken_as_they_are_and_everything_else_stays_dense() -> None:
    result = plan(WITH_BIAS, rank_pattern={"mlp.c_fc": 96, "re:attn.c_proj$": 64})
    assert result.rank_pattern == {"h.0.attn.c_proj": 64, "h.0.mlp.c_fc": 96}


@pytest.mark.parametrize(
    ("rank", "group", "hint"),
    [
        (100, 32, "rank 100; wanted a multiple of 32 up to 256, nearest: 96"),
        (96, 64, "rank 96; wanted a multiple of 64 up to 256, nearest: 128"),
        (512, 32, "rank 512; wanted a multiple of 32 up to 256, nearest: 256"),
        (1, 32, "rank 1; wanted a multiple of 32 up to 256, nearest: 32"),
        (300, 256, "rank 300; wanted a multiple of 256 up to 256, nearest: 256"),
    ],
)
def test_an_illegal_explicit_rank_names_the_nearest_legal_one(rank: int, group: int, hint: str) -> None:
    with pytest.raises(RankError) as caught:
        plan(WITH_BIAS, gptq=GptqConfig(group_size=group), rank_pattern={"c_fc": rank})
    assert f"h.0.mlp.c_fc: {hint}" in str(caught.value)


def test_an_explicit_rank_where_none_is_legal() -> None:
    with pytest.raises(RankError, match="rank 64; wanted a multiple of 128 up to 96, there is none"):
        plan([site("narrow", 256, 96)], gptq=GptqConfig(group_size=128), rank_pattern={"narrow": 64})


def test_all_illegal_ranks_are_named_at_once_and_an_unknown_pattern_with_its_nearest() -> None:
    with pytest.raises(RankError) as caught:
        plan(WITH_BIAS, rank_pattern={"mlp.c_fc": 33, "attn.c_attn": 65})
    assert "c_fc: rank 33" in str(caught.value) and "c_attn: rank 65" in str(caught.value)
    with pytest.raises(TargetError, match="'c_fcc' matches no layer; did you mean 'c_fc'"):
        plan(WITH_BIAS, rank_pattern={"c_fcc": 64})


def test_a_layer_that_would_grow_stays_dense_with_the_reason_unless_forced() -> None:
    sites = [site("square", 256, 256), site("wide", 256, 1024)]
    result = plan(sites, rank_ratio=0.5)
    assert result.rank_pattern == {"h.0.wide": 128}
    assert result.layers[0].note == "dense: rank 128 would not make it smaller" and not result.layers[1].note
    forced = plan(sites, rank_ratio=0.9, force_rank=True)
    assert forced.rank_pattern == {"h.0.square": 256, "h.0.wide": 256}
    assert forced.layers[0].weights > forced.layers[0].dense_weights


def test_nothing_decomposed_is_an_error_that_helps() -> None:
    sites = [site("square", 256, 256, block=i) for i in range(3)] + [site("tiny", 128, 64)]
    with pytest.raises(RankError) as caught:
        plan(sites, gptq=GptqConfig(group_size=128), rank_ratio=0.9)
    text = str(caught.value)
    for part in (
        "no layer would be decomposed",
        "multiples of 128 (group size 128)",
        "h.0.square 256x256 dense: rank 256 would not make it smaller; no legal rank shrinks it",
        "h.0.tiny 64x128 dense: rank 58 snaps up past the full rank 64",
        "--group-size below 128",
        "--force-rank",
        "--rank-ratio 1",
    ):
        assert part in text, text
    assert text.count("square") == 1  # one block stands for all
    with pytest.raises(RankError, match="largest rank that shrinks it: 96"):
        plan([site("square", 256, 256)], rank_ratio=0.9)
    with pytest.raises(RankError) as caught:
        plan([site("square", 256, 256)], rank_ratio=0.9)
    assert "--group-size below" not in str(caught.value)


def test_layers_that_cannot_be_packed_stay_in_float_beside_those_that_can() -> None:
    sites = [site("a", 128, 128), site("gate", 128, 1, True), site("b", 128, 256), site("odd", 100, 256)]
    gptq = GptqConfig(bits=4, group_size=32, bits_pattern={"all": 3})
    result = plan(sites, itemsize=2, gptq=gptq, rank_pattern={"all": 32}, form_pattern={"all": "pivoted"})
    a, gate, b, odd = result.layers
    assert (a.rank, a.bits, a.note, b.rank, b.packed) == (32, 3, "", 32, True)
    for layer, weight in ((gate, 2 * 128), (odd, 2 * 100 * 256)):
        assert (layer.rank, layer.bits, layer.up_bits, layer.packed) == (None, 16, 16, False)
        assert layer.note == "stays in float: its sizes are no multiples of 32" and layer.weight_bytes == weight
    assert gate.bias_bytes == 2
    assert result.bits_pattern == {"h.0.a": 3, "h.0.b": 3, "h.0.gate": 16, "h.0.odd": 16}
    assert result.bpw == 8 * sum(layer.counted_bytes for layer in result.layers) / (128 * (128 + 1 + 256) + 100 * 256)


def test_what_is_asked_of_a_layer_that_cannot_be_packed_is_refused() -> None:
    sites = [site("a", 128, 128), site("gate", 128, 1)]
    with pytest.raises(TargetError, match="pattern 'gate' matches no layer"):
        plan(sites, gptq=GptqConfig(bits_pattern={"gate": 8}), rank_ratio=0.25)
    with pytest.raises(TargetError, match="pattern 'gate' matches no layer"):
        plan(sites, rank_pattern={"gate": 32})
    assert plan(sites, rank_ratio=0.25, ignore=("gate",)).rank_pattern == {"h.0.a": 32}


def test_float_ranks_suit_all_shapes() -> None:
    sites = [site("a", 100, 128), site("b", 128, 50), site("c", 128, 128)]
    for gptq in (GptqConfig(bits=16), GptqConfig(bits=16, group_size=32)):
        assert plan(sites, gptq=gptq, rank_ratio=0.25).rank_pattern == {"h.0.a": 32, "h.0.b": 32, "h.0.c": 32}


@pytest.mark.parametrize(("group", "step"), [(32, 32), (64, 64), (128, 128), (48, 96)])
def test_rank_step(group: int, step: int) -> None:
    assert rank_step(group) == step
