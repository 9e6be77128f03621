# SPDX-License-Identifier: Apache-2.0
"""How much the sensitivity pass of a budget computes, phase by phase, from shapes alone: what `probe.py` does, counted.

As in `runs/operations.py`, only leading terms count. Choosing pivots is left out.
"""

from __future__ import annotations

from dataclasses import replace

from lord_quant.blocks.residency import Streamed
from lord_quant.halves import share_left
from lord_quant.losses.probe import PIVOTED_SIZE, PROBED_BITS, PROBED_GROUPS, PROBED_RANKS, ROWS
from lord_quant.plan import LayerPlan, Plan
from lord_quant.runs.operations import (
    FLOAT_BYTES,
    Work,
    Workload,
    gauge_work,
    gram_flops,
    pass_flops,
    refit_work,
    rounding_work,
    stack_work,
    total,
    truncation_work,
)
from lord_quant.sizes.layer_bytes import TWO_FACTOR, pivoted_forms
from lord_quant.targets import LinearSite, siblings


BACK_PASSES = 7
"""Of the dense model: forward once, and through every block twice, forward and back for either loss: that of labels the
model draws, and the text's own."""
BACK_PASSES_AT_ONCE = 4
"""Through every block once, where what is summed up may wait."""
BACK_HEAD_PASSES = 3
"""Of the head: forward, and back for either loss."""
READS = 4.0
"""Of the model from files: forth and back for either half of the text."""
SPECTRA = 3
"""Of every layer: on all of the text, and on either half."""


def count_sensing(plan: Plan, load: Workload) -> dict[str, Work]:
    """Returns the work of every phase of a sensitivity pass, by name.

    Args:
        plan: The model; what becomes of its layers does not matter.
        load: What it computes on; no `fisher_tokens` are a pass that minds output errors.
    """
    layers, few = plan.layers, load.fisher_tokens
    dense = sum(layer.dense_weights for layer in layers)
    one_pass = pass_flops(plan, load, dense)
    moments = sum(gram_flops(layer.in_features, load.num_tokens) for layer in layers)
    slopes = sum(gram_flops(layer.out_features, few) + 2.0 * layer.dense_weights * few for layer in layers)
    waiting = sum(layer.out_features**2 + layer.dense_weights + layer.out_features for layer in layers) * FLOAT_BYTES
    passes = BACK_PASSES_AT_ONCE if waiting <= Streamed.spare_bytes // 2 else BACK_PASSES
    back = few * (passes * one_pass + BACK_HEAD_PASSES * 2.0 * load.head_weights)
    return {
        "gradients": Work(passes=back, products=slopes, files=READS * dense * load.itemsize * bool(few)),
        "moments": Work(passes=load.num_tokens * one_pass, products=moments, files=float(dense * load.itemsize)),
        "probe": total(probe_work(layer, bool(few)) for layer in [*layers, *_together(layers)]),
    }


def _together(layers: tuple[LayerPlan, ...]) -> list[LayerPlan]:
    """Lists what layers of one input make together, which is probed as well."""
    by_name = {layer.name: layer for layer in layers}
    sites = [LinearSite(one.name, one.block, one.in_features, one.out_features, one.has_bias) for one in layers]
    return [
        replace(by_name[group[0].name], out_features=sum(site.out_features for site in group)) for group in siblings(sites)
    ]


def probe_work(layer: LayerPlan, of_loss: bool) -> Work:
    """Counts what `probe` does to one layer; `of_loss`, in the metric of the loss and rounding on both sides."""
    m, n, rows = layer.out_features, layer.in_features, min(layer.out_features, ROWS)
    k, rounded = min(m, n), len(PROBED_BITS) + sum(n % size == 0 for size in PROBED_GROUPS) - 1
    whole = truncation_work(_at(layer, k), of_loss) * SPECTRA
    done = whole + (rounding_work(n, rows, of_loss) + _energy(n, rows, of_loss)) * rounded
    done += _factored(n, rows, of_loss) * -(len(PROBED_BITS) - 1)
    crossed = 2.0 * k * (n**2 + m * n + k * (n + m) * share_left(k) + of_loss * (m**2 + m * n))
    done += Work(products=(SPECTRA - 1) * crossed)
    for part, widths in zip(PROBED_RANKS, (len(PROBED_BITS), 1), strict=True):
        cut = _at(layer, max(1, round(part * k)))
        shapes = cut.factor_shapes().values()
        done += total(rounding_work(*shape, of_loss) * widths for shape in shapes)
        done += total(_factored(*shape, of_loss) * -(widths - 1) for shape in shapes)
        done += gauge_work(cut, of_loss) + refit_work(cut, of_loss) * (widths + 1)  # one is rounded at a time
        done += _energy(n, m, of_loss) * 2 * widths
        done += Work(products=2.0 * m * n * (n + of_loss * m))  # what the truncation has missed
        done += Work(products=2.0 * m * n * (cut.rank or 0) * (2 * widths + 1))  # products of factors
    if layer.dense_weights <= PIVOTED_SIZE:
        forms = 1 + len(list(pivoted_forms(n, m)))
        done += (stack_work(_at(layer, max(1, k // 2)), of_loss) + _energy(n, m, of_loss)) * forms
    return done


def _at(layer: LayerPlan, rank: int) -> LayerPlan:
    return replace(layer, rank=rank, form=TWO_FACTOR, leader="")


def _factored(inputs: int, outputs: int, coupled: bool) -> Work:
    """Counts what several bit widths share, as `solve_work` and `rows_work` have it."""
    return Work(solves=float(inputs) ** 3, products=float(outputs) ** 3 * coupled)


def _energy(inputs: int, outputs: int, of_loss: bool) -> Work:
    """Counts the loss of an error, tr G D H Dᵀ."""
    seen = 2.0 * outputs * inputs**2
    return Work(products=seen + 2.0 * outputs**2 * inputs * share_left(outputs) if of_loss else seen * share_left(inputs))
