# SPDX-License-Identifier: Apache-2.0
"""Streaming mean and covariance of activations, of one stream or of two side by side.

The sum of squares E[x xᵀ] − μ μᵀ cancels badly when means are large against deviations, as transformer activations
are. So each batch is centred on its own mean and two sets of statistics are merged exactly (Chan, Golub & LeVeque 1979):

    n = n_a + n_b     δ = μ_b − μ_a     μ = μ_a + δ n_b / n     M = M_a + M_b + δ δᵀ n_a n_b / n

where M is the sum of centred outer products. A merge is associative up to rounding: streaming over batches, one shot
over everything and merged halves (or processes) agree. Every token counts alike, however it was batched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lord_quant.distributed import World
from lord_quant.halves import add_gram


class Moments(NamedTuple):
    """First and second moments of vectors with n features.

    Attributes:
        mean: Mean vector μ, with shape (n,).
        covariance: Centred second moment, divided by the number of tokens, with shape (n, n).
        num_tokens: How many vectors were seen.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    num_tokens: int


def merged(a: Moments, b: Moments) -> Moments:
    """Returns the moments of two sets of vectors together."""
    count = a.num_tokens + b.num_tokens
    shift, share = b.mean - a.mean, b.num_tokens / count
    covariance = (1 - share) * a.covariance + share * b.covariance + share * (1 - share) * torch.outer(shift, shift)
    return Moments(a.mean + share * shift, covariance, count)


class MomentAccumulator:
    """Accumulates moments batch by batch; two accumulators can be merged.

    Args:
        features: Number of features n.
        dtype: dtype of the statistics, float32 or float64.
        device: Where they live.
    """

    def __init__(self, features: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.num_tokens = 0
        self.mean = torch.zeros(features, dtype=dtype, device=device)
        self.scatter = torch.zeros(features, features, dtype=dtype, device=device)

    def update(self, batch: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Adds vectors.

        Args:
            batch: Activations with shape (..., n), any float dtype.
            mask: Optional, with shape (...): vectors where it is zero (padding) do not count.
        """
        rows = batch.detach().reshape(-1, batch.shape[-1])
        if mask is not None:
            rows = rows[mask.reshape(-1).to(device=rows.device, dtype=torch.bool)]
        if not len(rows):
            return
        rows = rows.to(device=self.mean.device, dtype=self.mean.dtype)
        mean = rows.mean(dim=0)
        self.merge_centred(len(rows), mean, rows - mean)

    def merge_centred(self, count: int, mean: torch.Tensor, centred: torch.Tensor) -> None:
        """Adds `count` vectors given as their mean and their deviations from it, with shape (count, n)."""
        add_gram(self.scatter, centred)
        self._shift(count, mean)

    def merge(self, other: MomentAccumulator) -> None:
        """Adds everything `other` has seen; `other` is left as it was."""
        if other.num_tokens:
            self.scatter += other.scatter.to(self.scatter)
            self._shift(other.num_tokens, other.mean.to(self.mean))

    def _shift(self, count: int, mean: torch.Tensor) -> None:
        """Counts vectors whose scatter about their own mean was added."""
        total = self.num_tokens + count
        delta = mean - self.mean
        if self.num_tokens:
            self.scatter.addr_(delta, delta, alpha=self.num_tokens * count / total)
        self.mean = self.mean + delta * (count / total)
        self.num_tokens = total

    def result(self) -> Moments:
        """Returns the moments seen so far.

        Raises:
            RuntimeError: Nothing was seen yet.
        """
        if not self.num_tokens:
            raise RuntimeError("no token was seen: moments are undefined")
        return Moments(self.mean.clone(), self.scatter / self.num_tokens, self.num_tokens)


class PairedMoments(NamedTuple):
    """Moments of a layer's inputs in two streams: x of the dense model and x′ of the compressed one, n features.

    On the dense side only W x matters, W the layer's weight (m, n); where m < n that may be seen instead, for less work.

    Attributes:
        dense_mean: μ = E[x], with shape (n,); or W μ, with shape (m,).
        mean: μ′ = E[x′], with shape (n,).
        covariance: H = E[(x′ − μ′)(x′ − μ′)ᵀ], with shape (n, n).
        cross: C = E[(x − μ)(x′ − μ′)ᵀ], with shape (n, n); or W C, with shape (m, n).
        num_tokens: How many pairs were seen.
        of_outputs: Whether W x was seen on the dense side.
    """

    dense_mean: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor
    cross: torch.Tensor
    num_tokens: int
    of_outputs: bool = False

    def drift(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns W (C − H), with shape (m, n)."""
        if self.of_outputs:
            return self.cross - weight @ self.covariance
        return weight @ (self.cross - self.covariance)

    def output_mean(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns W μ, with shape (m,)."""
        return self.dense_mean if self.of_outputs else weight @ self.dense_mean

    def to(self, dtype: torch.dtype) -> PairedMoments:
        """Returns the same in another dtype."""
        return self._replace(
            dense_mean=self.dense_mean.to(dtype),
            mean=self.mean.to(dtype),
            covariance=self.covariance.to(dtype),
            cross=self.cross.to(dtype),
        )

    def raw(self) -> PairedMoments:
        """Returns the same with second moments about zero; for layers whose bias may not absorb a mean."""
        return self._replace(
            covariance=self.covariance + torch.outer(self.mean, self.mean),
            cross=self.cross + torch.outer(self.dense_mean, self.mean),
        )


def pooled_alone(moments: Moments | None, world: World, device: torch.device) -> Moments:
    """Returns the moments of what all processes saw together of one stream, of which some may have seen nothing.

    Raises:
        RuntimeError: None has seen anything.
    """
    count = 0 if moments is None else moments.num_tokens
    total = sum(world.gather(count))
    if not total:
        raise RuntimeError("no token was seen: moments are undefined")
    own: dict[str, torch.Tensor] = {} if moments is None else {"mean": count / total * moments.mean}
    mean = world.totals(own, device)["mean"]
    if moments is not None:
        shift = moments.mean - mean
        own = {"covariance": count / total * (moments.covariance + torch.outer(shift, shift))}
    return Moments(mean, world.totals(own, device)["covariance"], total)


def pooled(moments: PairedMoments, world: World) -> PairedMoments:
    """Returns the moments of what all processes saw together; each gives those of its own tokens, of which it has some."""
    if world.size == 1:
        return moments
    total = sum(world.gather(moments.num_tokens))
    share = moments.num_tokens / total
    dense_mean, mean = world.total(share * moments.dense_mean), world.total(share * moments.mean)
    x, y = moments.dense_mean - dense_mean, moments.mean - mean
    return moments._replace(
        dense_mean=dense_mean,
        mean=mean,
        covariance=world.total(share * (moments.covariance + torch.outer(y, y))),
        cross=world.total(share * (moments.cross + torch.outer(x, y))),
        num_tokens=total,
    )


class PairedAccumulator:
    """Accumulates the moments of paired vectors batch by batch; the formula above, with another vector on the left for C.

    Args:
        features: Number of features n of x′.
        dtype: dtype of the statistics, float32 or float64.
        device: Where they live.
        dense_features: Number of features on the dense side; n unless said otherwise.
    """

    def __init__(
        self,
        features: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        dense_features: int | None = None,
    ) -> None:
        self.ours = MomentAccumulator(features, dtype, device)
        self.dense_mean = torch.zeros(dense_features or features, dtype=dtype, device=device)
        self.cross = torch.zeros(dense_features or features, features, dtype=dtype, device=device)

    def update(self, dense: torch.Tensor, ours: torch.Tensor) -> None:
        """Adds pairs, with shapes (..., dense_features) and (..., n), any float dtype, row by row of the same tokens."""
        x, y = (batch.detach().reshape(-1, batch.shape[-1]).to(self.cross) for batch in (dense, ours))
        if not len(x):
            return
        before, total = self.ours.num_tokens, self.ours.num_tokens + len(x)
        x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
        x_centred, y_centred = x - x_mean, y - y_mean
        self.cross.addmm_(x_centred.T, y_centred)
        if before:
            weight = before * len(x) / total
            self.cross.addr_(x_mean - self.dense_mean, y_mean - self.ours.mean, alpha=weight)
        self.dense_mean = self.dense_mean + (x_mean - self.dense_mean) * (len(x) / total)
        self.ours.merge_centred(len(x), y_mean, y_centred)

    def result(self) -> PairedMoments:
        """Returns the moments seen so far.

        Raises:
            RuntimeError: Nothing was seen yet.
        """
        mean, covariance, count = self.ours.result()
        return PairedMoments(self.dense_mean.clone(), mean, covariance, self.cross / count, count)
