# SPDX-License-Identifier: Apache-2.0
"""The flags that `plan` and `quantize` share, and how they lie over a configuration file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lord_quant.budget_config import BUDGETS


if TYPE_CHECKING:
    from lord_quant.config import LordConfig

RANK_CHOICES = ("rank_ratio", "param_ratio", "rank_pattern")
PACKING = ("bits", "group_size", "bits_pattern", "group_size_pattern")
BESIDE_BUDGET = (*RANK_CHOICES, "plan", "force_rank")
"""Flags that make no sense beside a budget."""

# Flag (as attribute) → where it lies in the configuration.
PLACES: dict[str, tuple[str, ...]] = {
    "model": ("model",),
    "output": ("output",),
    "stack": ("stack",),
    "device": ("device",),
    "dtype": ("dtype",),
    "rank_ratio": ("lowrank", "rank_ratio"),
    "param_ratio": ("lowrank", "param_ratio"),
    "rank_pattern": ("lowrank", "rank_pattern"),
    "targets": ("lowrank", "targets"),
    "ignore": ("lowrank", "ignore"),
    "form": ("lowrank", "form"),
    "force_rank": ("lowrank", "force_rank"),
    "float64": ("lowrank", "float64"),
    "bits": ("gptq", "bits"),
    "group_size": ("gptq", "group_size"),
    "sym": ("gptq", "sym"),
    "desc_act": ("gptq", "desc_act"),
    "damp_percent": ("gptq", "damp_percent"),
    "mse": ("gptq", "mse"),
    "anchor": ("joint", "anchor"),
    "residual": ("joint", "residual"),
    "rotate": ("joint", "rotate"),
    "refit": ("joint", "refit"),
    "order": ("joint", "order"),
    "deflate": ("joint", "deflate"),
    "refine": ("joint", "refine"),
    "two_sided": ("joint", "two_sided"),
    "fisher": ("joint", "fisher"),
    "fisher_samples": ("joint", "fisher_samples"),
    "dataset": ("calibration", "dataset"),
    "text_key": ("calibration", "text_key"),
    "num_samples": ("calibration", "num_samples"),
    "seq_len": ("calibration", "seq_len"),
    "seed": ("calibration", "seed"),
    "batch_size": ("calibration", "batch_size"),
    "target_bpw": ("budget", "target_bpw"),
    "target_size": ("budget", "target_size"),
    "max_loss": ("budget", "max_loss"),
    "min_param_ratio": ("budget", "min_param_ratio"),
    "statistics": ("budget", "statistics"),
}


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name the model and the configuration file. Flags not given are absent: a file's values stand."""
    unset: Any = argparse.SUPPRESS
    run = parser.add_argument_group("run")
    run.add_argument("--model", default=unset, metavar="DIR", help="folder or hub name of the dense model")
    run.add_argument("--config", metavar="FILE", help="YAML configuration; flags given beside it win")
    run.add_argument("--dtype", default=unset, help="dtype float tensors are stored in: auto, float32, bfloat16, float16")


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say what becomes of which layer of which model."""
    unset: Any = argparse.SUPPRESS
    add_source_flags(parser)
    ranks = parser.add_argument_group("decomposition (choose one of the first three; --rank-ratio 1 quantizes only)")
    ranks.add_argument("--rank-ratio", default=unset, type=float, metavar="R", help="fraction of min(in, out) kept: 0.75")
    ranks.add_argument("--param-ratio", default=unset, type=float, metavar="P", help="fraction of weights kept: 0.8")
    ranks.add_argument(
        "--rank-pattern", default=unset, nargs="+", metavar="PATTERN=RANK", help="explicit ranks; other layers stay dense"
    )
    ranks.add_argument(
        "--targets", default=unset, nargs="+", metavar="PATTERN",
        help="layers to decompose: all (default), attention, mlp, a name's end, a shell pattern, re:REGEX",
    )  # fmt: skip
    ranks.add_argument("--ignore", default=unset, nargs="+", metavar="PATTERN", help="patterns taken away from the targets")
    ranks.add_argument(
        "--form", default=unset,
        help="two_factor (default); pivoted, column_pivoted: rank*rank weights fewer, the latter for layers with more "
        "outputs than inputs; grouped: layers with one input share `down`",
    )  # fmt: skip
    ranks.add_argument(
        "--force-rank", default=unset, action=argparse.BooleanOptionalAction, help="decompose even where that enlarges"
    )
    bits = parser.add_argument_group("quantization (every linear layer of the blocks, decomposed or not)")
    bits.add_argument("--bits", default=unset, type=int, metavar="B", help="4 (default), 8, 3, 2; 16: float factors")
    bits.add_argument(
        "--group-size", default=unset, type=int, metavar="G",
        help="inputs per scale: 32, 64, 128 or 256 (default: the largest up to 128 that suits the shapes)",
    )  # fmt: skip
    bits.add_argument("--sym", default=unset, action=argparse.BooleanOptionalAction, help="symmetric grids (--no-sym)")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say on what data and where a run computes."""
    unset: Any = argparse.SUPPRESS
    bits = parser.add_argument_group("solver")
    bits.add_argument(
        "--desc-act", default=unset, action=argparse.BooleanOptionalAction, help="quantize by decreasing activation"
    )
    bits.add_argument("--damp-percent", default=unset, type=float, metavar="D", help="Hessian damping, a fraction (0.01)")
    bits.add_argument(
        "--mse", default=unset, type=float, metavar="P", help="exponent of the search for scales (2); 0: none"
    )
    bits.add_argument(
        "--float64",
        default=unset,
        action=argparse.BooleanOptionalAction,
        help="statistics and eigendecompositions in float64",
    )
    stack = parser.add_argument_group("stack (the switches are the joint stack's ideas, all on; for studies)")
    stack.add_argument(
        "--stack", default=unset, help="joint (default), or naive: decompose in float, then Optimum's GPTQ unmodified"
    )
    ideas = {
        "anchor": "aim at the dense model's outputs from the compressed model's inputs",
        "residual": "where a layer writes to the residual stream, aim at the dense model's stream",
        "rotate": "rotate the bottleneck",
        "refit": "give the second factor its optimum for the quantized first",
        "deflate": "quantize down modulo what the refit absorbs",
        "two-sided": "let outputs take back what others have missed",
        "fisher": "work in the metric of the model's loss, from one backward pass",
    }
    for idea, meaning in ideas.items():
        stack.add_argument(f"--{idea}", default=unset, action=argparse.BooleanOptionalAction, help=meaning)
    stack.add_argument("--order", default=unset, help="first factor: auto (default), down_first, up_first")
    stack.add_argument("--refine", default=unset, type=int, metavar="N", help="sweeps over scales and codes (2); 0: none")
    stack.add_argument(
        "--fisher-samples",
        default=unset,
        type=int,
        metavar="N",
        help="windows of the backward pass (8; for a budget what holds 65536 tokens)",
    )
    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--dataset", default=unset, metavar="DATA",
        help="text, jsonl or parquet file, folder of source files, hub name, or python-stdlib (default)",
    )  # fmt: skip
    data.add_argument("--text-key", default=unset, metavar="KEY", help="field of the text in structured data (text)")
    data.add_argument("--num-samples", default=unset, type=int, metavar="N", help="token windows (default 128)")
    data.add_argument("--seq-len", default=unset, type=int, metavar="L", help="tokens per window (context, at most 2048)")
    data.add_argument("--seed", default=unset, type=int, metavar="S", help="sampling seed (default 0)")
    data.add_argument(
        "--batch-size", default=unset, type=int, metavar="N", help="windows per forward pass (4, fewer if long)"
    )
    data.add_argument("--device", default=unset, help="auto (default), cpu, cuda, cuda:1, ...")


def add_log_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that names a log, for `Progress`."""
    parser.add_argument(
        "--log", metavar="FILE", help="add to a log: a line of JSON per phase, layer and block, with ETA and memory"
    )


def settings_from(args: argparse.Namespace) -> dict[str, Any]:
    """Returns nested settings as given: a file's, a plan's over them, the flags' over both.

    Ranks, a plan and a budget exclude each other: what flags give replaces what the file has.

    Raises:
        ConfigError: A file cannot be read, flags exclude each other, or what restricts a budget stands without one.
        BudgetError: The plan was made for another model.
    """
    from lord_quant.config import merge, read_yaml
    from lord_quant.errors import ConfigError

    given = vars(args)
    values = read_yaml(given["config"]) if given.get("config") is not None else {}
    budget, beside = [name in given for name in BUDGETS], [name for name in BESIDE_BUDGET if given.get(name) is not None]
    if any(budget) and beside:
        raise ConfigError(f"a budget and {_flags(beside)} are given; wanted one or the other")
    if beside:
        values = {key: value for key, value in values.items() if key != "budget"}
    if given.get("plan") is not None:
        values = _with_plan(values, given)
    if any(budget) or any(name in given for name in RANK_CHOICES):
        values = without(values, lowrank=RANK_CHOICES, budget=BUDGETS)
    for flag, place in PLACES.items():
        if flag in given:
            value: Any = _pairs(given[flag]) if flag == "rank_pattern" else given[flag]
            for key in reversed(place):
                value = {key: value}
            values = merge(values, value)
    restricting = [name for name in ("min_param_ratio", "statistics") if name in given]
    if restricting and not any(name in values["budget"] for name in BUDGETS):
        raise ConfigError(f"{_flags(restricting)} is given without a budget; wanted {_flags(BUDGETS, 'or')}")
    return values


def config_from(args: argparse.Namespace) -> LordConfig:
    """Builds the configuration of a run whose ranks are given.

    Raises:
        ConfigError: Anything unknown or illegal.
    """
    from lord_quant.config import LordConfig

    return LordConfig.from_dict(settings_from(args))


def _with_plan(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Lays a plan file's sections over a configuration's; its ranks, bits and group sizes replace them."""
    from lord_quant.budgets.plan_file import read_plan
    from lord_quant.config import merge
    from lord_quant.errors import ConfigError

    beside = [name for name in (*RANK_CHOICES, "bits", "group_size", "form") if name in given]
    if beside:
        raise ConfigError(f"--plan and {_flags(beside)} are given; wanted one or the other: edit the plan")
    model = given.get("model", values.get("model"))
    if not model or not isinstance(model, str):
        raise ConfigError(f"model is {model or 'not given'!s}; wanted a folder or a hub name, as text")
    plan, joint = read_plan(given["plan"], model), values.get("joint")
    if isinstance(joint, dict) and joint.get("fisher_samples"):
        plan = without(plan, joint=("fisher_samples",))  # the run's own
    return merge(without(values, lowrank=(*RANK_CHOICES, "form", "form_pattern"), gptq=PACKING), plan)


def without(values: dict[str, Any], **keys: Sequence[str]) -> dict[str, Any]:
    """Returns settings without some keys, given by section."""
    kept = dict(values)
    for section, dropped in keys.items():
        if isinstance(kept.get(section), dict):
            kept[section] = {key: value for key, value in kept[section].items() if key not in dropped}
    return kept


def _flags(names: Sequence[str], last: str = "") -> str:
    """Renders names as flags: `--a, --b`, or with a word before the last one."""
    flags = [f"--{name.replace('_', '-')}" for name in names]
    return f"{', '.join(flags[:-1])} {last} {flags[-1]}" if last else ", ".join(flags)


def _pairs(items: list[str]) -> dict[str, int]:
    from lord_quant.errors import ConfigError

    pairs: dict[str, int] = {}
    for item in items:
        pattern, _, rank = item.rpartition("=")
        if not pattern or not (rank.isascii() and rank.isdigit()) or len(rank) > 9:
            raise ConfigError(f"--rank-pattern {item[:100]!r}; wanted PATTERN=RANK, such as mlp.c_fc=192")
        if pattern in pairs:
            raise ConfigError(f"--rank-pattern names {pattern!r} twice: {pairs[pattern]} and {rank}; wanted one rank")
        pairs[pattern] = int(rank)
    return pairs
