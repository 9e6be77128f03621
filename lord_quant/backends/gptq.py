# SPDX-License-Identifier: Apache-2.0
"""The only place that imports Optimum's GPTQ and GPTQModel.

Importing GPTQModel prints a banner, turns the root logger to INFO and redirects the Hugging Face cache;
`silence` undoes all three.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from lord_quant.errors import CheckpointError, HostError
from lord_quant.files.packing import pack_words
from lord_quant.linalg import require_finite
from lord_quant.rounding.refine import Quantized
from lord_quant.silence import lent_caches, silence, unheld
from lord_quant.sizes.layer_bytes import Packing


PACK_VARIABLE = "GPTQMODEL_DISABLE_PACK_EXT"
PACKED_FORMAT = "gptq_v2"
"""Zeros as they are, which asymmetric grids need."""


@dataclass(frozen=True)
class GptqRecord:
    """What the solver reports for one linear layer.

    Attributes:
        name: Full module path (of a factor, or of a layer that stayed dense).
        loss: The solver's own figure: squared error in the Hessian's metric per sample; None where it fell back to
            plain rounding for want of samples.
        damp_percent: Damping it ended with; higher than asked for when the Hessian needed more.
        seconds: Wall time of the solve.
    """

    name: str
    loss: float | None
    damp_percent: float
    seconds: float


def host() -> Any:
    """Imports and returns `optimum.gptq.quantizer`, silently, and restores logging and cache variables."""
    with silence(), unheld():
        with contextlib.suppress(ImportError):
            from logbar import LogBar

            LogBar.shared().setLevel(logging.ERROR)
        with contextlib.nullcontext() if "optimum.gptq.quantizer" in sys.modules else lent_caches():
            import optimum.gptq.quantizer as quantizer
    return quantizer


def make_quantizer(**arguments: Any) -> Any:
    """Builds Optimum's `GPTQQuantizer` with the given arguments."""
    return host().GPTQQuantizer(**arguments)


def replace_by_packed(
    model: nn.Module, quantizer: Any, packings: Mapping[str, Packing], device_map: Any, *, pack: bool = False
) -> dict[str, Any]:
    """Replaces linear layers by empty packed ones of the host, each with its own bits and group size.

    Args:
        model: The model; changed in place.
        quantizer: An Optimum `GPTQQuantizer`; its own bits and group size stay as they are.
        packings: Bits and group size by full module path of the linear layer (or factor).
        device_map: Where the layers will be, as the host wants to be told.
        pack: Whether they will be packed here, which not every kernel can.

    Returns:
        The packed layers, by full module path.

    Raises:
        HostError: The host replaced other layers than asked for.
    """
    kernels: list[type] = []
    for packing in sorted(set(packings.values())):
        one = copy.copy(quantizer)  # the host knows one bits and one group size at a time
        one.bits, one.group_size = packing
        one.select_quant_linear(device_map=device_map, pack=pack)
        _replace(one, model, (name for name, own in packings.items() if own == packing))
        kernels.append(one.quant_linear)
    quantizer.quant_linear = kernels[0]  # which the host asks for when it finishes the model
    packed: dict[str, Any] = {name: own for name, own in model.named_modules() if isinstance(own, tuple(kernels))}
    if {name: (module.bits, module.group_size) for name, module in packed.items()} != dict(packings):
        raise HostError(f"Optimum made {len(packed)} packed layers; wanted {len(packings)}, each with its bits")
    return packed


def _replace(quantizer: Any, model: nn.Module, names: Iterable[str]) -> None:
    """Replaces the layers of these paths by empty packed ones; a path that leads nowhere is left out.

    The host finds layers among the attributes of modules, and so none of `nn.Sequential`, whose names are numbers. It is
    given one layer at a time, as an attribute of nothing else.
    """
    layers = dict(model.named_modules())
    for name in names:
        if name in layers:
            holder: Any = nn.Module()
            holder.layer = layers[name]
            type(quantizer)._replace_by_quant_layers(quantizer, holder, {"layer"})
            model.set_submodule(name, holder.layer)


def pack_model(
    model: nn.Module,
    quantizer: Any,
    quantized: Mapping[str, Quantized],
    packings: Mapping[str, Packing],
    *,
    ready: bool = True,
) -> list[GptqRecord]:
    """Replaces linear layers by packed ones of the host that hold given codes.

    Args:
        model: The model, whose layers hold the biases to keep; changed in place, left in evaluation mode.
        quantizer: An Optimum `GPTQQuantizer`.
        quantized: What to pack, by full module path of the linear layer (or factor).
        packings: The bits and group size it was quantized with, likewise.
        ready: Whether packed layers are made ready to compute. What is stored does not depend on that.

    Returns:
        One record per packed layer, in the order of `quantized`.

    Raises:
        HostError: The host replaced other layers than asked for.
    """
    quantizer.format = PACKED_FORMAT
    if not quantized:  # of a block whose layers all stay as they were
        return []
    layers = dict(model.named_modules())
    biases = {name: layers[name].bias for name in quantized}
    wanted = {name: packings[name] for name in quantized}
    packed = replace_by_packed(model, quantizer, wanted, {"": next(model.parameters()).device}, pack=True)
    for name, solution in quantized.items():
        _fill(packed[name], solution, biases[name], name)
    if ready:
        post_init(quantizer, model)
    # What the host's own run leaves behind: transformers then refuses to cast the model, peft treats it as packed.
    from transformers.utils.quantization_config import QuantizationMethod

    marks: Any = model
    marks.is_quantized, marks.quantization_method = True, QuantizationMethod.GPTQ
    model.eval()
    return [GptqRecord(name, item.loss, item.damp_percent, item.seconds) for name, item in quantized.items()]


def _fill(module: Any, solution: Quantized, bias: torch.Tensor | None, name: str) -> None:
    """Gives a packed layer of the host its tensors, as its own packer would: that takes a minute per 10⁹ bits of codes.

    Raises:
        HostError: The host's layer holds other tensors.
        NumericsError: Scales or bias are not finite in float16.
    """
    tensors = {
        "qweight": pack_words(solution.codes.to(torch.uint8).T.contiguous(), solution.bits),
        "qzeros": pack_words(solution.zeros.to(torch.uint8), solution.bits).T.contiguous(),
        "scales": solution.scales.T.half().contiguous(),
        "g_idx": solution.g_idx.to(torch.int32),
    }
    if bias is not None:
        tensors["bias"] = bias.detach().half()
    for part, tensor in tensors.items():
        own = getattr(module, part, None)
        if not isinstance(own, torch.Tensor) or (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
            found = f"{own.dtype} {tuple(own.shape)}" if isinstance(own, torch.Tensor) else own
            raise HostError(f"{part} of layer {name!r} is {found} in the host; wanted {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.is_floating_point():
            require_finite(tensor, f"{part} of layer {name!r} after quantization")
        setattr(module, part, tensor.to(own.device))


def require_savable(model: nn.Module) -> None:
    """Refuses to save packed layers that no longer hold what a checkpoint's would: some kernels rewrite theirs to run.

    Those of GPUs may do so as soon as they are loaded, and keep dtype and shape. Kernels that can pack hold what is stored,
    until those of the CPU rewrite it into something of another shape when they first run.

    Raises:
        CheckpointError: There are such layers; one is named.
    """
    from gptqmodel.nn_modules.qlinear import PackableQuantLinear

    rewritten = []
    for name, module in model.named_modules():
        if "qweight" not in (module._buffers.keys() | module._parameters.keys()):
            continue
        part, layer = module._buffers.get("qweight"), cast(Any, module)
        wanted = (layer.in_features * layer.bits // 32, layer.out_features)
        as_stored = part is not None and (part.dtype, tuple(part.shape)) == (torch.int32, wanted)
        if not as_stored or not isinstance(module, PackableQuantLinear):
            rewritten.append(name)
    if rewritten:
        raise CheckpointError(
            f"{len(rewritten)} packed layers, such as {rewritten[0]!r}, hold weights as their kernel rewrote them to run, "
            "which cannot be loaded again; wanted a model that was loaded on the CPU and is saved before its first forward "
            "pass, or one loaded with quantization_config=LordGPTQConfig(bits=4, backend='gptq_torch')"
        )


def quantize_model(model: nn.Module, quantizer: Any, expected: int, run: Callable[[], Any]) -> list[GptqRecord]:
    """Runs a host quantizer on a model and returns what it did to every layer.

    Args:
        model: The model; its linear layers are replaced by packed ones.
        quantizer: The host's quantizer that `run` drives.
        expected: How many linear layers must be quantized.
        run: Calls the quantizer's `quantize_model`.

    Raises:
        HostError: The host quantized another number of layers than expected.
        NumericsError: A scale or bias came out NaN or inf; the layer is named.
    """
    finish = quantizer.post_init_model

    def finish_eagerly(packed: nn.Module) -> nn.Module:
        _keep_eager(packed)
        return finish(packed)

    quantizer.post_init_model = finish_eagerly
    quantizer._replace_by_quant_layers = lambda packed, names, *_: _replace(quantizer, packed, names)
    try:
        with _record_solver(model) as records, _without_packing_extension():
            run()
    finally:
        del quantizer.post_init_model, quantizer._replace_by_quant_layers
    model.eval()  # the host leaves packed layers in training mode, where 4-bit CPU kernels compute differently
    if len(records) != expected:
        raise HostError(f"Optimum quantized {len(records)} linear layers; wanted {expected}")
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            for part in ("scales", "bias"):
                tensor = getattr(module, part, None)
                if isinstance(tensor, torch.Tensor):
                    require_finite(tensor, f"{part} of layer {name!r} after quantization")
    return records


@contextlib.contextmanager
def _without_packing_extension() -> Iterator[None]:
    """Packs with torch operations unless the user chose otherwise.

    GPTQModel would first compile a C++ extension for half a minute, to pack the same bits no faster.
    """
    chosen = os.environ.get(PACK_VARIABLE)
    os.environ.setdefault(PACK_VARIABLE, "1")
    try:
        yield
    finally:
        if chosen is None:
            os.environ.pop(PACK_VARIABLE, None)


@contextlib.contextmanager
def _record_solver(model: nn.Module) -> Iterator[list[GptqRecord]]:
    """Lets Optimum use a solver that also notes what it returned; the arithmetic is the host's."""
    module = host()
    solver: Any = module.GPTQ
    names = {id(layer): name for name, layer in model.named_modules()}
    records: list[GptqRecord] = []

    class RecordingGPTQ(solver):
        def __init__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
            super().__init__(layer, *args, **kwargs)
            self.lord_name = names[id(layer)]

        def fasterquant(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().fasterquant(*args, **kwargs)
            seconds, loss, damp = outputs[3], outputs[4], outputs[5]
            # Too few samples make the solver fall back to rounding; it then reports a text instead of a loss.
            loss = float(loss) if isinstance(loss, int | float) else None
            records.append(GptqRecord(self.lord_name, loss, float(damp), float(seconds)))
            return outputs

    module.GPTQ = RecordingGPTQ
    try:
        yield records
    finally:
        module.GPTQ = solver


def post_init(quantizer: Any, model: nn.Module) -> nn.Module:
    """Finishes packed layers after their tensors were loaded; what `quantize_model` leaves behind is finished alike."""
    _keep_eager(model)
    finished = quantizer.post_init_model(model)
    if any(getattr(layer, "REQUIRES_FORMAT_V2", False) for layer in model.modules()):
        quantizer.format = PACKED_FORMAT  # the host has converted zeros of the first format in place
    return finished


def _keep_eager(model: nn.Module) -> None:
    """Keeps CPU kernels from being wrapped in torch.compile when they are initialised.

    Compilation needs a C++ compiler on the user's machine, takes longer than it saves on the CPU, and may compute other
    last bits than the same layer loaded elsewhere.
    """
    layer: Any
    for layer in model.modules():
        qweight = getattr(layer, "qweight", None)
        if isinstance(qweight, torch.Tensor) and qweight.device.type == "cpu":
            layer.optimized = True
