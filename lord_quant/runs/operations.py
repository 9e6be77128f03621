# SPDX-License-Identifier: Apache-2.0
"""How much each phase of a run computes and moves, from shapes alone.

Counted are the leading terms, one operation per multiplication and one per addition: passes through the model with
attention and head, moments, factorizations, products with the loss's metric G, and the solvers. Left out is what is linear
in weights or tokens: norms, activations, scales, casts. Every linear layer counts as compressed by itself and stored as two
factors; a pivoted one differs by its choice of pivots, a grouped one by what it shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from lord_quant.config import FLOAT_BITS
from lord_quant.halves import share_left
from lord_quant.plan import LayerPlan, Plan
from lord_quant.rounding.solver import COLUMNS
from lord_quant.rounding.two_sided import GPU_STEPS
from lord_quant.targets import LinearSite


EIGEN_FLOPS = 10
"""Operations per k³ of a symmetric eigendecomposition with vectors."""
FISHER_PASSES = 5
"""Of the dense model: forward once, then forward and back through every block twice; weights get no gradients."""
HEAD_PASSES = 2
"""Of the head: forward and back."""
JOINT_PASSES = 1
"""Passes of the compressed stream: a block is left where a layer is compressed and entered there again."""
SWEEPS = 2
"""Of `refine` after each solve."""
FLOAT_BYTES = 4
"""Of a value of the algebra."""
COUPLED_LOOPS = 2
"""What compiled loops take for a weight of rows that know of each other, over what they take for others."""
HOST_LOOPS = 8
"""What the host's solver takes for a weight on the CPU, over the same."""


class Workload(NamedTuple):
    """What a run computes on.

    Attributes:
        num_tokens: Calibration tokens.
        itemsize: Bytes of a stored float value.
        joint: Whether the joint stack runs, with two streams, or the naive one.
        seq_len: Tokens per window; 0 leaves attention between them out.
        fisher_tokens: Tokens of the joint stack's backward pass; 0 for none.
        head_weights: Weights of the language-model head.
    """

    num_tokens: int
    itemsize: int
    joint: bool
    seq_len: int = 0
    fisher_tokens: int = 0
    head_weights: int = 0


@dataclass(frozen=True)
class Work:
    """What something computes and moves.

    Attributes:
        passes: Operations of passes through the model, in the dtype it computes in.
        products: Operations of matrix products, triangular solves and Cholesky and QR factorizations in float32.
        coupled: Of matrix products in float32 that only a CPU makes, where rows know of each other.
        eigen: Operations of eigendecompositions in float32.
        solves: Operations of solvers that go column by column, in float32, polishing not counted.
        turns: How often such solvers, on a GPU, hand a few columns to the loops on the processor.
        looped: Weights that these loops go over, counted by what they take on the CPU.
        moved: Bytes read and written in the device's memory by what is not bound by its operations.
        files: Bytes read from and written to files.
        packed: Weights packed on the CPU.
        rotations: Operations of QR factorizations in float64 on the CPU.
    """

    passes: float = 0
    products: float = 0
    coupled: float = 0
    eigen: float = 0
    solves: float = 0
    turns: float = 0
    looped: float = 0
    moved: float = 0
    files: float = 0
    packed: float = 0
    rotations: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Work)))

    def __mul__(self, times: float) -> Work:
        return Work(*(getattr(self, each.name) * times for each in fields(Work)))


def count_phases(plan: Plan, load: Workload) -> dict[str, Work]:
    """Returns the work of every phase of a run, by name, in the order in which phases begin."""
    return _joint_phases(plan, load) if load.joint else _naive_phases(plan, load)


def pass_flops(plan: Plan, load: Workload, weights: int) -> float:
    """Returns the operations of one token's pass through all blocks, which have so many weights in linear layers."""
    blocks = plan.layers[-1].block + 1
    width = min(layer.in_features for layer in plan.layers)
    return 2.0 * weights + 4.0 * load.seq_len * width * blocks


def _joint_phases(plan: Plan, load: Workload) -> dict[str, Work]:
    dense = sum(layer.dense_weights for layer in plan.layers)
    kept = sum(layer.weights for layer in plan.layers)
    blocks = plan.layers[-1].block + 1
    width = min(layer.in_features for layer in plan.layers)
    tokens, few = load.num_tokens, load.fisher_tokens
    ranked = [layer for layer in plan.layers if layer.rank is not None]
    packed = plan.bits != FLOAT_BITS
    one_pass, one_kept = pass_flops(plan, load, dense), pass_flops(plan, load, kept)
    minded = plan.layers if packed else ranked
    grams = sum(gram_flops(layer.out_features, few) for layer in minded)
    model_bytes = dense * load.itemsize + plan.other_bytes
    streams = 2 * tokens * width * load.itemsize * blocks
    phases = {
        "sensitivity": Work(
            passes=few * (FISHER_PASSES * one_pass + HEAD_PASSES * 2.0 * load.head_weights),
            products=grams,
            files=2.0 * dense * load.itemsize * bool(few),
        ),
        "forward, both streams": Work(passes=tokens * (one_pass + JOINT_PASSES * one_kept)),
        "moments": Work(products=sum(paired_moment_flops(layer, tokens) for layer in plan.layers)),
        "anchor": total(anchor_work(layer) for layer in plan.layers if packed or layer.rank is not None),
        "decompose": total(truncation_work(layer, bool(few)) for layer in ranked),
        "quantize": total(stack_work(layer, bool(few)) for layer in plan.layers) if packed else Work(),
        "pack": Work(packed=kept if packed else 0),
        "files": Work(files=float(model_bytes + streams + 3 * plan.tensor_bytes)),  # shards are written, read, joined
    }
    return {name: work for name, work in phases.items() if work != Work()}


def _naive_phases(plan: Plan, load: Workload) -> dict[str, Work]:
    dense = sum(layer.dense_weights for layer in plan.layers)
    kept = sum(layer.weights for layer in plan.layers)
    tokens = load.num_tokens
    ranked = [layer for layer in plan.layers if layer.rank is not None]
    phases = {
        "forward": Work(passes=tokens * pass_flops(plan, load, dense)),
        "moments": Work(products=sum(gram_flops(layer.in_features, tokens) for layer in ranked)),
        "decompose": total(truncation_work(layer, False) for layer in ranked),
        "files": Work(files=float(dense * load.itemsize + plan.other_bytes + plan.tensor_bytes)),
    }
    if plan.bits != FLOAT_BITS:
        shapes = [shape for layer in plan.layers for shape in layer.factor_shapes().values()]
        turns = len(shapes) / (plan.layers[-1].block + 1) + 1  # true_sequential: a block once per layer
        phases["quantize"] = Work(
            passes=tokens * pass_flops(plan, load, kept) * turns,
            products=sum(2.0 * inputs**2 * tokens for inputs, _ in shapes),
            looped=float(HOST_LOOPS * kept),
        ) + total(solve_work(*shape) for shape in shapes)
        phases["pack"] = Work(packed=kept)
    return phases


def total(parts: Iterable[Work]) -> Work:
    """Returns the sum."""
    return sum(parts, Work())


def relative_cost(layers: Sequence[LayerPlan | LinearSite]) -> float:
    """Returns the operations that compressing or probing layers of one input as one takes, up to a factor."""
    height, width = sum(layer.out_features for layer in layers), layers[0].in_features
    return float(height * width * (height + width))


def gram_flops(features: int, tokens: int) -> float:
    """Returns the operations of XᵀX, X with shape (tokens, features)."""
    return 2.0 * features**2 * tokens * share_left(features)


def paired_moment_flops(layer: LayerPlan, tokens: int) -> float:
    """Returns the operations of H and C; the dense side is seen at the layer's narrower end."""
    n, seen = layer.in_features, min(layer.in_features, layer.out_features)
    return gram_flops(n, tokens) + 2.0 * n * seen * tokens


def cholesky_flops(size: int) -> float:
    """Returns the operations of a Cholesky factorization."""
    return size**3 / 3


def qr_flops(rows: int, columns: int) -> float:
    """Returns the operations of a thin QR factorization and of forming Q, rows ≥ columns; large ones may take fewer."""
    return 2 * (2.0 * rows * columns**2 - 2 / 3 * columns**3)


def anchor_work(layer: LayerPlan) -> Work:
    """Counts T = W + W (C − H)(H + λI)⁻¹."""
    m, n = layer.out_features, layer.in_features
    return Work(products=2.0 * m * n**2 + cholesky_flops(n) + 2.0 * m * n**2)


def truncation_work(layer: LayerPlan, of_loss: bool) -> Work:
    """Counts the truncation of a layer that has a rank; `of_loss`, in the metric G of the loss (`truncation.truncate`)."""
    m, n, r = layer.out_features, layer.in_features, layer.rank or 0
    small = min(m, n)
    products = 2.0 * m * n * r  # down = Uᵀ T
    if m > n:
        products += qr_flops(m, n) + 4.0 * n**3 * share_left(n) + 2.0 * m * n**2  # W = QR, R Σ Rᵀ, Q V
    else:
        products += 2.0 * m * n**2 + 2.0 * m**2 * n * share_left(m)
    if of_loss:
        products += cholesky_flops(m) + 2.0 * m**2 * n * share_left(m)  # S, S T
        products += m**2 * r + qr_flops(m, r) + 2.0 * r**2 * n
    return Work(products=products, eigen=EIGEN_FLOPS * float(small) ** 3)


def stack_work(layer: LayerPlan, coupled: bool) -> Work:
    """Counts what quantizes a layer or, with gauge, metrics and refit, its factors; `coupled`, on both sides."""
    solves = total(rounding_work(*shape, coupled) for shape in layer.factor_shapes().values())
    return solves if layer.rank is None else solves + gauge_work(layer, coupled) + refit_work(layer, coupled)


def rounding_work(inputs: int, outputs: int, coupled: bool) -> Work:
    """Counts what quantizes one matrix and polishes it; `coupled`, on both sides."""
    steps = min(outputs, GPU_STEPS) if coupled else 1
    loops = Work(looped=float(inputs * outputs) * (COUPLED_LOOPS if coupled else 1))
    one_sided = solve_work(inputs, outputs, steps) + refine_work(inputs, outputs, steps) + loops
    if not coupled:
        return one_sided
    # Five products a sweep: what rows miss, what they have, along which line scales move, and two as for others; the latter
    # take one before the first sweep, and two in each.
    more = 2.0 * inputs**2 * outputs * (5 * SWEEPS - (1 + 2 * SWEEPS))
    return one_sided + rows_work(inputs, outputs) + Work(coupled=more)


def gauge_work(layer: LayerPlan, coupled: bool) -> Work:
    """Counts the gauge of a layer's factors and the metrics of the one that is rounded first."""
    m, n, r = layer.out_features, layer.in_features, layer.rank or 0
    rotation = Work(products=2.0 * r**2 * (m + n), rotations=qr_flops(r, r))
    if coupled and m <= n:  # G deflated
        rotation += Work(products=2.0 * r * m**2 * (1 + share_left(m)) + 4.0 * r**2 * m + cholesky_flops(r))
    elif coupled:  # AᵀG A
        rotation += Work(products=2.0 * r * m**2 + 2.0 * r**2 * m * share_left(r))
    if m < n + coupled:  # up in the metric B H Bᵀ
        return rotation + Work(products=2.0 * r * n**2 * share_left(n) + 2.0 * r**2 * n)
    deflated = _bottleneck(r, n) + cholesky_flops(r) + 2.0 * n * r**2 + 2.0 * r * n**2 * share_left(n)
    return rotation + Work(products=deflated)


def refit_work(layer: LayerPlan, coupled: bool) -> Work:
    """Counts the refit of the second factor for the first, and its metrics."""
    m, n, r = layer.out_features, layer.in_features, layer.rank or 0
    if m < n + coupled:  # of down
        return Work(products=2.0 * m**2 * r + 2.0 * m * n * r + 2.0 * m * r**2 + cholesky_flops(r) + 2.0 * n * r**2)
    return Work(products=_bottleneck(r, n) + 4.0 * m * n * r + cholesky_flops(r) + 2.0 * m * r**2)


def _bottleneck(rank: int, inputs: int) -> float:
    """Returns the operations of B H Bᵀ, of which B H is wanted as well."""
    return 2.0 * rank * inputs**2 + 2.0 * rank**2 * inputs * share_left(rank)


def rows_work(inputs: int, outputs: int) -> Work:
    """Counts what two-sided rounding does besides: factor of the outputs' metric, its inverse, rows with their feedback."""
    return Work(products=float(outputs) ** 3 + float(outputs) ** 2 * inputs)


def solve_work(inputs: int, outputs: int, steps: int = 1) -> Work:
    """Counts one GPTQ solve: Cholesky factor, its inverse, columns with their feedback, rows in so many steps."""
    return Work(
        solves=2.0 * inputs**2 * outputs + float(inputs) ** 3,
        turns=inputs / COLUMNS * steps,
        moved=inputs**2 * outputs / COLUMNS * FLOAT_BYTES,  # what is left is read and written so often
    )


def refine_work(inputs: int, outputs: int, steps: int = 1) -> Work:
    """Counts the polishing of a solve: scales fitted and codes revisited, sweep by sweep."""
    product = 2.0 * inputs**2 * outputs
    products = (SWEEPS * 2 + 1) * product  # the target's pull once; scales half a product a sweep, codes one and a half
    return Work(
        products=products,
        turns=SWEEPS * inputs / COLUMNS * steps,
        moved=SWEEPS * inputs**2 * outputs / COLUMNS * FLOAT_BYTES,
    )
