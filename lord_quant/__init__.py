# SPDX-License-Identifier: Apache-2.0
"""lord-quant: decompose first, quantize both factors.

Importing this package is silent and light; public names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lord_quant.version import __version__


if TYPE_CHECKING:
    from lord_quant.config import CalibrationConfig, GptqConfig, LordConfig, LowrankConfig
    from lord_quant.evaluation.harness import evaluate
    from lord_quant.execution import execute
    from lord_quant.gptq_v1 import convert_to_gptq_v1
    from lord_quant.integrations.optimum import LordGPTQQuantizer
    from lord_quant.integrations.transformers import LordGPTQConfig
    from lord_quant.pipeline import compress_model, prepare
    from lord_quant.progress import Progress
    from lord_quant.stored import measure

_PUBLIC = {
    "CalibrationConfig": "lord_quant.config",
    "GptqConfig": "lord_quant.config",
    "LordConfig": "lord_quant.config",
    "LowrankConfig": "lord_quant.config",
    "LordGPTQConfig": "lord_quant.integrations.transformers",
    "LordGPTQQuantizer": "lord_quant.integrations.optimum",
    "Progress": "lord_quant.progress",
    "compress_model": "lord_quant.pipeline",
    "convert_to_gptq_v1": "lord_quant.gptq_v1",
    "evaluate": "lord_quant.evaluation.harness",
    "execute": "lord_quant.execution",
    "measure": "lord_quant.stored",
    "prepare": "lord_quant.pipeline",
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
