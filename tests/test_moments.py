# SPDX-License-Identifier: Apache-2.0
"""Streamed means and covariances, alone and in pairs, against formulas over all samples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_quant.moments import MomentAccumulator, Moments, PairedAccumulator, PairedMoments


def activations(tokens: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return (torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mix + 3 * mix[0]).to(dtype)


def accumulate(batches: list[torch.Tensor], dtype: torch.dtype = torch.float64) -> MomentAccumulator:
    accumulator = MomentAccumulator(batches[0].shape[-1], dtype)
    for batch in batches:
        accumulator.update(batch)
    return accumulator


def assert_same(left: Moments, right: Moments, tolerance: float = 1e-11) -> None:
    assert left.num_tokens == right.num_tokens
    torch.testing.assert_close(left.mean, right.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(left.covariance, right.covariance, rtol=tolerance, atol=tolerance)


def oracle(x: torch.Tensor) -> Moments:
    rows = x.double().numpy().reshape(-1, x.shape[-1])
    mean = torch.from_numpy(rows.mean(axis=0))
    return Moments(mean, torch.from_numpy(np.atleast_2d(np.cov(rows, rowvar=False, bias=True))), len(rows))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 6), st.integers(0, 1000), st.data())
def test_streaming_one_shot_merged_and_numpy_agree(sizes: list[int], features: int, seed: int, data: st.DataObject) -> None:
    x = activations(sum(sizes), features, seed)
    batches = list(x.split(sizes))
    cut = data.draw(st.integers(0, len(batches)))
    merged = MomentAccumulator(features, torch.float64)
    for part in (batches[:cut], batches[cut:]):
        if part:
            merged.merge(accumulate(part))
    expected = oracle(x)
    assert_same(accumulate(batches).result(), expected)
    assert_same(accumulate([x]).result(), expected)
    assert_same(merged.result(), expected)


def test_tokens_count_alike_however_batched() -> None:
    short, long = activations(1, 4, seed=1), activations(99, 4, seed=2) + 10
    result = accumulate([short, long]).result()
    assert_same(result, oracle(torch.cat([short, long])))
    by_batch = (short.mean(0) + long.mean(0)) / 2
    assert not torch.allclose(result.mean, by_batch, rtol=0.1)


def test_leading_dimensions_are_tokens_and_masked_ones_do_not_count() -> None:
    x = activations(24, 5).view(2, 3, 4, 5)
    mask = (torch.arange(24) % 3 != 0).view(2, 3, 4)
    poisoned = torch.where(mask[..., None], x, torch.full_like(x, torch.nan))
    for kind in (torch.bool, torch.int64, torch.float32):
        accumulator = MomentAccumulator(5, torch.float64)
        accumulator.update(poisoned, mask.to(kind))
        assert_same(accumulator.result(), oracle(x[mask]))


def test_large_mean_with_small_variance_stays_accurate_in_float32_where_the_naive_formula_fails() -> None:
    generator = torch.Generator().manual_seed(3)
    x = (1e4 + torch.randn(4096, 6, generator=generator, dtype=torch.float64)).float()
    expected = oracle(x).covariance
    ours = accumulate(list(x.split(100)), torch.float32).result().covariance.double()
    naive = (x.T @ x / len(x) - torch.outer(x.mean(0), x.mean(0))).double()
    assert (ours - expected).abs().max() < 1e-4
    assert (naive - expected).abs().max() > 0.5


def test_covariance_is_symmetric_and_positive_semidefinite() -> None:
    covariance = accumulate(list(activations(40, 8).float().split(7)), torch.float32).result().covariance
    torch.testing.assert_close(covariance, covariance.T)
    assert torch.linalg.eigvalsh(covariance.double())[0] > -1e-5 * covariance.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_are_accumulated_in_the_accumulators_dtype(dtype: torch.dtype) -> None:
    x = activations(300, 4, dtype=dtype)
    result = accumulate(list(x.split(64)), torch.float32).result()
    expected = oracle(x)
    assert result.mean.dtype == result.covariance.dtype == torch.float32
    torch.testing.assert_close(result.covariance.double(), expected.covariance, rtol=1e-4, atol=1e-4)


def test_an_accumulator_without_tokens_is_undefined_and_neutral() -> None:
    empty = MomentAccumulator(3)
    empty.update(torch.empty(0, 3))
    empty.update(torch.ones(2, 3), torch.zeros(2))
    with pytest.raises(RuntimeError, match="no token"):
        empty.result()
    full = accumulate([activations(9, 3)])
    before = full.result()
    full.merge(MomentAccumulator(3, torch.float64))
    assert_same(full.result(), before, 0)
    received = MomentAccumulator(3, torch.float64)
    received.merge(full)
    assert_same(received.result(), before)


def test_arguments_and_earlier_results_are_left_alone() -> None:
    x, other = activations(10, 3), accumulate([activations(5, 3, seed=9)])
    copy, other_before = x.clone(), other.result()
    accumulator = accumulate([x])
    early = accumulator.result()
    early_copy = Moments(early.mean.clone(), early.covariance.clone(), early.num_tokens)
    accumulator.merge(other)
    accumulator.update(x * 2)
    assert torch.equal(x, copy)
    assert_same(early, early_copy, 0)
    assert_same(other.result(), other_before, 0)


def test_gradients_are_not_kept() -> None:
    accumulator = MomentAccumulator(3)
    accumulator.update(torch.ones(2, 3, requires_grad=True))
    assert not accumulator.result().covariance.requires_grad


def paired(x: torch.Tensor, y: torch.Tensor, sizes: list[int], dtype: torch.dtype = torch.float64) -> PairedMoments:
    accumulator = PairedAccumulator(y.shape[-1], dtype, dense_features=x.shape[-1])
    for one, other in zip(x.split(sizes), y.split(sizes), strict=True):
        accumulator.update(one, other)
    return accumulator.result()


def paired_oracle(x: torch.Tensor, y: torch.Tensor) -> PairedMoments:
    x, y = (rows.double().reshape(-1, rows.shape[-1]) for rows in (x, y))
    left, right = x - x.mean(0), y - y.mean(0)
    return PairedMoments(x.mean(0), y.mean(0), right.T @ right / len(y), left.T @ right / len(x), len(x))


def assert_same_pairs(left: PairedMoments, right: PairedMoments, tolerance: float = 1e-11) -> None:
    assert left.num_tokens == right.num_tokens
    for one, other in zip(left[:4], right[:4], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def two_streams(tokens: int, features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the dense model and, drifted away from them, of the compressed one."""
    x = activations(tokens, features, seed)
    return x, x @ activations(features, features, seed + 1) * 0.1 + x + activations(tokens, features, seed + 2) * 0.2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 6), st.integers(0, 1000))
def test_paired_moments_agree_with_one_formula_however_streamed(sizes: list[int], features: int, seed: int) -> None:
    x, y = two_streams(sum(sizes), features, seed)
    expected = paired_oracle(x, y)
    assert_same_pairs(paired(x, y, sizes), expected)
    assert_same_pairs(paired(x, y, [sum(sizes)]), expected)
    assert_same(Moments(*paired(x, y, sizes)[1:3], len(x)), oracle(y))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 1000))
def test_raw_moments_are_about_zero(tokens: int, features: int, seed: int) -> None:
    x, y = two_streams(tokens, features, seed)
    moments = paired(x, y, [tokens])
    raw = moments.raw()
    torch.testing.assert_close(raw.covariance, y.T @ y / tokens, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(raw.cross, x.T @ y / tokens, rtol=1e-10, atol=1e-10)
    assert torch.equal(raw.mean, moments.mean) and torch.equal(raw.dense_mean, moments.dense_mean)
    assert_same_pairs(moments, paired(x, y, [tokens]), 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 20), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_seeing_outputs_is_as_good_as_seeing_inputs(m: int, n: int, tokens: int, seed: int, raw: bool) -> None:
    """drift and output_mean say the same of W x as of x, and both what their formulas say."""
    x, y = two_streams(tokens, n, seed)
    weight = activations(m, n, seed + 3)
    of_inputs = paired(x, y, [tokens])
    of_outputs = paired(x @ weight.T, y, [tokens])._replace(of_outputs=True)
    oracle = paired_oracle(x, y)
    if raw:
        of_inputs, of_outputs, oracle = of_inputs.raw(), of_outputs.raw(), oracle.raw()
    drift = weight @ (oracle.cross - oracle.covariance)
    size = float(weight.abs().max() * (oracle.cross.abs().max() + oracle.covariance.abs().max()))
    for moments in (of_inputs, of_outputs):
        torch.testing.assert_close(moments.drift(weight), drift, rtol=0, atol=1e-11 * (1 + size))
        torch.testing.assert_close(moments.output_mean(weight), weight @ oracle.dense_mean, rtol=1e-10, atol=1e-10)


def test_equal_streams_have_the_covariance_as_their_cross_moment() -> None:
    x = activations(50, 5)
    moments = paired(x, x, [7, 13, 30])
    torch.testing.assert_close(moments.cross, moments.covariance, rtol=0, atol=1e-11)
    assert torch.equal(moments.dense_mean, moments.mean)
    assert_same(Moments(*moments[1:3], 50), accumulate(list(x.split([7, 13, 30]))).result(), 0)


def test_paired_moments_with_large_means_stay_accurate_in_float32() -> None:
    generator = torch.Generator().manual_seed(3)
    x = (1e4 + torch.randn(4096, 6, generator=generator, dtype=torch.float64)).float()
    y = (-1e4 + x + torch.randn(4096, 6, generator=generator, dtype=torch.float64)).float()
    found = paired(x, y, [100] * 40 + [96], torch.float32)
    assert found.cross.dtype == torch.float32
    assert (found.cross.double() - paired_oracle(x, y).cross).abs().max() < 1e-4


def test_paired_arguments_and_earlier_results_are_left_alone_and_batches_may_be_empty() -> None:
    x, y = two_streams(12, 3)
    accumulator = PairedAccumulator(3, torch.float64)
    with pytest.raises(RuntimeError, match="no token"):
        accumulator.result()
    accumulator.update(x[:0], y[:0])
    copies = x.clone(), y.clone()
    accumulator.update(x.view(2, 6, 3), y.view(2, 6, 3))
    early = accumulator.result()
    accumulator.update(x[:0], y[:0])
    assert_same_pairs(accumulator.result(), early, 0)
    accumulator.update(2 * x, y)
    assert_same_pairs(early, paired_oracle(*copies))
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pairs_are_accumulated_in_the_accumulators_dtype(dtype: torch.dtype) -> None:
    x, y = (rows.to(dtype).requires_grad_() for rows in two_streams(300, 4))
    found = paired(x, y, [64] * 4 + [44], torch.float32)
    assert not found.cross.requires_grad and not found.covariance.requires_grad
    expected = paired_oracle(x.detach(), y.detach())
    torch.testing.assert_close(found.cross.double(), expected.cross, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("features", [511, 512, 515])
def test_wide_inputs_are_multiplied_in_parts_with_the_same_result(features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, features, generator=generator, dtype=torch.float64) + 2 for _ in range(2))
    found = paired(x, y, [4, 5])
    assert_same_pairs(found, paired_oracle(x, y))
    assert_same(accumulate([y[:4], y[4:]]).result(), oracle(y))
    torch.testing.assert_close(found.covariance, found.covariance.T, rtol=0, atol=1e-12)
