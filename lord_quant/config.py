# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: frozen dataclasses, and YAML in.

A value is checked where it is made, so a `LordConfig` that exists is legal in itself; what depends on the model (shapes,
ranks, group sizes) is checked when the plan is built. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lord_quant.budget_config import BudgetConfig
from lord_quant.corpus import STDLIB, TEXT_KEY
from lord_quant.errors import ConfigError, LordError, nearest_name, unknown_keys
from lord_quant.files.reading import parse_yaml


FLOAT_BITS = 16
PACKED_BITS = (2, 3, 4, 8)
BITS = (*PACKED_BITS, FLOAT_BITS)
GROUP_SIZES = (32, 64, 128, 256)
"""Group sizes that every kernel of the host accepts at 4 bits on the CPU."""
STACKS = ("joint", "naive")
FORMS = ("two_factor", "pivoted", "column_pivoted", "grouped")
RANK_CHOICES = ("rank_ratio", "param_ratio", "rank_pattern")
ORDERS = ("auto", "down_first", "up_first")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _check(problems: list[str], where: str) -> None:
    if problems:
        raise ConfigError("\n".join([f"illegal {where} settings:", *(f"  {problem}" for problem in problems)]))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def choice_problems(where: str, value: Any, legal: Sequence[Any]) -> list[str]:
    """Says what is wrong with a value that must be one of some numbers or names; 4.0 is no 4."""
    if value in legal and (_is_int(value) or isinstance(value, str)):
        return []
    if isinstance(legal[0], str):
        hint = nearest_name(str(value), legal)
    else:
        numeric = isinstance(value, int | float)
        hint = f"; nearest: {min(legal, key=lambda candidate: abs(candidate - value))}" if numeric else ""
    return [f"{where} is {value!r}; wanted one of {', '.join(map(str, legal))}{hint}"]


def _pattern_keys(name: str, pattern: Mapping[Any, Any]) -> list[str]:
    return [
        f"{name} has the key {key!r}; wanted a layer pattern, quoted if it is a number"
        for key in pattern
        if not isinstance(key, str) or not key
    ]


def pattern_problems(name: str, pattern: Any, legal: Sequence[Any]) -> list[str]:
    """Says what is wrong with a mapping of layer pattern to one of some legal values; None is a mapping of nothing."""
    if pattern is None:
        return []
    if not isinstance(pattern, Mapping):
        return [f"{name} is {pattern!r}; wanted a mapping of layer pattern to {name.removesuffix('_pattern')}"]
    values = [problem for key, value in pattern.items() for problem in choice_problems(f"{name}[{key!r}]", value, legal)]
    return _pattern_keys(name, pattern) + values


def _not_bool(owner: object, *names: str) -> list[str]:
    values = {name: getattr(owner, name) for name in names}
    return [f"{name} is {value!r}; wanted true or false" for name, value in values.items() if not isinstance(value, bool)]


@dataclass(frozen=True)
class CalibrationConfig:
    """Which text calibrates the run.

    Attributes:
        dataset: What `load_corpus` takes.
        text_key: Field of the text in jsonl, parquet and hub datasets.
        num_samples: Number of token windows.
        seq_len: Tokens per window; None takes the model's context, at most 2048.
        seed: Seed of the sampling generator.
        batch_size: Windows per forward pass, None: `windows_at_once`; of no meaning to results, but for their rounding.
    """

    dataset: str = STDLIB
    text_key: str = TEXT_KEY
    num_samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        counts = {"num_samples": self.num_samples, "batch_size": 1 if self.batch_size is None else self.batch_size}
        wrong = {name: count for name, count in counts.items() if not _is_int(count) or count < 1}
        problems = [f"{name} is {count!r}; wanted an integer of at least 1" for name, count in wrong.items()]
        if self.seq_len is not None and (not _is_int(self.seq_len) or self.seq_len < 2):
            problems.append(f"seq_len is {self.seq_len!r}; wanted an integer of at least 2")
        if not _is_int(self.seed) or not 0 <= self.seed < 2**32:
            problems.append(f"seed is {self.seed!r}; wanted an integer from 0 to {2**32 - 1}")
        if not isinstance(self.dataset, str) or not self.dataset:
            problems.append(f"dataset is {repr(self.dataset)[:80]}; wanted a path, a hub name or {STDLIB!r}")
        if not isinstance(self.text_key, str) or not self.text_key:
            problems.append(f"text_key is {self.text_key!r}; wanted the name of a field, such as {TEXT_KEY!r}")
        _check(problems, "calibration")


@dataclass(frozen=True)
class LowrankConfig:
    """Which layers are decomposed, and to which ranks. Exactly one of the three ways to choose ranks must be given.

    Attributes:
        rank_ratio: Fraction of min(in_features, out_features) kept, in (0, 1]; 1 leaves every layer dense.
        param_ratio: Fraction of a layer's weights kept, in (0, 1]; 1 leaves every layer dense.
        rank_pattern: Explicit ranks by layer pattern; layers it does not name stay dense.
        targets: Presets and patterns of the layers to decompose (see `targets.select`).
        ignore: Patterns taken away from the targets.
        form: How a decomposed layer is stored: `two_factor`; `pivoted` or `column_pivoted`, rank² weights fewer, exact in
            float; `grouped`, layers with one input (q, k and v; gate and up) sharing `down`, others as `two_factor`.
        form_pattern: Form by layer pattern, of layers that get a rank; `form` is that of the others.
        force_rank: Decompose also where that makes a layer larger.
        mean_correction: Correct the bias for the mean input; adds a bias to layers that had none.
        float64: Run statistics and eigendecompositions in float64 instead of float32.
    """

    rank_ratio: float | None = None
    param_ratio: float | None = None
    rank_pattern: Mapping[str, int] | None = None
    targets: tuple[str, ...] = ("all",)
    ignore: tuple[str, ...] = ()
    form: str = "two_factor"
    form_pattern: Mapping[str, str] | None = None
    force_rank: bool = False
    mean_correction: bool = True
    float64: bool = False

    def __post_init__(self) -> None:
        ways = [name for name in RANK_CHOICES if getattr(self, name) is not None]
        problems = []
        if not ways:
            problems.append(
                "no rank is chosen: give rank_ratio (fraction of the full rank kept, such as 0.75), param_ratio (fraction "
                "of the weights kept, such as 0.8) or rank_pattern; rank_ratio 1 means quantization only"
            )
        if len(ways) > 1:
            problems.append(f"{' and '.join(ways)} are both given; wanted exactly one")
        for name in ("rank_ratio", "param_ratio"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1):
                problems.append(f"{name} is {value!r}; wanted a number in (0, 1]")
        for name in ("targets", "ignore"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
                problems.append(f"{name} is {value!r}; wanted a list of patterns, in Python a tuple")
        problems += _not_bool(self, "force_rank", "mean_correction", "float64")
        problems += choice_problems("form", self.form, FORMS) + pattern_problems("form_pattern", self.form_pattern, FORMS)
        if self.targets == ():
            problems.append("targets is empty; wanted at least one pattern, such as 'all'")
        ranks = self.rank_pattern if self.rank_pattern is not None else {}
        if not isinstance(ranks, Mapping):
            problems.append(f"rank_pattern is {ranks!r}; wanted a mapping of layer pattern to rank")
            ranks = {}
        problems += _pattern_keys("rank_pattern", ranks)
        for pattern, rank in ranks.items():
            if not _is_int(rank) or rank < 1:
                problems.append(f"rank_pattern[{pattern!r}] is {rank!r}; wanted an integer of at least 1")
        _check(problems, "lowrank")


@dataclass(frozen=True)
class GptqConfig:
    """How factors and dense layers are quantized; names and meanings are Optimum's.

    Attributes:
        bits: 8, 4, 3 or 2; 16 leaves weights in float.
        group_size: Inputs that share one scale; None takes the largest of 128, 64, 32 that suits the model's shapes.
        bits_pattern: Bits by layer pattern, later entries winning; `bits` is that of the other layers. A pattern that ends
            in ``.down`` or ``.up`` means that factor of the layers it names.
        group_size_pattern: Group size by layer pattern, likewise. That of `up` is the step of ranks.
        sym: Symmetric quantization: zeros in the middle. Zeros are stored either way, so asymmetric grids, which are
            better, cost no byte; some GPU kernels (Marlin) want symmetric ones.
        desc_act: Quantize inputs in order of decreasing activation.
        act_group_aware: Order inputs by activation within what keeps groups whole; has no effect with `desc_act`.
        damp_percent: Fraction (not percent, despite the host's name) of the mean Hessian diagonal added to it, in (0, 1).
        mse: Exponent of the error that the solver's search for scales minimises; 0 takes scales from the largest weight.
        true_sequential: Quantize layer by layer within a block.
    """

    bits: int = 4
    group_size: int | None = None
    bits_pattern: Mapping[str, int] | None = None
    group_size_pattern: Mapping[str, int] | None = None
    sym: bool = False
    desc_act: bool = False
    act_group_aware: bool = True
    damp_percent: float = 0.01
    mse: float = 2.0
    true_sequential: bool = True

    def __post_init__(self) -> None:
        problems = choice_problems("bits", self.bits, BITS)
        if self.group_size is not None:
            problems += choice_problems("group_size", self.group_size, GROUP_SIZES)
        problems += pattern_problems("bits_pattern", self.bits_pattern, PACKED_BITS)
        problems += pattern_problems("group_size_pattern", self.group_size_pattern, GROUP_SIZES)
        if self.bits == FLOAT_BITS and self.bits_pattern:
            wanted = ", ".join(map(str, PACKED_BITS))
            problems.append(
                f"bits is {FLOAT_BITS} and bits_pattern is given; wanted bits of the other layers among {wanted}"
            )
        problems += _not_bool(self, "sym", "desc_act", "act_group_aware", "true_sequential")
        if not isinstance(self.damp_percent, int | float) or not 0 < self.damp_percent < 1:
            problems.append(f"damp_percent is {self.damp_percent!r}; wanted a fraction in (0, 1), such as 0.01")
        if isinstance(self.mse, bool) or not isinstance(self.mse, int | float) or not 0 <= self.mse <= 8:
            problems.append(f"mse is {self.mse!r}; wanted an exponent in [0, 8], such as 2, or 0 for no search")
        _check(problems, "gptq")


@dataclass(frozen=True)
class JointConfig:
    """The ideas of the joint stack, each with its switch; `stack.py` derives them. The naive stack has none of them.

    Attributes:
        anchor: Aim at the dense model's outputs from the compressed model's inputs.
        residual: Where layers write to the residual stream, at the dense one; needs `anchor` and `true_sequential`.
        rotate: Rotate the bottleneck.
        refit: Give the second factor its optimum for the quantized first.
        order: Which factor is quantized first: `auto`, `down_first` or `up_first`; `down` in the column-pivoted form.
        deflate: Quantize `down` modulo what the refit of `up` absorbs.
        refine: Sweeps over scales and codes after each solve; 0 for none.
        two_sided: Let outputs take back what others have missed, as the metric of the model's loss says; GPTQ does not.
        fisher: Work in the metric of the model's loss, which takes a backward pass; otherwise in that of output error.
        fisher_samples: Windows of that pass, the first so many. None takes 8; those of a budget and its plans 65536 tokens.
    """

    anchor: bool = True
    residual: bool = True
    rotate: bool = True
    refit: bool = True
    order: str = "auto"
    deflate: bool = True
    refine: int = 2
    two_sided: bool = True
    fisher: bool = True
    fisher_samples: int | None = None

    def __post_init__(self) -> None:
        problems = _not_bool(self, "anchor", "residual", "rotate", "refit", "deflate", "two_sided", "fisher")
        problems += choice_problems("order", self.order, ORDERS)
        if not _is_int(self.refine) or not 0 <= self.refine <= 100:
            problems.append(f"refine is {self.refine!r}; wanted a number of sweeps from 0 to 100, such as 2")
        if (samples := self.fisher_samples) is not None and (not _is_int(samples) or samples < 1):
            problems.append(f"fisher_samples is {samples!r}; wanted a positive number of windows, such as 8")
        _check(problems, "joint")


@dataclass(frozen=True)
class LordConfig:
    """One whole run.

    Attributes:
        model: Folder or hub name of the dense model.
        output: Folder to write, or None for a run that writes nothing.
        stack: How decomposition and quantization are stacked: `joint` does both layer by layer, each step knowing the
            other; `naive` decomposes the float model, then runs Optimum's GPTQ on it unmodified.
        device: `auto`, `cpu`, `cuda`, `cuda:0`, …
        dtype: dtype in which float tensors are stored; `auto` keeps the model's own. CPUs compute in float32 anyway.
        calibration: See `CalibrationConfig`.
        lowrank: See `LowrankConfig`.
        gptq: See `GptqConfig`.
        joint: See `JointConfig`.
        budget: What chooses ranks, forms, bits and group sizes; None where they are given. See `BudgetConfig`.
    """

    model: str
    output: str | None = None
    stack: str = "joint"
    device: str = "auto"
    dtype: str = "auto"
    lowrank: LowrankConfig = field(default_factory=LowrankConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    gptq: GptqConfig = field(default_factory=GptqConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    budget: BudgetConfig | None = None

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.model, str) or not self.model:
            problems.append(f"model is {self.model or 'not given'!s}; wanted a folder or a hub name, as text")
        if self.output is not None and (not isinstance(self.output, str) or not self.output):
            problems.append(f"output is {self.output!r}; wanted a folder, or none")
        if not isinstance(self.device, str) or not self.device:
            problems.append(f"device is {self.device!r}; wanted a name such as 'auto', 'cpu' or 'cuda:0'")
        problems += choice_problems("stack", self.stack, STACKS) + choice_problems("dtype", self.dtype, DTYPES)
        given = [name for name in ("bits_pattern", "group_size_pattern") if getattr(self.gptq, name)]
        if self.stack == "naive" and given:
            problems.append(f"{' and '.join(given)} given: the naive stack packs all layers alike; wanted --stack joint")
        forms = {self.lowrank.form, *(self.lowrank.form_pattern or {}).values()}
        if self.stack == "naive" and "grouped" in forms:
            problems.append("form is 'grouped': the naive stack decomposes every layer alone; wanted --stack joint")
        if self.budget is not None:
            problems += _beside_budget(self)
        _check(problems, "run")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-serialisable values."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LordConfig:
        """Builds a configuration from nested mappings.

        Raises:
            ConfigError: A key is unknown or a value illegal; all are named, section by section.
            BudgetError: Nothing is, but for the budget.
        """
        sections: dict[str, type] = {"lowrank": LowrankConfig, "calibration": CalibrationConfig}
        sections |= {"gptq": GptqConfig, "joint": JointConfig, "budget": BudgetConfig}
        _require_known(values, cls, "configuration")
        if "model" not in values:
            raise ConfigError("model is not given; wanted a folder or a hub name")
        built: dict[str, Any] = {key: value for key, value in values.items() if key not in sections}
        errors: list[LordError] = []
        for name, section in sections.items():
            given = {} if values.get(name) is None else values[name]
            try:
                _require_known(given, section, f"section {name!r}")
                if name == "budget" and not given:
                    continue
                if name == "lowrank" and values.get("budget") and all(given.get(way) is None for way in RANK_CHOICES):
                    given = {**given, "rank_ratio": 1}  # until the budget chooses
                built[name] = section(**{key: _tuples(value) for key, value in given.items()})
            except LordError as error:
                errors.append(error)
        if errors:
            raise errors[0] if len(errors) == 1 else ConfigError("\n".join(map(str, errors)))
        return cls(**built)


def _beside_budget(config: LordConfig) -> list[str]:
    """Says what makes no sense beside a budget, which chooses ranks, forms, bits and group sizes."""
    problems = []
    if config.stack == "naive":
        problems.append("a budget is given for the naive stack, which packs all layers alike; wanted stack joint")
    lowrank, gptq = config.lowrank, config.gptq
    given = [name for name in ("param_ratio", "rank_pattern", "form_pattern", "force_rank") if getattr(lowrank, name)]
    given += ["rank_ratio"] if lowrank.rank_ratio not in (None, 1) else []
    given += [name for name in ("bits_pattern", "group_size_pattern") if getattr(gptq, name)]
    if given:
        problems.append(f"a budget and {', '.join(given)} are given; wanted one or the other")
    return problems


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a configuration file into a plain mapping, checked only for its syntax, strictly (see `files/reading.py`).

    Raises:
        ConfigError: The file is missing, not YAML or not a mapping.
    """
    try:
        values = parse_yaml(path)
    except OSError as error:
        raise ConfigError(f"configuration file {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"configuration file {str(path)!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"configuration file {str(path)!r} holds {type(values).__name__}; wanted a mapping")
    return values


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Lays nested settings over others; mappings merge, everything else is replaced. Neither argument changes."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _require_known(values: Any, owner: type, where: str) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {type(values).__name__}; wanted a mapping")
    error = unknown_keys(values, (f.name for f in dataclasses.fields(owner)), where)
    if error:
        raise error


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
