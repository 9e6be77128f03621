# SPDX-License-Identifier: Apache-2.0
"""How factors of each form are rounded; what the forms have in common is in `test_stack.py` and beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layer_problems import F64, crude, exact, problem, product, run
from test_stack_gains import mean_error
from test_stack_sensitivity import metric, sensitivity

import lord_quant
from lord_quant.blocks.source import inspect_source, load_model
from lord_quant.calibration import sample_windows
from lord_quant.config import GptqConfig, JointConfig
from lord_quant.corpus import load_corpus
from lord_quant.engine import gather
from lord_quant.moments import PairedMoments
from lord_quant.rounding.refine import Quantized
from lord_quant.rounding.solver import Gptq
from lord_quant.rounding.stack_forms import deflated
from lord_quant.stack import stack_layer
from lord_quant.targets import dense_bias, dense_weight


DEMO = Path(__file__).parents[2] / "eval" / "models" / "pycoder-starcoder-humaneval"
PACKAGE = Path(lord_quant.__file__).parent


def test_what_a_column_pivoted_up_becomes_is_optimal_for_the_rounded_down() -> None:
    """The gradient of tr G (A Z − T) H (A Z − T)ᵀ over A, with Z = [I, C], vanishes."""
    p, g = problem(24, 20), sensitivity(24)

    def solve(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
        return (crude() if weight.shape[1] == 16 else exact)(weight, hessian)  # rounds `down` alone

    steepness = {}
    for refit in (True, False):
        options = JointConfig(refine=0, anchor=False, refit=refit)
        factors = run(p, 4, "column_pivoted", solve, options, sensitivity=g).factors
        assert factors is not None and factors.of_inputs
        right = p.moments.covariance @ factors.full_down().T
        gradient = metric(g) @ (factors.product() - p.weight) @ right
        steepness[refit] = float(gradient.norm() / (metric(g) @ p.weight @ right).norm())
    assert steepness[True] < 1e-3 < 1e-2 < steepness[False]  # the refit is damped a little


def test_a_column_pivoted_down_is_rounded_in_what_the_bottleneck_cannot_tell_of_the_inputs_it_takes() -> None:
    p, seen = problem(24, 20), list[torch.Tensor]()

    def solve(weight: torch.Tensor, hessian: torch.Tensor) -> Quantized:
        seen.append(hessian)
        return exact(weight, hessian)

    factors = run(p, 4, "column_pivoted", None, JointConfig(anchor=False)).factors
    assert factors is not None
    others = factors.others()
    for deflate in (True, False):
        seen.clear()
        run(p, 4, "column_pivoted", solve, JointConfig(anchor=False, refine=0, deflate=deflate))
        whole = deflated(p.moments.covariance, factors.full_down()) if deflate else p.moments.covariance
        assert all(torch.equal(each, seen[0]) for each in seen[:4])  # once per step of rows
        torch.testing.assert_close(seen[0], whole[others][:, others], rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_pivoted_form_that_suits_a_shape_loses_less_to_rounding() -> None:
    """In a real model: of random weights the form matters little. Layers of a trained one, on the text of this package."""
    source = inspect_source(str(DEMO))
    corpus = load_corpus(str(PACKAGE))
    windows = sample_windows(corpus, source.tokenizer, num_samples=16, seq_len=256, seed=0).input_ids
    model = load_model(source, torch.device("cpu"))
    layers = {name: model.get_submodule(f"transformer.h.2.{name}") for name in ("mlp.c_fc", "mlp.c_proj", "attn.c_attn")}
    with gather(layers, torch.float32) as gathered:
        model(windows)
    lost: dict[str, dict[str, float]] = {}
    for name, (mean, covariance, count) in gathered.results("").items():
        weight, moments = dense_weight(layers[name]).float(), PairedMoments(mean, mean, covariance, covariance, count)
        solve = Gptq(GptqConfig(bits=4), 64, count)
        for form in ("pivoted", "column_pivoted"):
            made = stack_layer(weight, dense_bias(layers[name]), moments, 128, form, solve, JointConfig())
            assert made.spectrum is not None
            lost.setdefault(name, {})[form] = made.error - made.spectrum.discarded_share(128)
    assert {form: lost["mlp.c_fc"][form] > 0 for form in lost["mlp.c_fc"]} == {"pivoted": True, "column_pivoted": True}
    assert lost["mlp.c_fc"]["column_pivoted"] < 0.75 * lost["mlp.c_fc"]["pivoted"]  # 1024 outputs, 256 inputs
    assert lost["mlp.c_proj"]["pivoted"] < 0.75 * lost["mlp.c_proj"]["column_pivoted"]  # the other way round


@pytest.mark.parametrize("shape", [(64, 16), (24, 24)])
def test_rows_of_a_column_pivoted_down_count_with_what_is_made_of_them(shape: tuple[int, int]) -> None:
    one, two = (mean_error("column_pivoted", shape, coupled=True, two_sided=both) for both in (False, True))
    assert two < 0.9 * one


def test_few_tokens_do_not_hinder_it() -> None:
    """Fewer tokens than inputs: the metric of `down` is singular."""
    p = problem(24, 20, tokens=8)
    result = run(p, 4, "column_pivoted", crude(8), JointConfig())
    target = product(run(p, 4, "column_pivoted", None, JointConfig()))
    assert torch.isfinite(product(result)).all() and result.bias is not None
    x = (p.y - p.y.mean(0)).to(F64)
    lost = float((x @ (product(result) - target).T).square().sum() / (x @ target.T).square().sum())
    assert lost < 1e-2
