# SPDX-License-Identifier: Apache-2.0
"""Makes `elsewhere` a device of this process: the processor under another name (`device.cpp`), compiled when asked for.

It shows on any machine that nothing on a device meets what was left on the processor. It has no streams, memory or kernels
of its own: what is particular to CUDA is not seen.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


NAME = "elsewhere"


def lacking() -> str:
    """Names what compiling the device needs and this machine does not have; empty if it has all."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    needed = {"a C++ compiler": shutil.which("c++"), "ninja": shutil.which("ninja"), "Python.h": headers.exists()}
    return ", ".join(name for name, there in needed.items() if not there)


def install(build: Path) -> torch.device:
    """Compiles the device into a folder, unless it lies there, and registers it; once per process."""
    from torch.utils.cpp_extension import load

    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: None
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    build.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("device.cpp")
    load("lord_quant_elsewhere", [str(source)], build_directory=str(build), extra_cflags=["-O1"])
    _let_storages_be_copied()
    _let_kernels_be_chosen()
    return torch.device(NAME)


def _let_storages_be_copied() -> None:
    """Copies tensors of the device deeply by their values; torch makes the new storage of such a device on the CPU."""
    of_others = torch.Tensor.__deepcopy__

    def copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if tensor.device.type != NAME:
            return of_others(tensor, memo)
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    torch.Tensor.__deepcopy__ = copied  # type: ignore[method-assign]


def _let_kernels_be_chosen() -> None:
    """Lets the host, which knows the devices there are by name, choose packed layers of the CPU for this one."""
    from gptqmodel.utils import importer

    of_others = importer.normalize_device_device_map

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return importer.DEVICE.CPU if NAME in f"{args} {kwargs}" else of_others(*args, **kwargs)

    importer.normalize_device_device_map = chosen
