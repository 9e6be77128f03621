# SPDX-License-Identifier: Apache-2.0
"""Half products against whole ones in float64, at widths that are one block and that are several."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lord_quant.halves import add_gram, energy, num_blocks, seen_through, share_left, symmetric_product, upper_product


F64 = torch.float64
SIZES = [1, 7, 511, 512, 514, 1030]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("size", SIZES)
def test_products_are_those_of_whole_matrices(size: int) -> None:
    rows, other = drawn(40, size), drawn(size, 9, seed=1)
    covariance = drawn(size, size, seed=2)
    covariance = covariance + covariance.T  # symmetric, and not definite
    upper = drawn(size, size, seed=3).triu()
    total = covariance.clone()
    add_gram(total, rows)
    torch.testing.assert_close(total, covariance + rows.T @ rows)
    torch.testing.assert_close(upper_product(upper, other), upper @ other)
    left = other @ other.T @ covariance
    torch.testing.assert_close(symmetric_product(left, other @ other.T), left @ other @ other.T)
    torch.testing.assert_close(seen_through(rows, covariance), rows @ covariance @ rows.T)
    wanted = float((rows @ covariance * rows).sum())
    assert energy(rows, covariance) == pytest.approx(wanted, rel=1e-9, abs=1e-9 * size)
    outputs = drawn(size, size, seed=4)
    outputs = outputs + outputs.T
    tall = drawn(size, 40, seed=5)
    small = covariance[:1, :1].expand(40, 40) + torch.eye(40, dtype=F64)
    wanted = float((outputs @ tall @ small * tall).sum())
    assert energy(tall, small, outputs) == pytest.approx(wanted, rel=1e-9, abs=1e-9 * size)


def test_many_rows_add_up() -> None:
    rows, covariance = drawn(2500, 3), torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=F64))
    assert energy(rows, covariance) == pytest.approx(float((rows.square() @ covariance.diagonal()).sum()))


@pytest.mark.parametrize(("size", "blocks", "left"), [(511, 1, 1.0), (512, 4, 5 / 8), (4096, 4, 5 / 8), (8192, 8, 9 / 16)])
def test_what_is_left_of_the_operations(size: int, blocks: int, left: float) -> None:
    assert (num_blocks(size), share_left(size)) == (blocks, left)
    upper, right = torch.empty(size, size, device="meta"), torch.empty(size, 3, device="meta")
    with FlopCounterMode(display=False) as counter:
        upper_product(upper, right)
    assert counter.get_total_flops() == 2 * size * size * 3 * left
    total, rows = torch.empty(size, size, device="meta"), torch.empty(3, size, device="meta")
    with FlopCounterMode(display=False) as counter:
        add_gram(total, rows)
    assert counter.get_total_flops() == 2 * size * size * 3 * left
