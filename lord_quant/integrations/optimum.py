# SPDX-License-Identifier: Apache-2.0
"""`LordGPTQQuantizer`: a drop-in for Optimum's `GPTQQuantizer` that decomposes first.

Importing this module imports Optimum's GPTQ (quietly): a subclass needs its base.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lord_quant.artifact.fingerprint import Fingerprint
from lord_quant.backends import gptq as backend
from lord_quant.blocks.source import refuse_unfit, refuse_unready
from lord_quant.calibration import TokenWindows, as_windows, require_known
from lord_quant.checkpoint import check_output
from lord_quant.config import LordConfig
from lord_quant.corpus import STDLIB, Corpus
from lord_quant.engine import DecompositionRecord
from lord_quant.errors import CalibrationError, ConfigError, unknown_keys
from lord_quant.files.claim import claimed
from lord_quant.integrations.rebuilt import packed
from lord_quant.outcomes import StackRecord
from lord_quant.report import build_report
from lord_quant.runs.cautions import log_cautions
from lord_quant.runs.execution import write_checkpoint
from lord_quant.runs.pipeline import (
    DEFAULT_SEQ_LEN,
    calibrate,
    compress_model,
    host_arguments,
    plan_model,
    vocabulary_of,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GPTQ_KEYS = ("sym", "desc_act", "act_group_aware", "damp_percent", "true_sequential")
_GPTQQuantizer: Any = backend.host().GPTQQuantizer


class LordGPTQQuantizer(_GPTQQuantizer):
    """Decomposes a float model, then quantizes both factors with Optimum's own GPTQ.

    Takes all arguments of `optimum.gptq.GPTQQuantizer`, with the same meaning, and these:

    Args:
        bits: Bits of every packed weight: 8, 4, 3 or 2.
        dataset: A list of texts, a list of ``{"input_ids", "attention_mask"}`` of equal length, or what `load_corpus`
            takes.
        group_size: Inputs per scale; None takes the largest that suits the model's shapes.
        rank_ratio: Fraction of min(in_features, out_features) kept; 1 quantizes only.
        param_ratio: Fraction of a layer's weights kept.
        rank_pattern: Ranks by layer pattern.
        targets: Presets and patterns of layers to decompose.
        ignore: Patterns taken away from the targets.
        force_rank: Decompose also where that makes a layer larger.
        mean_correction: Correct biases for the mean input.
        float64: Run statistics in float64.
        form: `two_factor`, `pivoted`, `column_pivoted` or `grouped`, see `LowrankConfig`.
        form_pattern: Form by layer pattern, of layers that get a rank.
        bits_pattern: Bits by layer or factor pattern, where they are not `bits`.
        group_size_pattern: Group size by layer pattern, likewise.
        stack: `joint`, or `naive`: Optimum's own GPTQ after the decomposition.
        joint: Switches of the joint stack by name, see `JointConfig`.
        mse: Exponent of the search for scales; 0 for none.
        num_samples: Calibration windows, when `dataset` is text; at most, when it is a list of texts.
        seed: Seed of the sampling generator.
        *args: Further arguments of `GPTQQuantizer`, in its order.
        **kwargs: Further arguments of `GPTQQuantizer`, except `modules_in_block_to_quantize`: every linear layer of the
            blocks is quantized.

    Attributes:
        decomposed: After `quantize_model`: one record per decomposed layer.
        quantized: After `quantize_model`: one record per packed linear layer.

    Raises:
        ConfigError: A value is illegal; raised here, before any model is touched.
    """

    def __init__(
        self,
        bits: int,
        dataset: str | Sequence[str] | Sequence[Mapping[str, Any]] = STDLIB,
        group_size: int | None = None,
        *args: Any,
        rank_ratio: float | None = None,
        param_ratio: float | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        targets: Sequence[str] = ("all",),
        ignore: Sequence[str] = (),
        force_rank: bool = False,
        mean_correction: bool = True,
        float64: bool = False,
        form: str = "two_factor",
        form_pattern: Mapping[str, str] | None = None,
        bits_pattern: Mapping[str, int] | None = None,
        group_size_pattern: Mapping[str, int] | None = None,
        stack: str = "joint",
        joint: Mapping[str, Any] | None = None,
        mse: float = 2.0,
        num_samples: int = 128,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        kwargs = _host_arguments(args, kwargs)
        if not isinstance(dataset, str | list | tuple):
            raise ConfigError(f"dataset is {type(dataset).__name__}; wanted a path, a name, texts or tokenized samples")
        kwargs = {"sym": False, "damp_percent": 0.01} | kwargs
        gptq: dict[str, Any] = {"bits": bits, "group_size": group_size, "mse": mse}
        gptq |= {"bits_pattern": bits_pattern, "group_size_pattern": group_size_pattern}
        gptq |= {key: kwargs[key] for key in _GPTQ_KEYS if key in kwargs}
        self.lord_config = LordConfig.from_dict(
            {
                "model": "model",
                "stack": stack,
                "gptq": gptq,
                "joint": joint or {},
                "lowrank": {
                    "rank_ratio": rank_ratio,
                    "param_ratio": param_ratio,
                    "rank_pattern": rank_pattern,
                    "targets": _listed(targets),
                    "ignore": _listed(ignore),
                    "form": form,
                    "form_pattern": form_pattern,
                    "force_rank": force_rank,
                    "mean_correction": mean_correction,
                    "float64": float64,
                },
                "calibration": {
                    "dataset": dataset if isinstance(dataset, str) else STDLIB,
                    "num_samples": num_samples,
                    "seq_len": kwargs.get("model_seqlen"),
                    "seed": seed,
                },
            }
        )
        if kwargs.get("desc_act"):
            kwargs["act_group_aware"] = False  # the host refuses both at once
        super().__init__(packed(bits), dataset=dataset, group_size=group_size or -1, **kwargs)
        self.dataset: Any = dataset
        self.decomposed: list[DecompositionRecord] | list[StackRecord] = []
        self.quantized: list[backend.GptqRecord] = []
        self._tokenizer: Any = None
        self._report: dict[str, Any] | None = None
        self._fingerprint: Fingerprint | None = None
        self._done: weakref.ref[Any] | None = None

    def quantize_model(self, model: PreTrainedModel, tokenizer: Any = None) -> PreTrainedModel:
        """Decomposes and quantizes a loaded dense model in place.

        Args:
            model: The dense model.
            tokenizer: A tokenizer or a path to one; not needed when `dataset` is already tokenized.

        Returns:
            The same model, packed, in evaluation mode. Save it before the first forward pass.

        Raises:
            LordError: Anything wrong with the plan or the data, before the first forward pass.
        """
        if isinstance(tokenizer, str):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        config = dataclasses.replace(self.lord_config, model=str(model.name_or_path) or type(model).__name__)
        refuse_unfit(config.model, model.config)
        refuse_unready(config.model, model)
        dataset = self.dataset
        plan = plan_model(model, config, next(model.parameters()).element_size())
        windows = self._windows(model, tokenizer)
        log_cautions(model, plan, windows, config.stack)
        for key, value in host_arguments(config, plan, model, windows).items():
            setattr(self, key, value)
        self.quantizeConfig.group_size = plan.group_size
        run = functools.partial(super().quantize_model, model, tokenizer)
        done = compress_model(model, plan, windows, config, quantizer=self, run=run)
        self.decomposed, self.quantized = done.decomposed, done.quantized
        self.dataset = dataset
        self._tokenizer = tokenizer
        # The report names the text that was used, which for a caller's own is not what the configuration says.
        calibration = dataclasses.replace(config.calibration, dataset=windows.source, num_samples=len(windows.input_ids))
        config = dataclasses.replace(config, calibration=calibration)
        self._fingerprint, self._done = done.fingerprint, weakref.ref(model)
        self._report = build_report(config, done.plan, windows, done.decomposed, done.quantized, done.seconds)
        return model

    def save(self, model: PreTrainedModel, save_dir: str, *, verify: bool = True, **kwargs: Any) -> None:
        """Writes a folder that stands alone: safetensors that `from_pretrained` loads, tokenizer, report, model card.

        Unlike the base class, the live model is not converted to another packing format, so it stays usable.

        Args:
            model: The quantized model.
            save_dir: New or empty folder.
            verify: Whether a fresh process has to load what was written before it is put in place.
            **kwargs: Taken for compatibility with the base class (`max_shard_size`, `safe_serialization`) and ignored.

        Raises:
            OutputError: The folder is not empty, cannot be written, or another run is writing it.
            CheckpointError: What was written is not what was compressed, or a kernel has rewritten what is to be written.
            ConfigError: Nothing was quantized yet, or another model was since.
        """
        if self._report is None or self._done is None:
            raise ConfigError("nothing to save: call quantize_model first")
        if self._done() is not model:
            raise ConfigError("the model is not the one that was quantized last, whose report is kept; wanted that one")
        told: dict[str, Any] = {"fingerprint": self._fingerprint, "verify": verify}
        output = check_output(save_dir)
        with claimed(output):
            backend.require_savable(model)
            write_checkpoint(model, self._tokenizer, output, self._report, **told)

    def _windows(self, model: PreTrainedModel, tokenizer: Any) -> TokenWindows:
        dataset: Any = self.dataset
        if not isinstance(dataset, str) and dataset and isinstance(dataset[0], Mapping):
            ids = [_tokens(sample, "input_ids", number) for number, sample in enumerate(dataset)]
            masks = [
                _tokens(sample, "attention_mask", number)
                for number, sample in enumerate(dataset)
                if isinstance(sample, Mapping) and "attention_mask" in sample
            ]
            if not all(bool(mask.all()) for mask in masks):
                raise CalibrationError("tokenized samples are padded (attention_mask holds zeros); wanted whole windows")
            if len({len(row) for row in ids}) != 1:
                raise CalibrationError("tokenized samples differ in length; wanted equal lengths, without padding")
            windows = as_windows(torch.stack(ids).to(torch.int64), "tokens given by the caller")
            _check_tokens(windows.input_ids, model.config)
            return windows
        if tokenizer is None:
            raise CalibrationError("the dataset is text, and no tokenizer was given")
        context = getattr(model.config, "max_position_embeddings", None) or DEFAULT_SEQ_LEN
        if isinstance(dataset, str):
            return calibrate(self.lord_config, tokenizer, context, vocabulary_of(model))
        odd = [text for text in dataset or () if not isinstance(text, str)]
        if odd:
            raise CalibrationError(f"dataset holds {type(odd[0]).__name__}; wanted texts, or samples with input_ids")
        texts: tuple[str, ...] = tuple(text for text in dataset or () if text.strip())
        if not texts:
            raise CalibrationError("dataset is empty; wanted texts or tokenized samples")
        corpus = Corpus(texts, "texts given by the caller", "")
        return calibrate(self.lord_config, tokenizer, context, vocabulary_of(model), corpus=corpus, fewer=True)


def _listed(patterns: Any) -> Any:
    """Returns one pattern as a list of it; what is no pattern at all is refused with the other settings."""
    return [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, list | tuple) else patterns


def _tokens(sample: Any, key: str, number: int) -> torch.Tensor:
    """Returns one row of a tokenized sample.

    Raises:
        CalibrationError: The sample has none, or it holds something else than integers.
    """
    if not isinstance(sample, Mapping) or key not in sample:
        found = ", ".join(map(repr, sample)) if isinstance(sample, Mapping) else type(sample).__name__
        raise CalibrationError(f"tokenized sample {number} has no {key!r}; found {found}")
    try:
        row = torch.as_tensor(sample[key])
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"{key!r} of tokenized sample {number} is no row of tokens: {error}") from error
    if row.is_floating_point() or row.is_complex() or row.numel() == 0 or row.numel() != row.shape[-1:].numel():
        raise CalibrationError(
            f"{key!r} of tokenized sample {number} is {row.dtype} {tuple(row.shape)}; wanted one row of integers"
        )
    return row.reshape(-1)


def _check_tokens(input_ids: torch.Tensor, config: Any) -> None:
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and input_ids.shape[1] > context:
        raise CalibrationError(f"tokenized samples hold {input_ids.shape[1]} tokens; the model's context is {context}")
    require_known(input_ids, config.vocab_size, "tokenized samples")


def _host_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Names the host's positional arguments after `group_size`, and refuses what it would swallow silently."""
    parameters = inspect.signature(_GPTQQuantizer.__init__).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD][4:]
    if len(args) > len(names):
        raise TypeError(f"LordGPTQQuantizer takes at most {len(names) + 3} positional arguments")
    given = dict(zip(names, args, strict=False))
    double = [name for name in given if name in kwargs]
    if double:
        raise TypeError(f"LordGPTQQuantizer got {double[0]!r} by position and by name")
    own = inspect.signature(LordGPTQQuantizer.__init__).parameters
    known = [*names, *(name for name in own if name not in ("self", "args", "kwargs")), "quant_method"]
    error = unknown_keys(kwargs, known, "LordGPTQQuantizer")
    if error:
        raise error
    given |= kwargs
    if given.get("modules_in_block_to_quantize") is not None:
        raise ConfigError(
            "modules_in_block_to_quantize is not supported: every linear layer of the blocks is quantized; targets and "
            "ignore choose the layers to decompose"
        )
    return given
