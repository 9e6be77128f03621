# SPDX-License-Identifier: Apache-2.0
"""Truncating one layer: what the joint stack does, against whitened SVD, on the same weight and moments.

Whitened SVD: Σ = L Lᵀ, W L = U S Vᵀ, up = U √S, down = √S Vᵀ L⁻¹. For the same rank it minimises the same output error as
ours, so that must be the same. It is done in two ways. As usual low-rank tools do it: SVD-LLM's code
(github.com/AIoT-MLSys-Lab/SVD-LLM, SVDLLM.py) factors and inverts in float64, by a general inverse, and takes the SVD in
float32; AA-SVD's (github.com/atulkumarin/AA-SVD, compress_module_obj2) does the same in the dtype of its moments. And as
lean as we know how: all in float32, and a triangular solve instead of the inverse. The joint stack also truncates in the
metric of the model's loss, which whitened SVD cannot; what that takes is timed by itself.

Weights and moments are random: Σ and G have a diagonal that falls over three orders of magnitude and a part of low rank.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from plain import synchronise
from tables import grid


if TYPE_CHECKING:
    import torch

    from lord_quant.decompose import Factors

STARCODER = {
    "attn.c_attn": (6400, 6144),
    "attn.c_proj": (6144, 6144),
    "mlp.c_fc": (24576, 6144),
    "mlp.c_proj": (6144, 24576),
}
"""(out_features, in_features) of the linear layers of a StarCoder-15B block."""
SHAPES = {"small": {name: (m // 8, n // 8) for name, (m, n) in STARCODER.items()}, "starcoder-15b": STARCODER}
WAYS = ("ours", "whitened", "lean", "ours_of_loss")
"""Ours; whitened SVD as usual tools do it, and without what they could spare; ours in the metric of the loss."""
OTHERS = ("whitened", "lean")
STEP = 32
"""Ranks are multiples of this."""


class Problem(NamedTuple):
    """A layer to truncate.

    Attributes:
        weight: W with shape (out_features, in_features).
        covariance: Σ with shape (in_features, in_features).
        metric: G with shape (out_features, out_features).
        rank: How far.
    """

    weight: torch.Tensor
    covariance: torch.Tensor
    metric: torch.Tensor
    rank: int


def make_problem(shape: tuple[int, int], rank_ratio: float, seed: int, device: str) -> Problem:
    """Draws a layer in float32."""
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)
    outputs, inputs = shape

    def moment(size: int) -> torch.Tensor:
        loud = torch.randn(size, max(1, size // 16), generator=generator, device=device)
        found = loud @ loud.T
        found /= found.diagonal().mean()
        found.diagonal().add_(torch.logspace(0, -3, size, device=device))
        return found

    weight = torch.randn(shape, generator=generator, device=device) / inputs**0.5
    rank = max(STEP, round(min(shape) * rank_ratio / STEP) * STEP)
    return Problem(weight, moment(inputs), moment(outputs), min(rank, *shape))


def whitened_svd(weight: torch.Tensor, covariance: torch.Tensor, rank: int) -> Factors:
    """Returns the factors of whitened SVD as SVD-LLM's code makes them, less a product with √S as a matrix."""
    import torch

    from lord_quant.decompose import Factors

    lower = torch.linalg.cholesky(covariance.double())
    inverse = torch.linalg.inv(lower).float()
    u, s, vh = torch.linalg.svd(weight @ lower.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return Factors(root[:, None] * (vh[:rank] @ inverse), u[:, :rank] * root, None)


def lean_whitened_svd(weight: torch.Tensor, covariance: torch.Tensor, rank: int) -> Factors:
    """Returns the factors of whitened SVD without an inverse and in float32."""
    import torch

    from lord_quant.decompose import Factors

    lower = torch.linalg.cholesky(covariance)
    u, s, vh = torch.linalg.svd(weight @ lower, full_matrices=False)
    root = s[:rank].sqrt()
    down = torch.linalg.solve_triangular(lower, root[:, None] * vh[:rank], upper=False, left=False)
    return Factors(down, u[:, :rank] * root, None)


def run_way(way: str, problem: Problem) -> Factors:
    """Truncates a layer one way, an element of `WAYS`."""
    from lord_quant.truncation import truncate, weigh

    weight, covariance, metric, rank = problem
    if way in OTHERS:
        return (whitened_svd if way == "whitened" else lean_whitened_svd)(weight, covariance, rank)
    return truncate(weigh(weight, metric if way == "ours_of_loss" else None), covariance, rank)[1]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds that work took, and its result."""
    synchronise()
    start = time.perf_counter()
    result = work()
    synchronise()
    return time.perf_counter() - start, result


def compare(
    shapes: str, rank_ratio: float, repeats: int, seed: int, device: str, layers: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Times every layer, or those that are named, every way, as often as asked for, each time beginning with another way.

    Returns:
        One row per layer: its shape and rank, and all seconds and relative output errors by way.
    """
    from lord_quant.linalg import relative_error

    rows = []
    for name, shape in SHAPES[shapes].items():
        if layers and name not in layers:
            continue
        problem = make_problem(shape, rank_ratio, seed, device)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        errors: dict[str, float] = {}
        for repeat in range(repeats):
            for step in range(len(WAYS)):
                way = WAYS[(repeat + step) % len(WAYS)]
                took, factors = timed(functools.partial(run_way, way, problem))
                seconds[way].append(took)
                if way not in errors:
                    errors[way] = relative_error(factors.product(), problem.weight, problem.covariance, None)
                del factors
        rows.append({"layer": name, "shape": shape, "rank": problem.rank, "seconds": seconds, "errors": errors})
        print(f"{name} {shape[0]}x{shape[1]}: {_line(rows[-1])}", flush=True)
    return rows


def summarise(rows: Sequence[dict[str, Any]], tolerance: float) -> list[dict[str, Any]]:
    """Returns medians and ratios of every layer and of all together, and whether both errors agree within a share."""
    lines = []
    for row in rows:
        ours, others = row["errors"]["ours"], [row["errors"][way] for way in OTHERS]
        middle = {way: median(row["seconds"][way]) for way in WAYS}
        same = all(abs(ours - other) <= tolerance * other for other in others)
        lines.append({"layer": row["layer"], "shape": row["shape"], "seconds": middle, "same_error": same})
    if lines:
        total = {way: sum(line["seconds"][way] for line in lines) for way in WAYS}
        same = all(line["same_error"] for line in lines)
        lines.append({"layer": "all", "shape": None, "seconds": total, "same_error": same})
    for line in lines:
        seconds = line["seconds"]
        line |= {
            f"{other}_over_{way}": seconds[other] / seconds[way] for other in OTHERS for way in ("ours", "ours_of_loss")
        }
    return lines


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """Renders the summary."""
    headers = ["layer", "out x in", "ours, s", "whitened SVD, s", "ratio", "lean, s", "ratio", "same error"]
    headers += ["ours, loss's metric, s", "ratio", "ratio to lean"]
    cells = []
    for line in lines:
        ours, whitened, lean, of_loss = (f"{line['seconds'][way]:.3g}" for way in WAYS)
        shape = "" if line["shape"] is None else "x".join(map(str, line["shape"]))
        same = "yes" if line["same_error"] else "NO"
        ratios = [f"{line[f'{other}_over_{way}']:.2f}" for way in ("ours", "ours_of_loss") for other in OTHERS]
        cells.append([line["layer"], shape, ours, whitened, ratios[0], lean, ratios[1], same, of_loss, *ratios[2:]])
    return grid(headers, cells)


def _line(row: dict[str, Any]) -> str:
    return ", ".join(f"{way} {median(row['seconds'][way]):.3g} s" for way in WAYS)
