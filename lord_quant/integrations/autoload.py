# SPDX-License-Identifier: Apache-2.0
"""Makes transformers know our checkpoints without anybody importing this package.

Without a registered quantization method, `from_pretrained` merely warns and returns a model with *random* weights. No
library of the stack reads plugin entry points except torch, which calls those of the group ``torch.backends`` when it is
imported. `install` uses that to watch for the import of transformers' quantizer registry and registers ours right after.
Nothing else happens at import: no file is read, no other module imported. When it is that very registry that imports
torch, it is only half there; then the next import after it is complete registers.

Opt out with ``LORD_QUANT_AUTOLOAD=0`` (this hook) or ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` (all such hooks); then
`import lord_quant; lord_quant.register()` does the same by hand. A failure here never breaks `import torch` or `import
transformers`: it becomes one warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


TRIGGER = "transformers.quantizers.auto"
TARGET = "lord_quant.integrations.transformers"
OPT_OUT = "LORD_QUANT_AUTOLOAD"


def install() -> None:
    """Registers our methods now or as soon as transformers' registry is imported. Called by torch; never raises."""
    if os.environ.get(OPT_OUT, "1").lower() in ("0", "false", "no", "off"):
        return
    if _is_ready():
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _is_ready() -> bool:
    """Tells whether the registry was imported, and to its end."""
    module = sys.modules.get(TRIGGER)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _register() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Watcher)]
    try:
        importlib.import_module(TARGET)
    except Exception as error:
        warnings.warn(
            f"lord-quant could not register with transformers, its checkpoints will not load: {error!r}", stacklevel=2
        )


class _Watcher(MetaPathFinder):
    """Finds nothing itself; lets the registry's own loader run, then registers. It is gone once that has happened."""

    def __init__(self) -> None:
        self.looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.looking:
            return None
        if fullname != TRIGGER:
            if _is_ready():
                _register()
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)
