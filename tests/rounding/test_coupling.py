# SPDX-License-Identifier: Apache-2.0
"""How errors of rows add up, against least squares."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_quant.rounding.coupling import Coupling


F64 = torch.float64


def drawn(rows: int, seed: int) -> tuple[Coupling, torch.Tensor, torch.Generator]:
    """A coupling, its metric, and what to draw from."""
    generator = torch.Generator().manual_seed(seed)
    loud = torch.randn(rows, rows + 2, generator=generator, dtype=F64)
    metric = loud @ loud.T / rows + 0.1 * torch.eye(rows, dtype=F64)
    return Coupling.of(torch.linalg.cholesky(torch.linalg.inv(metric)).T), metric, generator


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**16))
def test_root_and_metric_belong_together(rows: int, seed: int) -> None:
    coupling, metric, _ = drawn(rows, seed)
    torch.testing.assert_close(coupling.metric, metric, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(coupling.root @ coupling.root.T, metric, rtol=1e-8, atol=1e-8)
    assert torch.equal(coupling.root, coupling.root.triu())


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**16))
def test_a_row_moves_to_its_best_place_if_those_behind_it_will_too(rows: int, seed: int) -> None:
    coupling, metric, generator = drawn(rows, seed)
    errors = torch.randn(5, rows, generator=generator, dtype=F64)
    moves, root = coupling.moves(errors), torch.linalg.cholesky(metric).T  # ‖root d‖²
    for row in range(rows):
        best = torch.linalg.lstsq(root[:, row:], -root[:, :row] @ errors[:, :row].T).solution[0]
        torch.testing.assert_close(-moves[:, row], best, rtol=1e-6, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**16))
def test_pulls_are_the_slope_of_the_cost_in_units_of_codes(rows: int, seed: int) -> None:
    coupling, metric, generator = drawn(rows, seed)
    scale = torch.rand(rows, generator=generator, dtype=F64) + 0.2
    codes = torch.randn(rows, generator=generator, dtype=F64, requires_grad=True)
    error = scale * codes
    (slope,) = torch.autograd.grad(error @ metric @ error / 2, codes)
    own = scale.square() * metric.diagonal()  # the curvature
    torch.testing.assert_close(codes.detach() @ coupling.on_others(scale), slope / own, rtol=1e-8, atol=1e-8)
    moved = coupling.moves(error.detach()) / scale
    strictly = coupling.on_later(scale).triu(1)
    torch.testing.assert_close(codes.detach() @ strictly, moved, rtol=1e-8, atol=1e-8)
