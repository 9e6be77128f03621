# SPDX-License-Identifier: Apache-2.0
"""Puts low-rank layers where dense ones stood: one path for compressing and for loading.

Compressing passes factors; loading passes none and gets the same modules on the device of the layer they replace (meta,
inside `from_pretrained`), to be filled from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lord_quant.decompose import Factors
from lord_quant.errors import CheckpointError, RankError
from lord_quant.linalg import require_finite
from lord_quant.modules import Bottleneck, ColumnPivotedLinear, GroupedLinear, LowRankLinear, Ordered, PivotedLinear
from lord_quant.targets import dense_weight, is_linear


Standalone = LowRankLinear | PivotedLinear | ColumnPivotedLinear
FORM_MODULES: dict[str, type[Standalone]] = {
    "two_factor": LowRankLinear,
    "pivoted": PivotedLinear,
    "column_pivoted": ColumnPivotedLinear,
}
"""The module of each form that stands alone."""
GROUPED = "grouped"


def is_low_rank(module: nn.Module) -> bool:
    """Tells whether a module is one of ours, in any form."""
    return isinstance(module, Standalone | GroupedLinear)


def widen_orders(model: nn.Module) -> None:
    """Takes orders of a model whose tensors were just read from where they are stored to what they are in memory."""
    for module in model.modules():
        if isinstance(module, Ordered):
            module.widen()


def is_compressed(module: nn.Module) -> bool:
    """Tells whether a module is the work of an earlier run: low-rank, or packed by a host."""
    return is_low_rank(module) or isinstance(getattr(module, "qweight", None), torch.Tensor)


def replace_layer(model: nn.Module, name: str, factors: Factors) -> Standalone:
    """Replaces the linear layer at path `name` by its factors, in that layer's dtype and on its device.

    Raises:
        NumericsError: A factor is not finite in the layer's dtype; the layer is named.
    """
    dense = model.get_submodule(name)
    module: Any = _low_rank_like(dense, factors.form, factors.down.shape[0], factors.bias is not None)
    with torch.no_grad():
        module.down.weight.copy_(factors.down)
        module.up.weight.copy_(factors.up)
        for factor, bias in factors.biases().items():
            module.get_submodule(factor).bias.copy_(bias)
        if factors.pivots is not None:
            # Inputs are taken from their places, outputs go to theirs: that at pivots[i] is z[i], at others[j] up(z)[j].
            places = torch.cat((factors.pivots, factors.others()))
            module.order.copy_(places if factors.of_inputs else torch.argsort(places))
    for part, parameter in module.named_parameters():
        require_finite(parameter, f"factor {part} of {name!r} in {parameter.dtype}")
    model.set_submodule(name, module)
    return module


def replace_group(model: nn.Module, names: Sequence[str], factors: Factors) -> list[GroupedLinear]:
    """Replaces linear layers with one input by a shared `down` and their own parts of `up`.

    Args:
        model: The model; changed in place.
        names: Full paths of the layers; the first becomes the leader.
        factors: Of the layers on top of each other, rows of `up` in the order of `names`. Layers get the part of the bias
            that is theirs.

    Raises:
        NumericsError: A factor is not finite in the layers' dtype; the layer is named.
    """
    dense = [model.get_submodule(name) for name in names]
    sizes = [len(dense_weight(layer)) for layer in dense]
    biases = [None] * len(names) if factors.bias is None else factors.bias.split(sizes)
    modules = _grouped_like(dense, len(factors.down), [bias is not None for bias in biases])
    with torch.no_grad():
        modules[0].down.weight.copy_(factors.down)
        for module, up, bias in zip(modules, factors.up.split(sizes), biases, strict=True):
            module.up.weight.copy_(up)
            if bias is not None:
                module.up.bias.copy_(bias)
    named = dict(zip(names, modules, strict=True))
    for name, module in named.items():
        for part, parameter in module.named_parameters():
            require_finite(parameter, f"factor {part} of {name!r} in {parameter.dtype}")
    for name, module in named.items():
        model.set_submodule(name, module)
    return modules


def set_dense(model: nn.Module, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Gives the linear layer at path `name` another weight (out, in), and bias if it has one.

    Raises:
        NumericsError: They are not finite in the layer's dtype; the layer is named.
    """
    module: Any = model.get_submodule(name)
    with torch.no_grad():
        dense_weight(module).copy_(weight)
        if bias is not None and module.bias is not None:
            module.bias.copy_(bias)
    for part, parameter in module.named_parameters():
        require_finite(parameter, f"{part} of {name!r} in {parameter.dtype}")


def apply_rank_pattern(
    model: nn.Module,
    rank_pattern: Mapping[str, int],
    mean_correction: bool,
    form_pattern: Mapping[str, str] | None = None,
    group_pattern: Mapping[str, str] | None = None,
) -> None:
    """Replaces every layer of `rank_pattern` by empty low-rank layers of those ranks.

    Args:
        model: The dense skeleton; changed in place.
        rank_pattern: Rank by full module path.
        mean_correction: Whether every low-rank layer has a bias, or only those whose dense layer has one.
        form_pattern: Form by full module path, of those that are not `two_factor`.
        group_pattern: Leader by full module path, of grouped layers that use another's `down`.

    Raises:
        CheckpointError: A pattern names layers the model does not have, an unknown form, or groups that do not fit
            together (all are named).
        RankError: A rank exceeds what the layer's shape allows (all are named).
    """
    modules = dict(model.named_modules())
    missing = [name for name in rank_pattern if name not in modules or not is_linear(modules[name])]
    if missing:
        body = f"{getattr(model, 'base_model_prefix', '')}."
        if all(name.startswith(body) and name.removeprefix(body) in modules for name in rank_pattern):
            raise CheckpointError(
                f"{type(model).__name__} is the model without its head, and rank_pattern has the paths of the one with it; "
                "wanted AutoModelForCausalLM, or the class that was compressed (its `base_model` is what was asked for)"
            )
        raise CheckpointError(
            f"rank_pattern names layers that {type(model).__name__} does not have: {', '.join(missing)}; was the "
            "configuration edited, or is it another model's?"
        )
    forms, leaders = form_pattern or {}, group_pattern or {}
    legal = (*FORM_MODULES, GROUPED)
    odd = [f"{name}: {form!r}" for name, form in forms.items() if form not in legal or name not in rank_pattern]
    if odd:
        raise CheckpointError(
            f"form_pattern holds {', '.join(odd)}; wanted {' or '.join(legal)}, for layers of rank_pattern"
        )
    shapes = {name: dense_weight(modules[name]).shape for name in rank_pattern}
    groups: dict[str, list[str]] = {
        name: [name] for name in rank_pattern if forms.get(name) == GROUPED and name not in leaders
    }

    def alike(name: str) -> tuple[str, int, int]:  # what the layers of a group have in common
        return name.rpartition(".")[0], shapes[name][1], rank_pattern[name]

    problems = []
    for name, leader in leaders.items():
        known = isinstance(leader, str) and leader in groups and forms.get(name) == GROUPED
        if known and alike(name) == alike(leader):
            groups[leader].append(name)
        else:
            problems.append(f"{name}: {leader!r}, wanted a grouped layer beside it with its inputs and rank")
    problems += [f"{leader}: grouped with no other layer" for leader, members in groups.items() if len(members) == 1]
    if problems:
        raise CheckpointError("group_pattern does not fit together: " + "; ".join(problems))
    heights = {name: sum(shapes[member][0] for member in groups.get(leaders.get(name, name), [name])) for name in shapes}
    for name, rank in rank_pattern.items():
        outputs, inputs = heights[name], shapes[name][1]
        limit = min(outputs - (forms.get(name) == "pivoted"), inputs - (forms.get(name) == "column_pivoted"))
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= limit:
            problems.append(f"{name}: rank {rank!r}, wanted 1 to {limit}")
    if problems:
        raise RankError("illegal ranks in the checkpoint's rank_pattern: " + "; ".join(problems))
    for name, rank in rank_pattern.items():
        dense = modules[name]
        if name in groups:
            members = groups[name]
            biased = [mean_correction or modules[member].bias is not None for member in members]
            made = _grouped_like([modules[member] for member in members], rank, biased)
            for member, module in zip(members, made, strict=True):
                model.set_submodule(member, module)
        elif name not in leaders:
            form = forms.get(name, "two_factor")
            model.set_submodule(name, _low_rank_like(dense, form, rank, mean_correction or dense.bias is not None))


def _low_rank_like(dense: nn.Module, form: str, rank: int, bias: bool) -> Standalone:
    weight = dense_weight(dense)
    out_features, in_features = weight.shape
    module = FORM_MODULES[form](in_features, rank, out_features, bias, device=weight.device, dtype=weight.dtype)
    return module.train(dense.training)


def _grouped_like(dense: Sequence[nn.Module], rank: int, biased: Sequence[bool]) -> list[GroupedLinear]:
    bottleneck, modules = Bottleneck(), list[GroupedLinear]()
    for layer, bias in zip(dense, biased, strict=True):
        weight = dense_weight(layer)
        out_features, in_features = weight.shape
        inputs = None if modules else in_features
        module = GroupedLinear(bottleneck, inputs, rank, out_features, bias, device=weight.device, dtype=weight.dtype)
        modules.append(module.train(layer.training))
    return modules
