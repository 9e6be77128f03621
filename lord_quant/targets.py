# SPDX-License-Identifier: Apache-2.0
"""Where the linear layers of a causal language model are, by module path: blocks, layers, selection by pattern.

Works on any decoder whose transformer blocks sit in one `nn.ModuleList`. Only layers inside blocks are ever considered;
embeddings and the language-model head are outside and stay as they are.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lord_quant.errors import TargetError, nearest_name


ATTENTION = re.compile(r"(^|[._])(self_)?(attn|attention)([._]|$)")
MLP = re.compile(r"(^|[._])(mlp|ffn|feed_forward|fc\d?|fc_in|fc_out|dense_h_to_4h|dense_4h_to_h)([._]|$)")
PRESETS = ("all", "attention", "mlp")
REGEX_PREFIX = "re:"
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of layers that are fed the same input where they stand side by side. A run finds out if it is not so."""


class Blocks(NamedTuple):
    """The transformer blocks: their path in the model and the modules in order."""

    path: str
    modules: list[nn.Module]


class LinearSite(NamedTuple):
    """One linear layer of a block.

    Attributes:
        name: Full module path.
        block: Index of its transformer block.
        in_features: Input features.
        out_features: Output features.
        has_bias: Whether it has a bias.
    """

    name: str
    block: int
    in_features: int
    out_features: int
    has_bias: bool


def is_linear(module: nn.Module) -> bool:
    """Tells whether a module is a layer we handle: exactly `nn.Linear` (a subclass may compute otherwise) or `Conv1D`."""
    return type(module) is nn.Linear or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Tells whether a module is transformers' `Conv1D`, whose weight is stored transposed, (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def dense_weight(module: nn.Module) -> torch.Tensor:
    """Returns the weight of a linear layer with shape (out_features, in_features); a view, not a copy."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_conv1d(module) else weight


def dense_bias(module: nn.Module) -> torch.Tensor | None:
    """Returns the bias of a linear layer with shape (out_features,), or None; a view, not a copy."""
    return None if module.bias is None else module.get_parameter("bias").detach()


def find_blocks(model: nn.Module) -> Blocks:
    """Finds the transformer blocks: the outermost `nn.ModuleList` that holds the most linear layers.

    Raises:
        TargetError: There is none.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            linears = sum(is_linear(child) for child in module.modules())
            if linears and (best is None or linears > best[0]):
                best = (linears, path, module)
    if best is None:
        kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
        derived = sorted(kind.__name__ for kind in kinds - {nn.Linear})
        hint = f"; {', '.join(derived)} may compute something else than nn.Linear, and is left alone" if derived else ""
        raise TargetError(f"{type(model).__name__} holds no list of transformer blocks with linear layers{hint}")
    return Blocks(best[1], list(best[2]))


def find_linears(model: nn.Module) -> list[LinearSite]:
    """Lists the linear layers of all blocks in registration order.

    Raises:
        TargetError: The model has no transformer blocks.
    """
    blocks = find_blocks(model)
    sites = []
    for index, block in enumerate(blocks.modules):
        for path, module in block.named_modules():
            if is_linear(module):
                out_features, in_features = dense_weight(module).shape
                name = f"{blocks.path}.{index}.{path}"
                sites.append(LinearSite(name, index, in_features, out_features, module.bias is not None))
    return sites


def layer_type(site: LinearSite) -> str:
    """Returns a layer's path within its block, such as ``attn.c_attn``."""
    return site.name.split(f".{site.block}.", 1)[-1]


def select(sites: Sequence[LinearSite], targets: Sequence[str], ignore: Sequence[str] = ()) -> frozenset[str]:
    """Selects layers by preset and pattern.

    A pattern is a preset (`all`, `attention`, `mlp`), a regular expression after ``re:`` (searched in the full path), a
    shell pattern (matched against the full path), or the end of a path (`q_proj`, `mlp.c_fc`).

    Returns:
        The full paths selected by any of `targets` and by none of `ignore`.

    Raises:
        TargetError: A pattern matches nothing (all such patterns are named), or nothing is left.
    """
    names = [site.name for site in sites]
    problems, chosen, ignored = [], set[str](), set[str]()
    for patterns, into, label in ((targets, chosen, "targets"), (ignore, ignored, "ignore")):
        for pattern in patterns:
            hits = _matches(pattern, names)
            into |= hits
            if not hits:
                problems.append(f"  {label} {pattern!r} matches no layer{_suggest(pattern, names)}")
    if problems:
        raise TargetError("\n".join(["a pattern matches nothing:", *problems]))
    if not chosen - ignored:
        raise TargetError(f"ignore {list(ignore)} leaves nothing of targets {list(targets)}")
    return frozenset(chosen - ignored)


def find_matching(pattern: str, sites: Sequence[LinearSite]) -> set[str]:
    """Returns the full paths that one pattern matches.

    Raises:
        TargetError: None does.
    """
    hits = matching(pattern, sites)
    if not hits:
        raise TargetError(f"pattern {pattern!r} matches no layer{_suggest(pattern, [site.name for site in sites])}")
    return hits


def matching(pattern: str, sites: Sequence[LinearSite]) -> set[str]:
    """Returns the full paths that one pattern matches, if any.

    Raises:
        TargetError: It is no pattern.
    """
    return _matches(pattern, [site.name for site in sites])


def _matches(pattern: str, names: Iterable[str]) -> set[str]:
    if pattern in PRESETS:
        kind = {"attention": ATTENTION, "mlp": MLP}.get(pattern)
        return {name for name in names if kind is None or kind.search(name)}
    if pattern.startswith(REGEX_PREFIX):
        try:
            regex = re.compile(pattern.removeprefix(REGEX_PREFIX))
        except re.error as error:
            raise TargetError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        return {name for name in names if regex.search(name)}
    return {n for n in names if n == pattern or n.endswith(f".{pattern}") or fnmatch.fnmatchcase(n, pattern)}


def _suggest(pattern: str, names: Iterable[str]) -> str:
    suffixes = {name.rpartition(".")[2] for name in names}
    return nearest_name(pattern, [*PRESETS, *sorted(suffixes)]) or f"; layers end in {', '.join(sorted(suffixes))}"


def siblings(sites: Sequence[LinearSite]) -> list[list[LinearSite]]:
    """Lists the layers that are known by name to be fed the same input, two or more together, in registration order."""
    families: dict[tuple[str, tuple[str, ...], int], list[LinearSite]] = {}
    for site in sites:
        parent, _, leaf = site.name.rpartition(".")
        for family in SIBLINGS:
            if leaf in family:
                families.setdefault((parent, family, site.in_features), []).append(site)
    return [together for together in families.values() if len(together) > 1]
