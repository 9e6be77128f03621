# SPDX-License-Identifier: Apache-2.0
"""The residual stream: what the layers that write to it make up for.

The problem. A block adds what its attention and its MLP return to the hidden states, h ← h + y. Where every layer aims at
the dense model's own y, whatever earlier layers have missed stays in the stream for good and adds up from block to block.

The solution. A layer that writes to the stream can take back as much of that as its inputs tell of. With h the dense
model's stream in front of the addition and h′ the compressed model's, it aims at

    y + (h − h′)

in place of y. In the least squares of `stack.py`, step 1, that is E[(h − h′) x′ᵀ] added to W C: no byte is added, and no
pass. An MLP's last layer sees more features than the stream has, and errors of earlier layers are functions of what it
sees; so a good part can be taken back. Not where layers of a block are compressed all at once (`true_sequential` off): each
would take back the same, seen in inputs that are about to change.

Which layers write is seen, not known by name: each is the end of a part of the block (attention, MLP), and h plus what
these parts return is what the block returns. Blocks that do otherwise (a norm behind a layer, scaled residuals, experts)
have no writers, and every layer aims at its own y there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lord_quant.blocks.stream import first_of, returning
from lord_quant.targets import is_linear


ROUNDING = 4.0
"""How many roundings of each summand the block's own sum may be away."""
SCALE = 0.01
"""By which share of itself a summand may differ from what the block adds, on average: more is a scaled residual."""


class Passed:
    """What a pass of a block over one batch shows of its residual stream.

    Attributes:
        entered: The hidden states that entered the block.
        returned: What parts of the block returned, as it was then, by the layer each ends in, in calling order.
        parts: Those parts, likewise, by path inside the block.
    """

    def __init__(self) -> None:
        self.entered: torch.Tensor
        self.returned: dict[str, torch.Tensor] = {}
        self.parts: dict[str, str] = {}

    def in_front(self, writer: str) -> torch.Tensor:
        """Returns the stream in front of a writer, in float32 or better."""
        stream = self.entered.to(torch.promote_types(self.entered.dtype, torch.float32))
        for layer, output in self.returned.items():
            if layer == writer:
                break
            stream = stream + output
        return stream

    def behind(self, writer: str) -> torch.Tensor:
        """Returns the stream behind a writer, in float32 or better."""
        return self.in_front(writer) + self.returned[writer]

    def writers(self, left: torch.Tensor) -> dict[str, str]:
        """Returns the writers, if the block returned its hidden states plus what the parts seen did; else none.

        Args:
            left: The hidden states that left the block.

        Returns:
            The part that returns a layer's output by the layer's path, both inside the block, in calling order.
        """
        rounding = ROUNDING * torch.finfo(left.dtype).eps
        missing, size = left.double() - self.entered.double(), self.entered.double().abs()
        for output in self.returned.values():
            missing -= output.double()
            size += output.double().abs()
        if not bool((missing.abs() <= rounding * size).all()):
            return {}
        # In a stream that is much larger than what is added to it, rounding would hide a factor; on average it does not.
        scales = (float((missing * y).sum() / y.double().square().sum()) for y in self.returned.values())
        return dict(self.parts) if all(abs(scale) <= SCALE for scale in scales) else {}


@contextmanager
def watched(block: nn.Module, writers: Mapping[str, str] | None = None) -> Iterator[Passed]:
    """Watches the residual stream while the block runs on batches, one after another.

    Args:
        block: The block, dense or compressed; its parts may be replayed.
        writers: What `Passed.writers` returned. None looks at every part that returns what one of its layers does, as it
            is, with the stream's shape; of parts inside each other at the outer one.
    """
    passed = Passed()

    def enter(module: nn.Module, args: Any) -> None:
        passed.entered = args[0]
        passed.returned.clear()

    def returning(writer: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            passed.returned[writer] = first_of(output).clone()  # the block may add into it

        return note

    with ExitStack() as hooks:
        if writers is None or writers:
            hooks.callback(block.register_forward_pre_hook(enter).remove)
        if writers is None:
            hooks.enter_context(_looking(block, passed))
        for writer, part in (writers or {}).items():
            hooks.callback(block.get_submodule(part).register_forward_hook(returning(writer)).remove)
        yield passed


def _looking(block: nn.Module, passed: Passed) -> AbstractContextManager[None]:
    """Notes parts that return what one of their layers does, and what they return."""

    def told(part: str, output: Any, ends: list[str]) -> None:
        for inner in [layer for layer, own in passed.parts.items() if own.startswith(part + ".")]:
            del passed.parts[inner], passed.returned[inner]
        for layer in ends:
            if first_of(output).shape == passed.entered.shape:
                passed.parts[layer], passed.returned[layer] = part, first_of(output).clone()

    return returning(block, [name for name, module in block.named_modules() if is_linear(module)], told)
