# SPDX-License-Identifier: Apache-2.0
"""Layers by their shapes, fixed and drawn, and plans over them."""

from hypothesis import strategies as st

from lord_quant.config import GptqConfig, LowrankConfig
from lord_quant.plan import Plan, build_plan
from lord_quant.targets import LinearSite


def site(name: str, inputs: int, outputs: int, bias: bool = False, block: int = 0) -> LinearSite:
    return LinearSite(f"h.{block}.{name}", block, inputs, outputs, bias)


# A GPT-2-like block of width 256 (biases) and a Llama-like one (none).
WITH_BIAS = [
    site("attn.c_attn", 256, 768, True),
    site("attn.c_proj", 256, 256, True),
    site("mlp.c_fc", 256, 1024, True),
    site("mlp.c_proj", 1024, 256, True),
]
WITHOUT_BIAS = [item._replace(has_bias=False) for item in WITH_BIAS]


def plan(sites: list[LinearSite], itemsize: int = 4, gptq: GptqConfig | None = None, **lowrank: object) -> Plan:
    return build_plan(
        sites, LowrankConfig(**lowrank), gptq or GptqConfig(group_size=32), itemsize=itemsize, other_bytes=1000
    )


dimension = st.integers(1, 16).map(lambda k: 32 * k)
shapes = st.lists(st.tuples(dimension, dimension, st.booleans()), min_size=1, max_size=5)
ratio = st.floats(0, 1, exclude_min=True)
ways = st.sampled_from(["rank_ratio", "param_ratio"])


def sites_of(drawn: list[tuple[int, int, bool]], group: int) -> list[LinearSite]:
    return [site(f"linear{i}", max(group, n // group * group), m, bias, i) for i, (n, m, bias) in enumerate(drawn)]
