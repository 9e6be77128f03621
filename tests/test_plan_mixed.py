# SPDX-License-Identifier: Apache-2.0
"""Plans whose layers differ in form, bits and group size: their bytes, their laws, and those that are refused."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plans import WITH_BIAS, plan, ratio, shapes, site, sites_of, ways

from lord_quant.config import GptqConfig
from lord_quant.errors import GroupSizeError, RankError, TargetError


def test_bytes_of_a_mixed_plan_by_hand() -> None:
    """Every layer by its own bits, group size and form, shared by both of its factors."""
    sites = [site("up", 256, 1024, True), site("down", 1024, 256), site("gate", 256, 1024, True)]
    gptq = GptqConfig(
        bits=4, group_size=64, bits_pattern={"all": 8, "up": 3, "re:gate": 2}, group_size_pattern={"*.up": 32, "down": 128}
    )
    lowrank = {"rank_pattern": {"up": 96, "gate": 128}, "form_pattern": {"gate": "pivoted"}}
    result = plan(sites, itemsize=2, gptq=gptq, **lowrank)
    up, down, gate = result.layers
    assert [(layer.bits, layer.group_size, layer.form) for layer in (up, gate)] == [
        (3, 32, "two_factor"),
        (2, 64, "pivoted"),
    ]
    assert (down.bits, down.group_size, down.rank) == (8, 128, None)
    up_down = 256 * 96 * 3 // 8 + 2 * 96 * 8 + 96 * 8 * 3 // 8 + 4 * 256
    up_up = 96 * 1024 * 3 // 8 + 2 * 1024 * 3 + 1024 * 3 * 3 // 8 + 4 * 96
    assert (up.weight_bytes, up.bias_bytes) == (up_down + up_up, 2 * 1024)
    assert (down.weight_bytes, down.bias_bytes) == (1024 * 256 + 2 * 256 * 8 + 256 * 8 + 4 * 1024, 0)
    gate_down = 256 * 128 // 4 + 2 * 128 * 4 + 128 * 4 // 4 + 4 * 256
    gate_up = 128 * 896 // 4 + 2 * 896 * 2 + 896 * 2 // 4 + 4 * 128
    assert (gate.weight_bytes, gate.bias_bytes) == (gate_down + gate_up + 2 * 1024, 2 * 1024)
    counted = sum(layer.weight_bytes for layer in result.layers)
    assert result.bpw == 8 * counted / (3 * 256 * 1024) and result.tensor_bytes == 1000 + counted + 2 * 2 * 1024
    assert (result.bits, result.group_size) == (4, 64)
    assert result.bits_pattern == {"h.0.up": 3, "h.0.down": 8, "h.0.gate": 2}
    assert result.group_size_pattern == {"h.0.up": 32, "h.0.down": 128}
    assert result.form_pattern == {"h.0.gate": "pivoted"}
    assert result.packings == {
        "h.0.up.down": (3, 32),
        "h.0.up.up": (3, 32),
        "h.0.down": (8, 128),
        "h.0.gate.down": (2, 64),
        "h.0.gate.up": (2, 64),
    }
    assert result.mixed and result.scheme == f"lord-{result.param_ratio:.2f}-pivoted-mixed"


packed_bits, group_sizes = st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64, 128])
forms = st.sampled_from(["two_factor", "pivoted"])


@settings(max_examples=100, deadline=None)
@given(shapes, ways, ratio, st.data())
def test_every_layer_of_a_mixed_plan_is_as_in_a_plan_of_its_own_settings(
    drawn: list, way: str, kept: float, data: st.DataObject
) -> None:
    own = [data.draw(st.tuples(packed_bits, group_sizes)) for _ in drawn]
    sites = [sites_of([shape], size)[0] for shape, (_, size) in zip(drawn, own, strict=True)]
    sites = [item._replace(name=f"h.{i}.linear{i}", block=i) for i, item in enumerate(sites)]
    names = [item.name for item in sites]
    gptq = GptqConfig(
        bits=data.draw(packed_bits),
        group_size=data.draw(group_sizes),
        bits_pattern={"all": 4} | dict(zip(names, (bits for bits, _ in own), strict=True)),
        group_size_pattern=dict(zip(names, (size for _, size in own), strict=True)),
    )
    alone = []
    for item, (bits, size) in zip(sites, own, strict=True):
        try:
            alone.append(plan([item], gptq=GptqConfig(bits=bits, group_size=size), **{way: kept}).layers[0])
        except RankError:
            alone.append(None)
    assume(any(alone) or kept == 1)
    result = plan(sites, gptq=gptq, **{way: kept})
    for layer, other, (bits, size) in zip(result.layers, alone, own, strict=True):
        assert (layer.bits, layer.group_size) == (bits, size)
        assert layer == other or (other is None and layer.rank is None)
    assert result.bits_pattern == {name: bits for name, (bits, _) in zip(names, own, strict=True) if bits != gptq.bits}
    assert result.group_size_pattern == {
        n: size for n, (_, size) in zip(names, own, strict=True) if size != gptq.group_size
    }
    assert result.mixed == ("mixed" in result.scheme) == bool(result.bits_pattern or result.group_size_pattern)


@settings(max_examples=100, deadline=None)
@given(shapes, ways, ratio, packed_bits, group_sizes, forms, st.booleans())
def test_a_pattern_that_says_the_default_of_every_layer_changes_nothing(
    drawn: list, way: str, kept: float, bits: int, group: int, form: str, chosen: bool
) -> None:
    sites = sites_of(drawn, group)
    given_size = None if chosen else group
    usual = GptqConfig(bits=bits, group_size=given_size)
    try:
        expected = plan(sites, gptq=usual, form=form, **{way: kept})
    except RankError:
        assume(False)
    names = [item.name for item in sites]
    listed = GptqConfig(
        bits=bits,
        group_size=given_size,
        bits_pattern=dict.fromkeys(names, bits),
        group_size_pattern=dict.fromkeys(names, expected.group_size),
    )
    other = {"two_factor": "pivoted", "pivoted": "two_factor"}[form]
    for default in (form, other if len(expected.rank_pattern) == len(sites) else form):
        result = plan(
            sites, gptq=listed, form=default, form_pattern=dict.fromkeys(expected.rank_pattern, form), **{way: kept}
        )
        assert result == expected and not result.mixed


def test_patterns_of_a_float_plan_only_say_which_ranks_are_legal() -> None:
    sites = [site("up", 256, 1024), site("down", 1024, 256)]
    gptq = GptqConfig(bits=16, group_size=32, group_size_pattern={"up": 128})
    result = plan(sites, gptq=gptq, rank_ratio=0.3)
    assert result.rank_pattern == {"h.0.up": 128, "h.0.down": 96}
    assert not result.mixed and result.scheme.endswith("-float")


def test_illegal_patterns_name_every_layer() -> None:
    sites = [site("a", 96, 256), site("b", 256, 256), site("c", 320, 256)]
    with pytest.raises(GroupSizeError) as caught:
        plan(sites, gptq=GptqConfig(group_size=32, group_size_pattern={"a": 64, "c": 256, "b": 256}), rank_ratio=1)
    assert "h.0.a: group size 64 does not divide 96 inputs; nearest: 32" in str(caught.value)
    assert "h.0.c: group size 256 does not divide 320 inputs; nearest: 64" in str(caught.value)
    assert "h.0.b" not in str(caught.value)
    with pytest.raises(GroupSizeError, match=r"h\.0\.a: group size 64 does not divide 96 inputs; nearest: 32"):
        plan(sites, gptq=GptqConfig(group_size=32, group_size_pattern={"a.down": 64}), rank_pattern={"a": 32})
    with pytest.raises(RankError) as caught:
        sizes = {"c_fc": 128, "c_attn": 64}
        ranks = {"c_fc": 96, "c_attn": 96, "attn.c_proj": 96}
        plan(WITH_BIAS, gptq=GptqConfig(group_size=32, group_size_pattern=sizes), rank_pattern=ranks)
    assert "c_fc: rank 96; wanted a multiple of 128 up to 256, nearest: 128" in str(caught.value)
    assert "c_attn: rank 96; wanted a multiple of 64 up to 256, nearest: 128" in str(caught.value)
    assert "attn.c_proj" not in str(caught.value)
    for gptq, lowrank in (
        (GptqConfig(group_size=32, bits_pattern={"c_fcc": 8}), {}),
        (GptqConfig(group_size=32, group_size_pattern={"c_fcc": 64}), {}),
        (GptqConfig(group_size=32), {"form_pattern": {"c_fcc": "pivoted"}}),
    ):
        with pytest.raises(TargetError, match="'c_fcc' matches no layer; did you mean 'c_fc'"):
            plan(WITH_BIAS, gptq=gptq, rank_ratio=0.25, **lowrank)


def test_a_form_needs_a_rank() -> None:
    sites = [site("square", 256, 256), site("wide", 256, 1024), site("other", 256, 1024)]
    with pytest.raises(RankError) as caught:
        plan(sites, rank_ratio=0.5, ignore=("other",), form_pattern={"all": "two_factor"})
    text = str(caught.value)
    assert "form_pattern names layers without a rank" in text and "h.0.wide" not in text
    assert "h.0.square: dense: rank 128 would not make it smaller; wanted a rank for it, or no form" in text
    assert "h.0.other: dense; wanted a rank for it, or no form" in text
    result = plan(sites, rank_ratio=0.5, form_pattern={"all": "pivoted", "wide": "two_factor"})
    assert result.form_pattern == {"h.0.square": "pivoted", "h.0.other": "pivoted"}


def test_nothing_decomposed_names_the_steps_of_a_mixed_plan() -> None:
    sites = [site("a", 256, 256), site("b", 256, 256)]
    with pytest.raises(RankError) as caught:
        plan(sites, gptq=GptqConfig(group_size=32, group_size_pattern={"b": 64}), rank_ratio=0.9)
    text = str(caught.value)
    assert "multiples of 32, 64 (group size 32, 64)" in text and "--group-size below 64" in text
    assert "h.0.a 256x256 dense: rank 256 would not make it smaller; largest rank that shrinks it: 96" in text
    assert "h.0.b 256x256 dense: rank 256 would not make it smaller; largest rank that shrinks it: 64" in text
