# SPDX-License-Identifier: Apache-2.0
"""Which layers can be packed, and in groups of what size."""

import pytest
from plans import plan, site

from lord_quant.config import BITS, GptqConfig
from lord_quant.errors import GroupSizeError
from lord_quant.sizes.packable import check_group_sizes, choose_group_size, packable_of


def test_a_group_size_that_does_not_divide_names_every_layer_and_the_nearest() -> None:
    sites = [site("a", 96, 128), site("b", 256, 128), site("c", 320, 128)]
    with pytest.raises(GroupSizeError) as caught:
        check_group_sizes(sites, {each.name: 128 for each in sites})
    text = str(caught.value)
    assert "h.0.a: group size 128 does not divide 96 inputs; nearest: 32" in text
    assert "h.0.c: group size 128 does not divide 320 inputs; nearest: 64" in text
    assert "h.0.b" not in text
    check_group_sizes(sites, {each.name: 32 for each in sites})


def test_models_of_which_no_layer_can_be_packed_are_refused_but_for_float() -> None:
    sites = [site("a", 100, 128), site("b", 128, 50)]
    with pytest.raises(GroupSizeError, match=r"they are 128x100, 50x128; wanted multiples of 32 on both sides.*--bits 16"):
        plan(sites, rank_ratio=0.25)
    with pytest.raises(GroupSizeError, match="no layer can be packed"):
        packable_of(sites)
    fitting = site("c", 128, 96)
    assert packable_of([*sites, fitting]) == [fitting]
    assert plan(sites, gptq=GptqConfig(bits=16), rank_ratio=0.25).rank_pattern  # what the message says to do


@pytest.mark.parametrize(("inputs", "expected"), [([256, 1024], 128), ([256, 192], 64), ([128, 96], 32), ([640], 128)])
def test_the_largest_group_size_that_suits_all_is_chosen(inputs: list[int], expected: int) -> None:
    sites = [site(f"linear{n}", n, 512) for n in inputs]
    assert choose_group_size(sites) == expected
    assert {plan(sites, gptq=GptqConfig(bits=bits), rank_ratio=1).group_size for bits in BITS} == {expected}


def test_layers_that_stay_in_float_do_not_choose_the_group_size() -> None:
    sites = [site("a", 256, 512), site("odd", 96, 50)]
    assert plan(sites, gptq=GptqConfig(), rank_ratio=1).group_size == 128
