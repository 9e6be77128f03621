# SPDX-License-Identifier: Apache-2.0
"""Refining codes against their objective: never worse, on the grid, and as good as brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_quant.errors import NumericsError
from lord_quant.rounding.coupling import Coupling
from lord_quant.rounding.refine import DAMPING, Quantized, refine


F64 = torch.float64


def hessian_of(size: int, seed: int, kind: str = "correlated") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(max(2, size // 2) if kind == "singular" else 4 * size, size, generator=generator, dtype=F64)
    x = x @ (torch.eye(size, dtype=F64) + 0.5 * torch.randn(size, size, generator=generator, dtype=F64))
    if kind == "badly scaled":
        x *= torch.logspace(-2, 2, size, dtype=F64)[torch.randperm(size, generator=generator)]
    if kind == "dead channels":
        x[:, ::3] = 0
    return (x.T @ x / len(x)).float()


def rounded(weight: torch.Tensor, bits: int, g_idx: torch.Tensor, sym: bool = False) -> Quantized:
    """Round to nearest with scales from the largest weight of each group: the plainest start there is."""
    count, largest = int(g_idx.max()) + 1, 2**bits - 1
    scales, zeros = torch.empty(len(weight), count), torch.empty(len(weight), count)
    for group in range(count):
        part = weight[:, g_idx == group]
        low, high = part.amin(dim=1).clamp_max(0), part.amax(dim=1).clamp_min(0)
        if sym:
            high = torch.maximum(-low, high)
            low = -high
        scales[:, group] = ((high - low) / largest).clamp_min(1e-4).half().float()
        zeros[:, group] = (-low / scales[:, group]).round().clamp(0, largest)
    groups = g_idx.long()
    codes = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, largest)
    return Quantized(codes, scales, zeros, g_idx, bits)


def damped(hessian: torch.Tensor) -> torch.Tensor:
    """The metric in which `refine` measures."""
    metric = hessian.double() / (hessian.double().diagonal().mean() or 1)
    return metric + DAMPING * torch.eye(len(metric), dtype=F64)


def objective(quantized: Quantized, weight: torch.Tensor, metric: torch.Tensor) -> float:
    error = quantized.weight().double() - weight.double()
    return float(((error @ metric) * error).sum())


def problem(
    rows: int, groups: int, size: int, seed: int, bits: int = 4, kind: str = "correlated", sym: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Quantized]:
    weight = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed))
    g_idx = torch.arange(groups * size, dtype=torch.int32) // size
    return weight, hessian_of(groups * size, seed + 1, kind), rounded(weight, bits, g_idx, sym)


KINDS = ["correlated", "singular", "badly scaled", "dead channels"]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([1, 3, 16, 40]),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from(KINDS),
    st.integers(1, 4),
    st.integers(0, 10**6),
)
def test_refining_never_raises_the_objective_and_stays_on_the_grid(
    rows: int, groups: int, size: int, bits: int, sym: bool, kind: str, sweeps: int, seed: int
) -> None:
    weight, hessian, start = problem(rows, groups, size, seed, bits, kind, sym)
    before = [tensor.clone() for tensor in (weight, hessian, *start[:4])]
    found = refine(weight, hessian, start, sweeps)
    assert all(torch.equal(old, new) for old, new in zip(before, (weight, hessian, *start[:4]), strict=True))
    assert torch.equal(found.zeros, start.zeros) and torch.equal(found.g_idx, start.g_idx) and found.bits == bits
    assert torch.equal(found.codes, found.codes.round()) and found.codes.shape == weight.shape
    assert found.codes.min() >= 0 and found.codes.max() <= 2**bits - 1
    assert torch.equal(found.scales, found.scales.half().float()) and (found.scales > 0).all()
    metric = damped(hessian)
    # Rounding a scale to float16 moves its group by a relative 2⁻¹¹; the objective feels that to second order.
    rounding = 2.0**-22 * float(((found.weight().double() @ metric) * found.weight().double()).sum())
    assert objective(found, weight, metric) <= objective(start, weight, metric) * (1 + 1e-5) + 4 * groups * rounding


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 9),
    st.integers(1, 4),
    st.sampled_from([1, 3, 16, 40]),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(KINDS),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_refining_coupled_rows_never_raises_their_objective(
    rows: int, groups: int, size: int, bits: int, kind: str, sweeps: int, seed: int
) -> None:
    weight, hessian, start = problem(rows, groups, size, seed, bits, kind)
    outputs = hessian_of(rows, seed + 2, "correlated").double() + 0.1 * torch.eye(rows, dtype=F64)
    coupling = Coupling.of(torch.linalg.cholesky(torch.linalg.inv(outputs)).T.float())
    found = refine(weight, hessian, start, sweeps, coupling)
    assert torch.equal(found.codes, found.codes.round().clamp(0, 2**bits - 1))
    assert torch.equal(found.scales, found.scales.half().float()) and (found.scales > 0).all()
    metric, lost = damped(hessian), []
    for done in (start, found):
        error = done.weight().double() - weight.double()
        lost.append(float(((outputs @ error @ metric) * error).sum()))
    whole = found.weight().double()  # as above
    rounding = 2.0**-22 * float(((outputs @ whole @ metric) * whole).sum())
    assert lost[1] <= lost[0] * (1 + 1e-4) + 4 * groups * rows * rounding


def test_coupled_rows_are_refined_as_one_by_one_if_nothing_couples_them() -> None:
    weight, hessian, start = problem(6, 2, 32, 0, bits=3)
    alone = refine(weight, hessian, start, 4)
    apart = refine(weight, hessian, start, 4, Coupling.of(torch.linspace(1, 3, 6).diag()))
    metric = damped(hessian)
    assert objective(apart, weight, metric) == pytest.approx(objective(alone, weight, metric), rel=0.03)
    assert objective(apart, weight, metric) < 0.9 * objective(start, weight, metric)


@pytest.mark.parametrize("rows", [1, 9])
def test_two_sweeps_are_one_and_another(rows: int) -> None:
    """What a sweep leaves off is what the next one begins with."""
    weight, hessian, start = problem(rows, 3, 80, seed=0, bits=3)  # more columns than are done at a time
    weight, hessian, start = weight.double(), hessian.double(), start.to(weight.double())
    root = torch.linalg.cholesky(hessian_of(rows, 7).double() + torch.eye(rows, dtype=F64))
    for coupling in (None, Coupling.of(torch.linalg.inv(root).T.contiguous().triu())):
        both = refine(weight, hessian, start, 2, coupling)
        after = refine(weight, hessian, refine(weight, hessian, start, 1, coupling), 1, coupling)
        assert torch.equal(both.codes, after.codes) and torch.equal(both.scales, after.scales)
        assert not torch.equal(both.codes, refine(weight, hessian, start, 1, coupling).codes)


def test_more_sweeps_are_better_on_average() -> None:
    total = dict.fromkeys((0, 1, 2, 4), 0.0)
    for seed in range(8):
        weight, hessian, start = problem(16, 2, 32, seed, bits=3)
        for sweeps in total:
            total[sweeps] += objective(refine(weight, hessian, start, sweeps), weight, damped(hessian))
    assert total[4] < total[2] < total[1] < 0.7 * total[0]


@pytest.mark.parametrize("hessian", [hessian_of(8, 0), torch.zeros(8, 8)], ids=["no sweeps", "zero Hessian"])
def test_nothing_to_do_returns_the_start(hessian: torch.Tensor) -> None:
    weight, _, start = problem(3, 2, 4, 0)
    sweeps = 0 if hessian.any() else 3
    assert refine(weight, hessian, start, sweeps) is start


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([4, 16]), st.integers(0, 10**6))
def test_activation_order_is_a_permutation_of_columns(rows: int, groups: int, size: int, seed: int) -> None:
    """Columns of a group that lie apart are refined as if they lay together, and come back to their places."""
    weight, hessian, _ = problem(rows, groups, size, seed)
    g_idx = (torch.randperm(groups * size, generator=torch.Generator().manual_seed(seed)) // size).to(torch.int32)
    together = torch.argsort(g_idx, stable=True)
    apart = refine(weight, hessian, rounded(weight, 3, g_idx), 2)
    by_hand = refine(
        weight[:, together], hessian[together][:, together], rounded(weight[:, together], 3, g_idx[together]), 2
    )
    assert torch.equal(apart.codes[:, together], by_hand.codes)
    assert torch.equal(apart.scales, by_hand.scales)
    assert torch.equal(apart.weight()[:, together], by_hand.weight())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([4, 8]), st.integers(0, 10**6))
def test_scales_are_least_squares_for_their_codes(rows: int, groups: int, size: int, seed: int) -> None:
    weight, hessian, start = problem(rows, groups, size, seed, bits=3)
    metric = damped(hessian)
    root = torch.linalg.cholesky(metric)  # ‖D L‖² = tr D H Dᵀ
    steps = (start.codes - start.zeros[:, start.g_idx.long()]).double()
    expected = torch.empty(rows, groups, dtype=F64)
    for row in range(rows):
        directions = torch.stack([(steps[row] * (start.g_idx == group)) @ root for group in range(groups)], dim=1)
        expected[row] = torch.linalg.lstsq(directions, weight[row].double() @ root).solution
    found = fitted_scales(weight, hessian, start)
    ratio = expected / start.scales.double()
    settled = (ratio > 0.31) & (ratio < 2.9)  # others are wild, and stay
    torch.testing.assert_close(found[settled].double(), expected[settled], rtol=2e-3, atol=0)
    wild = (ratio < 0.29) | (ratio > 3.1)
    assert torch.equal(found[wild], start.scales[wild])


@pytest.mark.parametrize(("together", "values"), [(1, 2**25), (20, 2**25), (512, 2**25), (512, 2 * 36), (512, 1)])
def test_scales_do_not_depend_on_how_much_is_taken_at_once(
    together: int, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of 8, one of 5, and one without columns: against the definition, M and its right-hand side entry by entry."""
    from lord_quant.rounding import refine as module

    monkeypatch.setattr(module, "TOGETHER", together)
    monkeypatch.setattr(module, "SYSTEM_VALUES", values)
    groups = torch.tensor([0] * 8 + [1] * 8 + [3] * 8 + [4] * 8 + [5] * 5)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, len(groups), generator=generator)
    hessian = hessian_of(len(groups), 1).float()
    metric = damped(hessian).float()
    scales = torch.full((3, 6), 0.25)
    steps = (weight / 0.25).round()
    damping = module._Damped.of(hessian)
    found = module._fit_scales((weight @ metric).T, damping, steps.T, scales.T.contiguous(), groups).T
    for row in range(3):
        parts = torch.stack([steps[row] * (groups == group) for group in (0, 1, 3, 4, 5)]).double()
        system = parts @ metric.double() @ parts.T
        wanted = torch.linalg.solve(system, parts @ metric.double() @ weight[row].double())
        torch.testing.assert_close(found[row, [0, 1, 3, 4, 5]].double(), wanted, rtol=2e-3, atol=0)
    torch.testing.assert_close(found[:, 2].float(), scales[:, 2])


def fitted_scales(weight: torch.Tensor, hessian: torch.Tensor, start: Quantized) -> torch.Tensor:
    from lord_quant.rounding import refine as module

    metric = damped(hessian).float()
    groups = start.g_idx.long()
    steps = start.codes - start.zeros[:, groups]
    damping = module._Damped.of(hessian.float())
    before = start.scales.T.contiguous()
    return module._stored(module._fit_scales((weight @ metric).T, damping, steps.T, before, groups), before).T


@pytest.mark.parametrize("seed", range(6))
def test_against_brute_force(seed: int) -> None:
    """Four columns of two bits: all 256 codes of a row can be tried. Descent ends where no single code can improve."""
    weight, hessian, start = problem(3, 1, 4, seed, bits=2)
    found = refine(weight, hessian, start, 10)
    metric = damped(hessian)
    codes = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float32)
    for row in range(3):
        one = Quantized(found.codes[[row]], found.scales[[row]], found.zeros[[row]], found.g_idx, 2)
        start_one = Quantized(start.codes[[row]], start.scales[[row]], start.zeros[[row]], start.g_idx, 2)
        reached = objective(one, weight[[row]], metric)
        assert reached <= objective(start_one, weight[[row]], metric) * (1 + 1e-5)
        tried = [objective(one._replace(codes=candidate[None]), weight[[row]], metric) for candidate in codes]
        assert min(tried) <= reached * (1 + 1e-9)
        for candidate, value in zip(codes, tried, strict=True):
            if (candidate != one.codes[0]).sum() == 1:
                assert value >= reached * (1 - 1e-5)


@pytest.mark.parametrize("exponent", [-134, -100, -20, 100])
def test_units_do_not_matter(exponent: int) -> None:
    """At 2⁻¹³⁴ one over the mean of the Hessian is no float32; entries of few digits are exact in all units."""
    weight, hessian, start = problem(5, 2, 8, 3)
    hessian = (16 * hessian / hessian.diagonal().mean()).round()
    found, again = (refine(weight, hessian * unit, start, 2) for unit in (1.0, 2.0**exponent))
    assert not torch.equal(found.codes, start.codes)
    assert torch.equal(found.codes, again.codes) and torch.equal(found.scales, again.scales)


def test_a_group_of_zeros_keeps_its_scale() -> None:
    """Its codes say nothing of a scale; with the weights zero, none must be made up."""
    weight, hessian, _ = problem(4, 2, 8, 5)
    weight[:, :8] = 0
    start = rounded(weight, 4, torch.arange(16, dtype=torch.int32) // 8)
    assert torch.equal(start.codes[:, :8], start.zeros[:, [0] * 8])
    found = refine(weight, torch.block_diag(hessian[:8, :8], hessian[8:, 8:]), start, 3)
    assert torch.equal(found.scales[:, 0], start.scales[:, 0])
    assert torch.equal(found.codes[:, :8], start.codes[:, :8])


def test_scales_beyond_float16_are_an_error() -> None:
    weight, hessian, _ = problem(4, 2, 8, 0)
    start = rounded(weight, 4, torch.arange(16, dtype=torch.int32) // 8)
    with pytest.raises(NumericsError, match="scales after refinement: 8 of 8"):
        refine(weight * 2e6, hessian, start._replace(scales=start.scales * 1e6), 1)


def test_the_weight_that_will_be_read_back() -> None:
    quantized = Quantized(
        codes=torch.tensor([[0.0, 1, 2, 3]]),
        scales=torch.tensor([[0.5, 2.0]]),
        zeros=torch.tensor([[1.0, 2.0]]),
        g_idx=torch.tensor([1, 0, 1, 0], dtype=torch.int32),
        bits=2,
    )
    assert quantized.weight().tolist() == [[-4, 0, 0, 1]]


@pytest.mark.parametrize("bits", [2, 8])
def test_at_rest_and_in_another_dtype_the_values_stay(bits: int) -> None:
    _, _, quantized = problem(4, 2, 8, 1, bits=bits)
    resting = quantized.at_rest()
    assert resting.codes.dtype == torch.uint8 and torch.equal(resting.weight(), quantized.weight())
    double = resting.to(torch.zeros(1, dtype=F64))
    assert {double.codes.dtype, double.scales.dtype, double.zeros.dtype} == {F64}
    torch.testing.assert_close(double.weight(), quantized.weight().double(), rtol=1e-6, atol=0)
    assert torch.equal(double.codes.float(), quantized.codes) and double.g_idx is quantized.g_idx
