# SPDX-License-Identifier: Apache-2.0
"""Parity against counts of weights, against plans that weigh every byte, and against closed forms."""

from __future__ import annotations

import math

import pytest

from lord_quant.config import GptqConfig, LowrankConfig
from lord_quant.drawing.parity import parity_of, stored_parity, two_factor_parity
from lord_quant.plan import build_plan
from lord_quant.sizes.layer_bytes import PIVOTED, TWO_FACTOR, factor_shapes, rank_step
from lord_quant.targets import LinearSite


@pytest.mark.parametrize(("m", "n"), [(64, 64), (192, 64), (64, 192), (6400, 6144)])
def test_at_parity_factors_have_as_many_weights(m: int, n: int) -> None:
    assert two_factor_parity(m / n) * min(m, n) * (m + n) == pytest.approx(m * n)
    shapes = factor_shapes(n, m, min(m, n), PIVOTED).values()
    assert sum(math.prod(shape) for shape in shapes) == m * n
    parity = parity_of([LinearSite("h.0.fc", 0, n, m, True)], True)
    assert parity.shapes[0].weights == {TWO_FACTOR: two_factor_parity(m / n), PIVOTED: 1.0}


def test_curves_meet_the_definitions_at_every_aspect() -> None:
    parity = parity_of([LinearSite("h.0.fc", 0, 32, 1024, True)], True)
    assert {(curve.form, curve.layers) for curve in parity.curves} == {
        (TWO_FACTOR, 1), (PIVOTED, 1), ("grouped", 2), ("grouped", 3)
    }  # fmt: skip
    for curve in parity.curves:
        assert curve.aspects[0] == 1 / 32 and curve.aspects[-1] == 32  # as far as the model's layers
        for aspect, ratio in zip(curve.aspects, curve.rank_ratios, strict=True):
            n, m = 1.0, curve.layers * aspect  # of the layers stacked
            rank = ratio * min(m, n)
            saved = rank**2 if curve.form == PIVOTED else 0.0
            assert rank * (m + n) - saved == pytest.approx(m * n)


@pytest.mark.parametrize("form", [TWO_FACTOR, PIVOTED])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("m", "n"), [(256, 256), (1024, 256), (256, 768)])
def test_stored_parity_is_where_plans_stop_paying(m: int, n: int, has_bias: bool, form: str) -> None:
    """At every legal rank, the plan of the decomposed layer takes no more bytes than that of the dense one, or it does."""
    site, gptq = LinearSite("h.0.fc", 0, n, m, has_bias), GptqConfig(bits=4, group_size=32)

    def counted(lowrank: LowrankConfig) -> int:
        return build_plan([site], lowrank, gptq, itemsize=2, other_bytes=0).layers[0].counted_bytes

    dense = counted(LowrankConfig(rank_ratio=1))
    parity = stored_parity(site, form, 4, 32, True)
    for rank in range(32, min(m, n) + 1 - 32 * (form == PIVOTED), rank_step(32)):
        lowrank = LowrankConfig(rank_pattern={"h.0.fc": rank}, form=form, force_rank=True)
        assert (counted(lowrank) <= dense) == (rank / min(m, n) <= parity)


def test_stored_parity_of_large_layers_has_a_closed_form() -> None:
    """β bytes per weight, 4 per input (g_idx): r ((m + n) β + 4) = m n β, in whole groups of ranks for the scales."""
    m, n, group = 24576, 6144, 128
    beta = 4 / 8 + (2 + 4 / 8) / group
    exact = m * n * beta / ((m + n) * beta + 4)
    found = n * stored_parity(LinearSite("h.0.fc", 0, n, m, True), TWO_FACTOR, 4, group, True)
    assert exact - 0.05 * group <= found <= exact + 1
