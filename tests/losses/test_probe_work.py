# SPDX-License-Identifier: Apache-2.0
"""Counted operations of the sensitivity pass against those torch itself counts, and closed forms for the rest."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lord_quant.blocks.residency import Streamed
from lord_quant.config import GptqConfig, JointConfig, LowrankConfig
from lord_quant.losses.crossfit import Half
from lord_quant.losses.probe import PIVOTED_SIZE, ROWS, probe
from lord_quant.losses.probe_work import count_sensing, probe_work
from lord_quant.moments import Moments
from lord_quant.plan import Plan, build_plan
from lord_quant.runs.operations import Workload
from lord_quant.sensitivity import Steepness
from lord_quant.targets import LinearSite


LOAD = Workload(num_tokens=5000, itemsize=2, joint=True, seq_len=100, fisher_tokens=800, head_weights=7000)


def plan_of(**layers: tuple[int, int]) -> Plan:
    sites = [LinearSite(f"h.0.{name}", 0, inputs, outputs, True) for name, (outputs, inputs) in layers.items()]
    return build_plan(sites, LowrankConfig(rank_ratio=1.0), GptqConfig(group_size=32), itemsize=2, other_bytes=30_000)


def moment(size: int, generator: torch.Generator) -> torch.Tensor:
    rows = torch.randn(2 * size, size, generator=generator)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize(("shape", "of_loss"), [((384, 256), True), ((256, 384), True), ((384, 256), False)])
def test_products_of_a_probe_are_those_torch_counts(shape: tuple[int, int], of_loss: bool) -> None:
    """Solvers of columns, factorizations and what LAPACK solves are no products to torch; the latter are few here."""
    generator, (outputs, inputs) = torch.Generator().manual_seed(0), shape

    def half() -> Half:
        moments = Moments(torch.zeros(inputs), moment(inputs, generator), 1000)
        if not of_loss:
            return Half(moments, None)
        slope = Steepness(torch.randn(shape, generator=generator) / 1000, torch.zeros(outputs))
        return Half(moments, moment(outputs, generator), slope, 1000)

    weight, halves = torch.randn(shape, generator=generator), (half(), half())
    with FlopCounterMode(display=False) as counter:
        probe(weight, halves, has_bias=True, gptq=GptqConfig(), options=JointConfig())
    found = probe_work(plan_of(a=shape).layers[0], of_loss)
    assert found.products + found.coupled == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_tall_layers_are_solved_in_part_but_for_their_factors() -> None:
    """Dense at three bit widths and in two other groups; either factor at half rank at three, at 3/4 once."""
    outputs, inputs = 3 * ROWS, 512
    assert outputs * inputs > PIVOTED_SIZE  # no pivots are chosen
    solves = 5 * 2 * inputs**2 * ROWS + 3 * inputs**3  # bit widths share a factor
    for widths, r in ((3, 256), (1, 384)):
        solves += widths * (2 * inputs**2 * r + 2 * r**2 * outputs) + inputs**3 + r**3
    assert probe_work(plan_of(a=(outputs, inputs)).layers[0], True).solves == solves


@pytest.mark.parametrize(("room", "passes"), [(2**40, 4), (0, 7)])
def test_gradients_are_those_of_two_losses(room: int, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward once, then per block forward and back for either; once more if sums cannot wait."""
    monkeypatch.setattr(Streamed, "spare_bytes", room)
    plan = plan_of(a=(512, 256), b=(256, 512))
    found, dense = count_sensing(plan, LOAD), 2 * 512 * 256
    one_pass = 2 * dense + 4 * 100 * 256
    assert found["gradients"].passes == 800 * (passes * one_pass + 3 * 2 * 7000)
    assert found["moments"].passes == 5000 * one_pass
    assert (found["gradients"].files, found["moments"].files) == (4 * 2 * dense, 2 * dense)
    without = count_sensing(plan, LOAD._replace(fisher_tokens=0))["gradients"]
    assert without.passes == without.files == 0


def test_what_layers_of_one_input_make_is_probed_as_well() -> None:
    apart, together = (
        count_sensing(plan_of(**{f"{name}_proj": (256, 512) for name in names}), LOAD)["probe"] for names in ("abc", "qkv")
    )
    extra = probe_work(plan_of(a=(3 * 256, 512)).layers[0], True)
    assert together.solves == pytest.approx(apart.solves + extra.solves)
    assert together.products == pytest.approx(apart.products + extra.products)
