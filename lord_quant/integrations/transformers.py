# SPDX-License-Identifier: Apache-2.0
"""Makes `from_pretrained` read our checkpoints, and compress on the fly.

Importing this module registers two quantization methods with transformers: ``lord_gptq`` (packed factors) and ``lord``
(float factors). Both rebuild the model on the meta device from the checkpoint's `rank_pattern` before tensors are loaded;
``lord_gptq`` then leaves packing to the host's own GPTQ quantizer, unless layers differ in bits or group size, which that
does not know.

`LordGPTQConfig` passed as `quantization_config` compresses a dense model while it is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_gptq import GptqHfQuantizer
from transformers.utils.quantization_config import GPTQConfig, QuantizationConfigMixin, QuantizationMethod

from lord_quant.backends import gptq as backend
from lord_quant.budget_config import BudgetConfig
from lord_quant.checkpoint import METHOD_FLOAT, METHOD_GPTQ, check_version
from lord_quant.errors import CheckpointError, ConfigError, unknown_keys
from lord_quant.integrations import rebuilt
from lord_quant.surgery import apply_rank_pattern, widen_orders
from lord_quant.targets import find_blocks
from lord_quant.version import FORMAT_VERSION, __version__


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RUN_KEYS = {
    "lowrank": ("rank_ratio", "param_ratio", "targets", "ignore", "form", "force_rank", "float64"),
    "calibration": ("dataset", "text_key", "num_samples", "seq_len", "seed"),
}
_FIXED = {
    "backend": "auto",
    "batch_size": 1,
    "cache_block_outputs": True,
    "group_pattern": None,
    "module_name_preceding_first_block": None,
    "modules_in_block_to_quantize": None,
}
_JOINT_KEYS = (
    "anchor", "residual", "rotate", "refit", "order", "deflate", "refine", "two_sided", "fisher", "fisher_samples",
)  # fmt: skip
_BUDGET_KEYS = tuple(field.name for field in dataclasses.fields(BudgetConfig))
_CHOSEN = {"bits": 4, "group_size": None, "form": "two_factor"}
"""What a budget chooses beside ranks, and what it is where nobody chose it."""
_SWITCHES = ("mean_correction", "sym", "desc_act", "act_group_aware", "true_sequential")
_HOST_KEYS = ("bits", "group_size", "sym", "desc_act", "act_group_aware", "damp_percent", "true_sequential")


@register_quantization_config(METHOD_GPTQ)
class LordGPTQConfig(GPTQConfig):
    """Decompose, then quantize both factors with GPTQ.

    Args:
        bits: Bits of every packed weight: 8, 4, and 3 or 2 where the host allows.
        rank_ratio: Fraction of min(in_features, out_features) kept; 1 quantizes only.
        param_ratio: Fraction of a layer's weights kept.
        rank_pattern: Ranks by layer pattern; in a saved checkpoint, by full module path.
        targets: Presets and patterns of layers to decompose.
        ignore: Patterns taken away from the targets.
        form: `two_factor`, `pivoted`, `column_pivoted` or `grouped`, see `LowrankConfig`.
        form_pattern: Form by layer pattern, of layers that get a rank; in a saved checkpoint, by full module path.
        force_rank: Decompose also where that makes a layer larger.
        mean_correction: Correct biases for the mean input.
        float64: Run statistics in float64.
        stack: `joint`, or `naive`: Optimum's GPTQ after the decomposition.
        anchor, residual, rotate, refit, order, deflate, refine, two_sided, fisher, fisher_samples: The ideas of the joint
            stack, see `JointConfig`.
        mse: Exponent of the search for scales; 0 for none.
        dataset: What `load_corpus` takes: a path, a hub name or `python-stdlib`.
        text_key: Field of the text in jsonl, parquet and hub datasets.
        num_samples: Calibration windows.
        seq_len: Tokens per window; None takes the model's context, at most 2048.
        seed: Seed of the sampling generator.
        tokenizer: Tokenizer or path; None takes the model's own.
        group_size: Inputs per scale; None takes the largest that suits the model's shapes.
        group_pattern: In a saved checkpoint, the leader of every grouped layer that uses another's `down`.
        bits_pattern: Bits by layer or factor pattern, where they are not `bits`; in a saved checkpoint, by full path.
        group_size_pattern: Group size by layer pattern, likewise.
        target_bpw, target_size, max_loss: A budget, which chooses ranks, forms, bits and group sizes after a sensitivity
            pass over the loaded model; see `BudgetConfig`. What is saved is what was chosen.
        min_param_ratio, statistics: What restricts the choice, and a file that saves the pass; likewise.
        **kwargs: What `GPTQConfig` takes: `sym`, `desc_act`, `damp_percent`, `true_sequential`, …; `backend` when a
            checkpoint is loaded.

    Raises:
        ConfigError: A value is illegal.
        FormatVersionError: A checkpoint's configuration was written by a newer version.
    """

    def __init__(
        self,
        /,
        bits: int = 4,
        *,
        rank_ratio: float | None = None,
        param_ratio: float | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        targets: str | list[str] = "all",
        ignore: str | list[str] | None = None,
        form: str = "two_factor",
        force_rank: bool = False,
        mean_correction: bool = True,
        float64: bool = False,
        stack: str = "joint",
        anchor: bool = True,
        residual: bool = True,
        rotate: bool = True,
        refit: bool = True,
        order: str = "auto",
        deflate: bool = True,
        refine: int = 2,
        two_sided: bool = True,
        fisher: bool = True,
        fisher_samples: int | None = None,
        mse: float = 2.0,
        sym: bool = False,
        damp_percent: float = 0.01,
        dataset: str = "python-stdlib",
        text_key: str = "text",
        num_samples: int = 128,
        seq_len: int | None = None,
        seed: int = 0,
        tokenizer: Any = None,
        group_size: int | None = None,
        form_pattern: Mapping[str, str] | None = None,
        group_pattern: Mapping[str, str] | None = None,
        bits_pattern: Mapping[str, int] | None = None,
        group_size_pattern: Mapping[str, int] | None = None,
        target_bpw: float | None = None,
        target_size: int | str | None = None,
        max_loss: float | None = None,
        min_param_ratio: float | None = None,
        statistics: str | None = None,
        format_version: int = FORMAT_VERSION,
        lord_quant_version: str = __version__,
        **kwargs: Any,
    ) -> None:
        packing = {"bits_pattern": bits_pattern, "group_size_pattern": group_size_pattern}
        patterns = {"rank_pattern": rank_pattern, "form_pattern": form_pattern, "group_pattern": group_pattern, **packing}
        check_version({"format_version": format_version, **patterns})
        kwargs.pop("quant_method", None)
        unknown = unknown_keys(
            kwargs, (*_own_arguments(type(self)), *_gptq_arguments(), "checkpoint_format"), "LordGPTQConfig"
        )
        if unknown:
            raise unknown
        _require_kinds({"mean_correction": mean_correction, "sym": sym, **kwargs}, {"targets": targets, "ignore": ignore})
        rebuilt.refuse_two_formats(kwargs)
        with rebuilt.told_by_host():
            super().__init__(
                rebuilt.packed(bits),
                tokenizer=tokenizer,
                group_size=group_size or -1,
                sym=sym,
                damp_percent=damp_percent,
                **kwargs,
            )
        self.quant_method: Any = METHOD_GPTQ
        vars(self)["group_size"] = group_size  # the host's annotation does not allow None
        self.rank_ratio, self.param_ratio = rank_ratio, param_ratio
        self.rank_pattern = dict(rank_pattern) if rank_pattern is not None else None
        self.targets = [targets] if isinstance(targets, str) else list(targets)
        self.ignore = [ignore] if isinstance(ignore, str) else list(ignore or [])
        self.form, self.force_rank, self.mean_correction, self.float64 = form, force_rank, mean_correction, float64
        self.stack, self.mse = stack, mse
        self.anchor, self.residual, self.rotate = anchor, residual, rotate
        self.refit, self.order = refit, order
        self.deflate, self.refine, self.two_sided = deflate, refine, two_sided
        self.fisher, self.fisher_samples = fisher, fisher_samples
        self.form_pattern = dict(form_pattern) if form_pattern else None
        self.group_pattern = dict(group_pattern) if group_pattern else None
        self.bits_pattern = dict(bits_pattern) if bits_pattern else None
        self.group_size_pattern = dict(group_size_pattern) if group_size_pattern else None
        self.dataset, self.text_key = dataset, text_key
        self.num_samples, self.seq_len, self.seed = num_samples, seq_len, seed
        self.target_bpw, self.target_size, self.max_loss = target_bpw, target_size, max_loss
        self.min_param_ratio, self.statistics = min_param_ratio, statistics
        self.format_version, self.lord_quant_version = format_version, lord_quant_version
        if self._is_run():
            self.to_lord_config("model")  # a checkpoint's own configuration has neither; its ranks are checked on loading

    def to_lord_config(self, model: str) -> Any:
        """Returns the `LordConfig` of an on-the-fly run on `model`."""
        from lord_quant.config import LordConfig

        fixed = [f"{key}={getattr(self, key)!r}" for key, value in _FIXED.items() if getattr(self, key) != value]
        if fixed:
            raise ConfigError(f"not supported while compressing: {', '.join(fixed)}; wanted the defaults")

        def section(keys: tuple[str, ...]) -> dict[str, Any]:
            return {key: getattr(self, key) for key in keys}

        lowrank = section((*_RUN_KEYS["lowrank"], "rank_pattern", "form_pattern", "mean_correction"))
        values = {
            "model": model,
            "stack": self.stack,
            "lowrank": lowrank,
            "calibration": section(_RUN_KEYS["calibration"]),
            "gptq": section((*_HOST_KEYS, *rebuilt.PACKING_PATTERNS, "mse")),
            "joint": section(_JOINT_KEYS),
        }
        budget = {key: value for key, value in section(_BUDGET_KEYS).items() if value is not None}
        if budget:
            given = [key for key, usual in _CHOSEN.items() if getattr(self, key) != usual]
            if given:
                raise ConfigError(f"a budget and {', '.join(given)} are given; wanted one or the other")
            values["budget"] = budget
        return LordConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Returns what is saved: for a checkpoint's own configuration, nothing of how it was calibrated."""
        values = super().to_dict()
        if not self._is_run():
            run_only = {key for keys in _RUN_KEYS.values() for key in keys}
            run_only |= {*_JOINT_KEYS, *_BUDGET_KEYS, "stack", "mse", "tokenizer"}
            values = {key: value for key, value in values.items() if key not in run_only and value is not None}
        return values

    def _is_run(self) -> bool:
        """Tells a run's configuration from a checkpoint's own, which has ranks by path and nothing that chooses them."""
        return any(getattr(self, key) is not None for key in ("rank_ratio", "param_ratio", *_BUDGET_KEYS))

    def to_dict_optimum(self) -> dict[str, Any]:
        """Returns the arguments of Optimum's `GPTQQuantizer`."""
        values = {key: getattr(self, key) for key in (*_HOST_KEYS, "format", "meta", "backend")}
        values["group_size"] = self.group_size or -1
        return values | {"block_name_to_quantize": self.block_name_to_quantize}


def _require_kinds(values: Mapping[str, Any], patterns: Mapping[str, Any]) -> None:
    """Refuses values of another kind than wanted, before anything is made of them.

    Raises:
        ConfigError: A switch is no truth value, or patterns are neither one nor a list (all are named).
    """
    switches = {name: values[name] for name in _SWITCHES if name in values}
    problems = [
        f"{name} is {value!r}; wanted true or false" for name, value in switches.items() if not isinstance(value, bool)
    ]
    for name, value in patterns.items():
        listed = value if isinstance(value, list | tuple) else [value or "none"]
        if not all(isinstance(item, str) for item in listed):
            problems.append(f"{name} is {value!r}; wanted a pattern or a list of patterns")
    if problems:
        raise ConfigError("\n  ".join(["values of other kinds than wanted:", *problems]))


def _own_arguments(owner: type) -> list[str]:
    import inspect

    return [name for name in inspect.signature(owner).parameters if name != "kwargs"]


def _gptq_arguments() -> list[str]:
    return _own_arguments(GPTQConfig)


@register_quantization_config(METHOD_FLOAT)
class LordConfigFloat(QuantizationConfigMixin):
    """What a float low-rank checkpoint records; made by compression, read by `from_pretrained`.

    Args:
        rank_pattern: Rank by full module path.
        mean_correction: Whether every low-rank layer has a bias.
        form_pattern: Form by full module path, of those that are not `two_factor`.
        group_pattern: Leader by full module path, of grouped layers that use another's `down`.
        format_version: Version of the checkpoint format.
        lord_quant_version: Version that wrote it.
    """

    def __init__(
        self,
        /,
        rank_pattern: Mapping[str, int] | None = None,
        mean_correction: bool = True,
        form_pattern: Mapping[str, str] | None = None,
        group_pattern: Mapping[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        lord_quant_version: str = __version__,
        **kwargs: Any,
    ) -> None:
        patterns = {"rank_pattern": rank_pattern, "form_pattern": form_pattern, "group_pattern": group_pattern}
        check_version({"format_version": format_version, **patterns})
        kwargs.pop("quant_method", None)
        unknown = unknown_keys(kwargs, _own_arguments(type(self)), "quantization_config")
        if unknown:
            raise unknown
        _require_kinds({"mean_correction": mean_correction}, {})
        self.quant_method: Any = METHOD_FLOAT
        self.rank_pattern = dict(rank_pattern or {})
        self.mean_correction = mean_correction
        self.form_pattern, self.group_pattern = dict(form_pattern or {}), dict(group_pattern or {})
        self.format_version, self.lord_quant_version = format_version, lord_quant_version


@register_quantizer(METHOD_GPTQ)
class LordGptqHfQuantizer(GptqHfQuantizer):
    """Loads packed low-rank checkpoints; compresses on the fly when the model is dense."""

    quantization_config: LordGPTQConfig

    def __init__(self, quantization_config: LordGPTQConfig, **kwargs: Any) -> None:
        backend.host()  # imported quietly, before the base class imports it loudly
        with rebuilt.told_by_host():
            super().__init__(quantization_config, **kwargs)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Checks the settings of an on-the-fly run before any weight is read."""
        super().validate_environment(*args, **kwargs)
        if not self.pre_quantized:
            self.quantization_config.to_lord_config("model")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        ours, path = self.quantization_config, find_blocks(model).path
        if self.pre_quantized:
            patterns = ours.form_pattern, ours.group_pattern
            apply_rank_pattern(model, ours.rank_pattern or {}, ours.mean_correction, *patterns)
            if ours.block_name_to_quantize not in (None, path):
                named = f"block_name_to_quantize is {ours.block_name_to_quantize!r}"
                raise CheckpointError(f"{named}; wanted {path!r}, where {type(model).__name__} has its blocks")
        self._dense_files = kwargs.get("checkpoint_files") or ()
        packings = rebuilt.packings_of(model, ours) if self.pre_quantized else {}
        with rebuilt.told_by_host():
            if self.pre_quantized:
                self.optimum_quantizer.block_name_to_quantize = path
                backend.replace_by_packed(model, self.optimum_quantizer, packings, kwargs.get("device_map"))
            else:
                super()._process_model_before_weight_loading(model, **kwargs)
        if self.pre_quantized:
            rebuilt.check_files(model, path, kwargs.get("checkpoint_files"))
            rebuilt.protect_from_initialization(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            widen_orders(model)
            backend.post_init(self.optimum_quantizer, model)
            self.quantization_config.format = self.optimum_quantizer.format  # or what is saved again has a wrong label
        else:
            from lord_quant.integrations.loaded import compress_loaded

            wanted, (path, commit) = self.quantization_config, rebuilt.home_of(model, self._dense_files)
            compress_loaded(model, wanted.tokenizer, wanted.to_lord_config(path), commit)
            self.quantization_config = LordGPTQConfig.from_dict(model.config.quantization_config)
            model.config.quantization_config = self.quantization_config
        # peft recognises packed layers by this name
        host: Any = model
        host.quantization_method = QuantizationMethod.GPTQ

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """Is asked when the model is to be saved, before anything is written.

        Raises:
            CheckpointError: Its kernels have rewritten their weights.
        """
        backend.require_savable(model)
        return super().get_state_dict_and_metadata(model)


@register_quantizer(METHOD_FLOAT)
class LordHfQuantizer(HfQuantizer):
    """Loads float low-rank checkpoints as ordinary trainable models."""

    requires_calibration = True
    quantization_config: LordConfigFloat

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        ours = self.quantization_config
        apply_rank_pattern(model, ours.rank_pattern, ours.mean_correction, ours.form_pattern, ours.group_pattern)
        rebuilt.check_files(model, find_blocks(model).path, kwargs.get("checkpoint_files"))
        rebuilt.protect_from_initialization(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        widen_orders(model)
        # Nothing is quantized: `.half()`, `.float()` and full fine-tuning must work as on any float model.
        host: Any = model
        host.is_quantized = False

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Lets Trainer train all weights."""
        return True

    def is_serializable(self, **kwargs: Any) -> bool:
        """Low-rank models save like any other."""
        return True
