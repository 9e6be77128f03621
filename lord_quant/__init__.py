# SPDX-License-Identifier: Apache-2.0
"""lord-quant: decompose first, quantize both factors.

Importing this package is silent and light; public names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lord_quant.version import __version__


if TYPE_CHECKING:
    from lord_quant.artifact.gptq_v1 import convert_to_gptq_v1
    from lord_quant.artifact.stored import measure
    from lord_quant.config import CalibrationConfig, GptqConfig, LordConfig, LowrankConfig
    from lord_quant.evaluation.harness import evaluate
    from lord_quant.integrations.optimum import LordGPTQQuantizer
    from lord_quant.integrations.transformers import LordGPTQConfig
    from lord_quant.progress import Progress
    from lord_quant.runs.execution import execute
    from lord_quant.runs.pipeline import compress_model, prepare

_PUBLIC = {
    "CalibrationConfig": "lord_quant.config",
    "GptqConfig": "lord_quant.config",
    "LordConfig": "lord_quant.config",
    "LowrankConfig": "lord_quant.config",
    "LordGPTQConfig": "lord_quant.integrations.transformers",
    "LordGPTQQuantizer": "lord_quant.integrations.optimum",
    "Progress": "lord_quant.progress",
    "compress_model": "lord_quant.runs.pipeline",
    "convert_to_gptq_v1": "lord_quant.artifact.gptq_v1",
    "evaluate": "lord_quant.evaluation.harness",
    "execute": "lord_quant.runs.execution",
    "measure": "lord_quant.artifact.stored",
    "prepare": "lord_quant.runs.pipeline",
}

__all__ = [
    "CalibrationConfig",
    "GptqConfig",
    "LordConfig",
    "LordGPTQConfig",
    "LordGPTQQuantizer",
    "LowrankConfig",
    "Progress",
    "__version__",
    "compress_model",
    "convert_to_gptq_v1",
    "evaluate",
    "execute",
    "measure",
    "prepare",
    "register",
]


def register() -> None:
    """Registers the checkpoint formats with transformers; needed only where autoloading was opted out of."""
    import lord_quant.integrations.transformers  # noqa: F401


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
