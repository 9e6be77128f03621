# SPDX-License-Identifier: Apache-2.0
"""A plan as a file: YAML that a person can edit, holding sections of a configuration and where they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lord_quant.budgets.budget import PLANNED, require_same
from lord_quant.budgets.menu import Menu
from lord_quant.checkpoint import REPORT_NAME, atomic_file
from lord_quant.config import LordConfig, read_yaml
from lord_quant.errors import ConfigError
from lord_quant.files.digests import digest_of_file, digest_of_values
from lord_quant.files.reading import parse_json
from lord_quant.losses.sensing import digest_of
from lord_quant.runs.execution import made_of
from lord_quant.runs.pipeline import Job


CHOSEN = {
    "lowrank": ("rank_ratio", "rank_pattern", "form_pattern", "mean_correction"),
    "gptq": ("bits", "group_size", "bits_pattern", "group_size_pattern"),
    "joint": ("fisher", "fisher_samples"),
}
"""What a plan sets, by section."""
HEAD = """\
# A plan: run it with `optimum-cli lord quantize --plan`, edit it as you like; --dry-run says what that gives.
# lowrank: rank_pattern is rank by layer, a multiple of the group size of `up`; layers that are not named stay dense.
#   form_pattern is their form: two_factor, pivoted, column_pivoted or grouped.
# gptq: bits (8, 4, 3, 2) and group_size (32, 64, 128, 256) are those of all layers but those the patterns name;
#   NAME.down and NAME.up are the factors of a layer.
# planned: what was predicted before anybody edited; it changes nothing. The report of a run repeats it if nobody did.
"""
UNEDITED = "plan_sha256"
"""What a plan file calls the digest of all else in it."""


def write_plan(settings: Mapping[str, Any], path: str | Path) -> None:
    """Writes a plan as YAML; it appears by one rename.

    Raises:
        OutputError: It cannot be written.
    """
    with atomic_file(path) as staging:
        about = dict(settings[PLANNED]) | {UNEDITED: digest_of_values(settings)}
        content = dict(settings) | {PLANNED: about}
        staging.write_text(HEAD + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def is_plan(path: Path) -> bool:
    """Tells whether a file looks like a plan."""
    try:
        return PLANNED in read_yaml(path)
    except ConfigError:
        return False


def apply_plan(config: LordConfig, settings: Mapping[str, Any]) -> LordConfig:
    """Returns a run with the ranks, bits and group sizes of a plan instead of a budget; everything else stays.

    The windows of its backward pass are the plan's too, unless the run has its own.
    """
    lowrank = {"rank_ratio": None, "param_ratio": None, "rank_pattern": None, "form_pattern": None} | settings["lowrank"]
    joint = {} if config.joint.fisher_samples else settings.get("joint", {})
    return dataclasses.replace(
        config,
        lowrank=dataclasses.replace(config.lowrank, **lowrank),
        gptq=dataclasses.replace(config.gptq, **settings["gptq"]),
        joint=dataclasses.replace(config.joint, **joint),
        budget=None,
    )


def read_plan(path: str | Path, model: str) -> dict[str, Any]:
    """Reads a plan file and returns its sections of a configuration.

    Raises:
        ConfigError: It cannot be read or is no plan.
        BudgetError: It was made for another model.
    """
    values = read_yaml(path)
    about = values.pop(PLANNED, None)
    if not isinstance(about, Mapping) or not set(values) <= {"lowrank", "gptq", "joint"}:
        raise ConfigError(f"{str(path)!r} is no plan; wanted the sections {PLANNED}, lowrank, gptq and joint")
    way = f"; its sections but {PLANNED!r} make a --config for any model"
    require_same(digest_of(model), about.get("model_sha256"), f"plan {str(path)!r} was", model, way)
    return values


def asked_of(job: Job, config: LordConfig, menu: Menu, processes: int) -> str:
    """Returns a SHA-256 of all that a plan for a budget depends on.

    Args:
        job: The run prepared for dense layers.
        config: The run with its budget.
        menu: What the plan is chosen from.
        processes: How many run it together.

    Raises:
        CheckpointError: The statistics that its budget names cannot be read.
    """
    made = made_of(dataclasses.replace(job, config=config), processes) | {"menu": dataclasses.asdict(menu)}
    if config.budget is not None:
        made["budget"] = config.budget.asked
        if config.budget.statistics:
            made["statistics_sha256"] = digest_of_file(config.budget.statistics, "statistics")
    return digest_of_values(made)


def chosen_before(output: Path, asked: str) -> dict[str, Any] | None:
    """Returns the plan that a finished run chose for the same budget, or None if none wrote this folder.

    Args:
        output: A model folder.
        asked: What its report has to say that the plan depends on, see `asked_of`.
    """
    try:
        report = parse_json((output / REPORT_NAME).read_text(encoding="utf-8"))
        if report["planned"]["asked_sha256"] != asked:
            return None
        return {section: {name: report["config"][section][name] for name in names} for section, names in CHOSEN.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def origin_of_plan(path: str | Path) -> Mapping[str, Any]:
    """Returns what a plan file says of where it comes from: the `origin` of its statistics, and what it predicts."""
    return read_yaml(path).get(PLANNED) or {}


def predicted_for(path: str | Path, config: LordConfig) -> dict[str, Any] | None:
    """Returns what a plan file predicts of a run; None if the file was edited or the run does not do all that it says."""
    values = read_yaml(path)
    about = dict(values[PLANNED])
    unedited = about.pop(UNEDITED, None)
    try:
        same = unedited == digest_of_values(values | {PLANNED: about})
    except TypeError:  # a date, or whatever else YAML may hold
        return None
    run = config.to_dict()
    obeyed = all(run[section].get(name) == value for section in CHOSEN for name, value in values.get(section, {}).items())
    return about if same and obeyed else None
