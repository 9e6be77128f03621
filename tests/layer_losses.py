# SPDX-License-Identifier: Apache-2.0
"""Made-up layers and what they would lose, for menus and planners."""

from __future__ import annotations

import torch

from lord_quant.losses.probe import FactorNoise, LayerLoss
from lord_quant.targets import LinearSite


def layer_loss(smaller: int, seed: int, scale: float = 1.0) -> LayerLoss:
    """A plausible layer: a falling spectrum, four times less noise per bit."""
    generator = torch.Generator().manual_seed(seed)
    values = (
        scale
        * torch.logspace(0, -3, smaller, dtype=torch.float64)
        * (0.5 + torch.rand(smaller, generator=generator, dtype=torch.float64))
    )
    values = values.sort(descending=True).values
    tail = torch.cat((values.flip(0).cumsum(0).flip(0), values.new_zeros(1)))
    noise = 0.05 * float(tail[0])
    groups = {32: 0.85, 64: 1.0, 128: 1.12, 256: 1.25}
    shares = {2: 0.1, 3: 0.025, 4: 0.006}
    down = FactorNoise(smaller // 2, {bits: share / 4 for bits, share in shares.items()}, 1.1)
    up = FactorNoise(smaller // 2, shares, 0.8)
    dense, pivoted = {2: noise, 3: noise / 4.2, 4: noise / 17}, {"pivoted": 2.0, "column_pivoted": 1.8}
    return LayerLoss(tail, 1.5 * tail, dense, groups, 64, down, up, pivoted)


SITES = {
    site.name: site
    for site in (
        LinearSite("h.0.attn", 0, 256, 384, True),
        LinearSite("h.0.fc", 0, 256, 1024, False),
        LinearSite("h.0.proj", 0, 1024, 256, False),
        LinearSite("h.1.square", 1, 512, 512, True),
    )
}
LOSSES = {
    name: layer_loss(min(site.in_features, site.out_features), seed, 10.0**-seed)
    for seed, (name, site) in enumerate(SITES.items())
}
TOGETHER = [LinearSite(f"h.0.{name}", 0, 256, size, False) for name, size in (("q", 256), ("k", 128), ("v", 128))]
WHOLE = LinearSite("h.0.q", 0, 256, 512, False)
