# SPDX-License-Identifier: Apache-2.0
"""The residual stream: what the layers that write to it make up for.

The problem. A block adds what its attention and its MLP return to the hidden states, h ← h + y. Where every layer aims at
the dense model's own y, whatever earlier layers have missed stays in the stream for good and adds up from block to block.

The solution. A layer that writes to the stream can take back as much of that as its inputs tell of. With h the dense
model's stream in front of the addition and h′ the compressed model's, it aims at

    y + (h − h′)

in place of y. In the least squares of `stack.py`, step 1, that is E[(h − h′) x′ᵀ] added to W C: no byte is added, and no
pass. An MLP's last layer sees more features than the stream has, and errors of earlier layers are functions of what it
sees; so a good part can be taken back.

Which layers write is seen, not known by name: each is the end of a part of the block (attention, MLP), and h plus what
these parts return is what the block returns. Blocks that do otherwise (a norm behind a layer, scaled residuals, experts)
have no writers, and every layer aims at its own y there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lord_quant.stream import first_of
from lord_quant.targets import is_linear


ROUNDING = 4.0
"""How many roundings of each summand the block's own sum may be away."""
SCALE = 0.01
"""By which share of itself a summand may differ from what the block adds, on average: more is a scaled residual."""


def find_writers(block: nn.Module, run: Callable[[], torch.Tensor]) -> dict[str, str]:
    """Finds the layers whose outputs a block adds to its hidden states.

    Args:
        block: The dense block.
        run: Runs it on a batch and returns the hidden states that leave it.

    Returns:
        The part that returns a layer's output by the layer's path, both inside the block, in calling order. Empty if the
        block does not return its hidden states plus what these parts do.
    """
    latest: dict[str, tuple[torch.Tensor, int]] = {}
    parts: dict[str, tuple[str, torch.Tensor]] = {}
    entered: list[torch.Tensor] = []

    def leaving(layer: str) -> Any:
        def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            latest[layer] = output, output._version

        return note

    def closing(part: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            for inner in [layer for layer, (own, _) in parts.items() if own.startswith(part + ".")]:
                del parts[inner]
            first = first_of(output)
            for layer, (tensor, version) in latest.items():
                if first is tensor and first._version == version and first.shape == entered[0].shape:
                    parts[layer] = part, first.clone()

        return note

    with ExitStack() as hooks:
        hooks.callback(block.register_forward_pre_hook(lambda module, args: entered.append(args[0])).remove)
        for name, module in block.named_modules():
            if name:
                hook = leaving(name) if is_linear(module) else closing(name)
                hooks.callback(module.register_forward_hook(hook).remove)
        left = run()
    outputs = {layer: output for layer, (_, output) in parts.items()}
    if not outputs or not _is_sum(left, entered[0], outputs):
        return {}
    return {layer: part for layer, (part, _) in parts.items()}


def _is_sum(left: torch.Tensor, entered: torch.Tensor, outputs: Mapping[str, torch.Tensor]) -> bool:
    """Tells whether what left a block is what entered it plus outputs, but for rounding."""
    rounding = ROUNDING * torch.finfo(left.dtype).eps
    missing, size = left.double() - entered.double(), entered.double().abs()
    for output in outputs.values():
        missing -= output.double()
        size += output.double().abs()
    if not bool((missing.abs() <= rounding * size).all()):
        return False
    # In a stream that is much larger than what is added to it, rounding would hide a factor; on average it does not.
    scales = (float((missing * output).sum() / output.double().square().sum()) for output in outputs.values())
    return all(abs(scale) <= SCALE for scale in scales)


@contextmanager
def stream_in_front(block: nn.Module, writers: Mapping[str, str]) -> Iterator[Callable[[str], torch.Tensor]]:
    """Yields what gives the stream in front of a writer, in float32 or better, while or after the block runs on a batch.

    Args:
        block: The block, dense or compressed; its parts may be replayed.
        writers: What `find_writers` returns.
    """
    entered: list[torch.Tensor] = []
    returned: dict[str, torch.Tensor] = {}

    def enter(module: nn.Module, args: Any) -> None:
        entered[:] = [args[0]]
        returned.clear()

    def returning(part: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            returned[part] = first_of(output).clone()  # the block may add into it

        return note

    def in_front(writer: str) -> torch.Tensor:
        stream = entered[0].to(torch.promote_types(entered[0].dtype, torch.float32))
        for layer, part in writers.items():
            if layer == writer:
                break
            stream = stream + returned[part]
        return stream

    with ExitStack() as hooks:
        if writers:
            hooks.callback(block.register_forward_pre_hook(enter).remove)
        for part in writers.values():
            hooks.callback(block.get_submodule(part).register_forward_hook(returning(part)).remove)
        yield in_front
