# SPDX-License-Identifier: Apache-2.0
"""From a budget to the settings of a run: the sensitivity pass, the choice, and the plan as a file a person can edit."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lord_quant import planner
from lord_quant.budget_config import BudgetConfig
from lord_quant.calibration import TokenWindows, windows_at_once
from lord_quant.checkpoint import whole_path
from lord_quant.claim import sensed_beside, sensing_beside
from lord_quant.config import FLOAT_BITS, LordConfig
from lord_quant.errors import BudgetError, CheckpointError, OutputError
from lord_quant.estimate import seconds_of
from lord_quant.headers import weight_files
from lord_quant.menu import DENSE, Choice, Menu, single
from lord_quant.operations import Workload, total
from lord_quant.packable import packable_of
from lord_quant.pipeline import Job, fisher_windows, in_batches, plan_model, prepare
from lord_quant.planner import Allocation
from lord_quant.probe_work import count_sensing
from lord_quant.progress import Progress
from lord_quant.residency import RESIDENT, Residency
from lord_quant.sensitivity import Expansion
from lord_quant.source import build_skeleton, commit_of, inspect_source, load_model, read_config, stream_source
from lord_quant.statistics import SoFar, Statistics, load_statistics, measure_statistics, model_digest, save_statistics
from lord_quant.targets import find_linears, select
from lord_quant.version import __version__


SENSED_TOKENS = 2**16
"""Tokens of the backward pass of a sensitivity pass: G and slopes of few fit these more than the text they stand for."""
PLANNED = "planned"
"""Section of a plan file that says where it comes from; the others are those of a configuration."""


def unplanned(config: LordConfig) -> LordConfig:
    """Returns a run without a budget and without what one chooses: dense layers, 4 bits."""
    lowrank = dataclasses.replace(config.lowrank, rank_ratio=1, param_ratio=None, rank_pattern=None, form_pattern=None)
    gptq = dataclasses.replace(config.gptq, bits=4, group_size=None, bits_pattern=None, group_size_pattern=None)
    return dataclasses.replace(config, lowrank=lowrank, gptq=gptq, budget=None)


def statistics_of(
    config: LordConfig, progress: Progress | None = None, *, keep: bool = False, again: bool = False
) -> Statistics:
    """Reads the statistics that a run's budget names; measures them where it names none.

    Args:
        config: The run.
        progress: Where it is told how far the pass is.
        keep: Keep them beside the run's output until it is finished, and use those of one that was cut off.
        again: Measure them whatever is kept.

    Raises:
        LordError: Whatever is wrong with the file, the model or the calibration.
    """
    if config.budget is not None and config.budget.statistics:
        return load_statistics(config.budget.statistics)
    if not keep or config.output is None:
        return sense(config, progress)
    job = dense_job(config)
    output, pass_sha256 = whole_path(config.output), told_apart(config, job)
    kept, so_far = sensed_beside(output, pass_sha256), sensing_beside(output, pass_sha256)
    if not again:
        with contextlib.suppress(CheckpointError):  # there is none, or it is spoilt
            return load_statistics(kept)
    statistics = sense(config, progress, job, so_far)
    with contextlib.suppress(OSError, OutputError):  # it serves a run that is cut off; this one has what it needs
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_statistics(statistics, kept)
        so_far.unlink(missing_ok=True)
    return statistics


def dense_job(config: LordConfig) -> Job:
    """Prepares the run of a sensitivity pass: layers stay dense, nothing is written.

    Raises:
        LordError: Whatever is wrong with model or calibration.
    """
    return prepare(dataclasses.replace(unplanned(config), output=None))


def told_apart(config: LordConfig, job: Job) -> str:
    """Returns a SHA-256 of all that statistics depend on, and of what they do not but for the budget."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("output", "model", "budget")}
    made_of = [settings, digest_of(config.model), job.windows.sha256, __version__]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def sense(
    config: LordConfig, progress: Progress | None = None, job: Job | None = None, so_far: Path | None = None
) -> Statistics:
    """Runs the sensitivity pass of a model.

    Args:
        config: Model, calibration and solver; ranks and bits in it do not matter.
        progress: Where it is told how far the pass is.
        job: The run prepared for dense layers, where it is already.
        so_far: Where what is measured waits for a pass that goes on; whoever has it all removes the file.

    Raises:
        LordError: Whatever is wrong with model or calibration.
    """
    job = job or dense_job(config)
    streamed = stream_source(job.source, job.device)
    model, residency = streamed or (load_model(job.source, job.device), RESIDENT)
    return sense_model(model, job.windows, config, residency, progress, so_far=so_far)


def sense_model(
    model: torch.nn.Module,
    windows: TokenWindows,
    config: LordConfig,
    residency: Residency = RESIDENT,
    progress: Progress | None = None,
    commit: str | None = None,
    so_far: Path | None = None,
) -> Statistics:
    """Runs the sensitivity pass of a dense model, which is left as it was.

    Args:
        model: The model.
        windows: Calibration tokens.
        config: Where the model came from, and the solver; ranks and bits in it do not matter.
        residency: Which blocks have their weights.
        progress: Where it is told how far the pass is.
        commit: That of a hub model; None is the one its name stands for.
        so_far: Where what is measured waits, as for `sense`.
    """
    samples = _sensed(windows, config)
    config = dataclasses.replace(config, joint=dataclasses.replace(config.joint, fisher_samples=samples))
    expansions, seed, before = None, config.calibration.seed, SoFar(so_far, _origin(config, windows, commit))
    dtype = torch.float64 if config.lowrank.float64 else torch.float32
    if config.joint.fisher:
        passed = fisher_windows(windows, config)
        one, other = in_batches(passed[::2]), in_batches(passed[1::2]) or in_batches(passed)
        asked: dict[str, Any] = {"names": before.probed_layers(model), "dtype": dtype}
        expansions = (
            Expansion.measure(model, one, seed=2 * seed, **asked, residency=residency, progress=progress),
            Expansion.measure(model, other, seed=2 * seed + 1, **asked, residency=residency, progress=progress),
        )
    # By windows, so that both passes cut the text alike however they batch it.
    size = config.calibration.batch_size or windows_at_once(windows.input_ids.shape[1])
    return measure_statistics(
        model,
        (in_batches(windows.input_ids[::2], size), in_batches(windows.input_ids[1::2], size)),
        expansions,
        gptq=unplanned(config).gptq,
        options=config.joint,
        so_far=before,
        mean_correction=config.lowrank.mean_correction,
        seed=seed,
        dtype=dtype,
        residency=residency,
        progress=progress,
    )


def _sensed(windows: TokenWindows, config: LordConfig) -> int:
    """Returns how many windows go through the backward pass."""
    return min(config.joint.fisher_samples or sensed_samples(windows.input_ids.shape[1]), len(windows.input_ids))


def sensing_seconds(job: Job) -> float:
    """Predicts how long the sensitivity pass of a run takes, in seconds, as roughly as `estimate.py` does."""
    head, seq_len = build_skeleton(job.source).get_output_embeddings(), job.windows.input_ids.shape[1]
    load = Workload(
        num_tokens=job.windows.num_tokens,
        itemsize=job.source.dtype.itemsize,
        joint=True,
        seq_len=seq_len,
        fisher_tokens=_sensed(job.windows, job.config) * seq_len if job.config.joint.fisher else 0,
        head_weights=0 if head is None else head.weight.numel(),
    )
    return seconds_of(total(count_sensing(job.plan, load).values()), job.device)


def sensed_samples(seq_len: int) -> int:
    """Returns how many windows the backward pass of a sensitivity pass takes if nobody says so, and there are as many."""
    return -(-SENSED_TOKENS // seq_len)


def digest_of(model: str, commit: str | None = None) -> str:
    """Returns what tells a model apart from others: see `model_digest`; a hub model is told by name and commit.

    Args:
        model: Folder or hub name.
        commit: Of a hub model; None is that which its name stands for now.

    Raises:
        ModelError: There is no such model, or its configuration cannot be read.
    """
    path, config = read_config(model, commit)
    if Path(path).is_dir():
        return model_digest(config.to_dict(), weight_files(path))
    named = {"hub": path, "commit": commit or commit_of(path)}
    return model_digest(config.to_dict() | named, [])


def _origin(config: LordConfig, windows: TokenWindows, commit: str | None) -> dict[str, Any]:
    return {
        "model_sha256": digest_of(config.model, commit),
        "calibration_sha256": windows.sha256,
        "num_tokens": windows.num_tokens,
        "fisher_samples": config.joint.fisher_samples if config.joint.fisher else 0,
        "seed": config.calibration.seed,
        "solver": _solver(config),
        "lord_quant_version": __version__,
    }


def _solver(config: LordConfig) -> dict[str, Any]:
    """Returns the settings that change what rounding loses."""
    gptq = {name: getattr(config.gptq, name) for name in ("sym", "desc_act", "act_group_aware", "damp_percent", "mse")}
    joint = {name: getattr(config.joint, name) for name in ("rotate", "refit", "order", "deflate", "refine", "two_sided")}
    return gptq | joint | {"mean_correction": config.lowrank.mean_correction}


def other_settings(origin: Mapping[str, Any], config: LordConfig) -> str:
    """Tells which settings of a run lose otherwise than those that losses were measured with; empty if none does."""
    found, now = origin.get("solver"), _solver(config)
    measured = found if isinstance(found, Mapping) else {}
    return ", ".join(f"{name} {measured.get(name)!r}, now {now[name]!r}" for name in now if measured.get(name) != now[name])


def _rounded_up(value: float) -> str:
    """Renders a bound so that it can be asked for: four digits, not below it."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return f"{math.ceil(value / unit) * unit:.4g}"


class Planner:
    """Plans one model for any budget; menus are made once.

    Args:
        config: Model, targets, and whether factors get a bias.
        statistics: What the model's layers would lose.
        menu: What candidates there are for the layers among the targets; others stay dense.
        model: The model where it is loaded already; None reads shapes from its folder.
        commit: That of a hub model; None is the one its name stands for.

    Raises:
        BudgetError: The statistics are another model's, or were measured with other settings of the solver.
        LordError: Whatever is wrong with the model or the targets.
    """

    def __init__(
        self,
        config: LordConfig,
        statistics: Statistics,
        menu: Menu,
        model: torch.nn.Module | None = None,
        commit: str | None = None,
    ) -> None:
        if model is None:
            source = inspect_source(config.model, config.dtype)
            model, itemsize = build_skeleton(source), source.dtype.itemsize
        else:
            itemsize = next(model.parameters()).element_size()
        dense = unplanned(config)
        if FLOAT_BITS in menu.bits:  # biases of float layers are stored like all floats, of packed ones in 2 bytes
            dense = dataclasses.replace(dense, gptq=dataclasses.replace(dense.gptq, bits=FLOAT_BITS))
        plan = plan_model(model, dense, itemsize)
        origin = statistics.origin
        require_same(digest_of(config.model, commit), origin.get("model_sha256"), "statistics were", config.model)
        sites = find_linears(model)
        if list(statistics.sites.values()) != packable_of(sites):
            raise BudgetError(f"the statistics do not have the layers of {config.model!r}; wanted those it was measured on")
        odd = other_settings(origin, config)
        if odd:
            raise BudgetError(f"the statistics were measured with other settings: {odd}; wanted the same")
        menu = dataclasses.replace(menu, itemsize=itemsize)
        self.statistics, self.menu = statistics, menu
        targeted = select(sites, config.lowrank.targets, config.lowrank.ignore)
        self.menus = _menus(statistics, menu, targeted)
        self.uniform = planner.uniform_plans(statistics.sites, statistics.losses, menu)
        self.plans = planner.Frontier(self.menus, self.uniform)
        self.dense_weights = sum(layer.dense_weights for layer in plan.layers)
        self.float_bytes = sum(layer.weight_bytes for layer in plan.layers if layer.name not in statistics.sites)
        self.other_bytes = plan.other_bytes + self.float_bytes + sum(layer.bias_bytes for layer in plan.layers)

    @property
    def in_nats(self) -> bool:
        """Whether predicted losses are in nats per token; without a backward pass they are squared output errors."""
        return bool(self.statistics.origin.get("fisher_samples"))

    @property
    def unit(self) -> str:
        """What predicted losses are in."""
        return "nats per token" if self.in_nats else "squared output error"

    def tell(self, allocation: Allocation) -> str:
        """Says what is predicted."""
        return f"predicted loss {allocation.loss:.4f} {self.unit if self.in_nats else '(output error)'}"

    def bpw(self, allocation: Allocation) -> float:
        """Returns stored bits per dense weight, all in."""
        return 8 * (allocation.num_bytes + self.float_bytes) / self.dense_weights

    def choose(self, budget: BudgetConfig) -> Allocation:
        """Returns the best plan for a budget.

        Raises:
            BudgetError: It cannot be met; the message names what can be reached.
        """
        smallest, largest = (self._extreme(pick) for pick in (min, max))
        if budget.max_loss is not None:
            if not self.in_nats:
                raise BudgetError(
                    "max_loss is in nats, the statistics are of output errors; wanted some with a backward pass"
                )
            if largest.loss > budget.max_loss:
                raise BudgetError(
                    f"no plan loses as little as {budget.max_loss:g} nats per token; what can be reached is "
                    f"{_rounded_up(largest.loss)} to {smallest.loss:.3g}"
                )
            return self.plans.below(budget.max_loss)
        if budget.target_bpw is not None:
            allowed = self._allowed(budget.target_bpw)
            reach = f"{_rounded_up(self.bpw(smallest))} to {self.bpw(largest):.3f} bits per weight"
        else:
            assert budget.size is not None  # exactly one is given
            allowed = budget.size - self.other_bytes
            reach = " to ".join(str(self.other_bytes + each.num_bytes) for each in (smallest, largest)) + " bytes in all"
        if allowed < smallest.num_bytes:
            asked = budget.target_bpw or budget.target_size
            raise BudgetError(f"no plan is as small as {asked}; what can be reached is {reach}")
        return self.plans.within(allowed)

    def frontier(self, budgets: Sequence[float]) -> list[Allocation | None]:
        """Returns the best plans at several bits per weight; None for those out of reach."""
        smallest = self._extreme(min).num_bytes
        allowed = [self._allowed(bpw) for bpw in budgets]
        return [self.plans.within(limit) if limit >= smallest else None for limit in allowed]

    def _allowed(self, bpw: float) -> float:
        """Returns the bytes that so many bits per weight leave for what is chosen."""
        return bpw * self.dense_weights / 8 - self.float_bytes

    def _extreme(self, pick: Any) -> Allocation:
        choices: list[Choice] = [pick(menu, key=lambda choice: choice.num_bytes) for menu in self.menus]
        return planner.total({name: part for choice in choices for name, part in choice.parts})

    def settings(self, allocation: Allocation) -> dict[str, Any]:
        """Returns a plan as the sections of a configuration, and where it comes from."""
        about = {
            **self.statistics.origin,
            "predicted_loss": round(allocation.loss, 6),
            "bits_per_weight": round(self.bpw(allocation), 4),
            "tensor_bytes": allocation.num_bytes + self.other_bytes,
        }
        sections = planner.patterns(allocation)
        sections["lowrank"]["mean_correction"] = self.menu.mean_correction
        # truncate in the metric the plan was made in
        samples = self.statistics.origin.get("fisher_samples")
        sections["joint"] = {"fisher_samples": samples} if samples else {"fisher": False}
        return {PLANNED: about, **sections}


def _menus(statistics: Statistics, menu: Menu, targeted: frozenset[str]) -> list[list[Choice]]:
    """Returns the choices of every unit: layers alone, and those with one input together."""
    dense, sites = dataclasses.replace(menu, forms=(DENSE,)), statistics.sites
    menus = {name: (menu if name in targeted else dense).of(sites[name], loss) for name, loss in statistics.losses.items()}
    empty = [name for name, candidates in menus.items() if not candidates]
    if empty:
        raise BudgetError(f"no candidate is left for {', '.join(empty[:5])}; wanted more forms, bits or group sizes")
    units = []
    for names, loss in statistics.groups.items():
        if targeted.issuperset(names):
            grouped = menu.of_group([sites[name] for name in names], statistics.site_of(names), loss)
            units.append(planner.merged({name: menus.pop(name) for name in names}, grouped))
    return [*units, *(single(name, candidates) for name, candidates in menus.items())]


def require_same(found: str, wanted: Any, what: str, model: str, way: str = "") -> None:
    """Refuses what was made for another model, by digests.

    Raises:
        BudgetError: It was; `way` says what can be done about it.
    """
    if found != wanted:
        raise BudgetError(f"the {what} made for another model than {model!r}; wanted this one's{way}")
