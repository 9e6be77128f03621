# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_quant.moments import MomentAccumulator, Moments


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
