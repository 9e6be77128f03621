# SPDX-License-Identifier: Apache-2.0
"""Flags of `quantize` and the configuration they make."""

from __future__ import annotations

import argparse

from in_process import Box

from lord_quant.commands import quantize as quantize_command
from lord_quant.commands.options import config_from


def test_every_flag_of_the_stack_lands_in_its_place(box: Box) -> None:
    parser = argparse.ArgumentParser()
    quantize_command.add_arguments(parser)
    usual = config_from(parser.parse_args(box.arguments()))
    assert (usual.stack, usual.lowrank.form, usual.gptq.sym, usual.gptq.mse) == ("joint", "two_factor", False, 2.0)
    ideas = ["anchor", "residual", "rotate", "refit", "deflate", "two_sided", "fisher"]
    flags = [
        *(f"--no-{idea.replace('_', '-')}" for idea in ideas),
        "--order",
        "up_first",
        "--refine",
        "5",
        "--form",
        "pivoted",
    ]
    flags += ["--mse", "2.4", "--sym", "--stack", "naive"]
    changed = config_from(parser.parse_args([*box.arguments(), *flags]))
    for idea in ideas:
        assert getattr(usual.joint, idea) and not getattr(changed.joint, idea)
    assert (changed.joint.order, changed.joint.refine) == ("up_first", 5)
    assert (changed.stack, changed.lowrank.form, changed.gptq.sym, changed.gptq.mse) == ("naive", "pivoted", True, 2.4)
    box.configure("joint: {anchor: false, order: down_first}\nlowrank: {form: pivoted}\ngptq: {mse: 0}\n")
    merged = config_from(parser.parse_args([*box.arguments(), "--order", "auto", "--anchor"]))
    assert (merged.joint.anchor, merged.joint.order, merged.lowrank.form, merged.gptq.mse) == (True, "auto", "pivoted", 0)
