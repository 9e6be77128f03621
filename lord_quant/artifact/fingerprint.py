# SPDX-License-Identifier: Apache-2.0
"""What a model says to a few fixed tokens, as a few numbers: to tell whether two models are the same one.

Logits of 16 tokens at 64 places of the vocabulary, spread evenly. The compressed model's are taken while its weights are
still in float, before anything is packed: what a fresh process reads back from the files must say the same, up to the
precision in which kernels compute. Two are compared by the norm of their difference over that of the logits about the mean
of their row: a layer that is read back wrongly moves them by a large share of that, kernels by a percent (bfloat16).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lord_quant.blocks.residency import RESIDENT, Residency
from lord_quant.blocks.stream import Way, block_kinds, capture, passed_over, way_of
from lord_quant.errors import CheckpointError
from lord_quant.linalg import require_finite
from lord_quant.targets import find_blocks


TOKENS, PLACES = 16, 64
TOLERANCE = 0.1
"""Most by which the logits of one model may differ between kernels, as a share of their spread."""
CONTAINERS: tuple[type | None, ...] = (None, tuple, list)
"""What blocks return hidden states in, by the number under which that is kept."""


class Fingerprint(NamedTuple):
    """Logits on fixed tokens.

    Attributes:
        tokens: What the model was given.
        places: At which tokens of the vocabulary its logits were taken.
        logits: With shape (tokens, places), float32.
    """

    tokens: list[int]
    places: list[int]
    logits: torch.Tensor

    def difference(self, other: Fingerprint) -> float:
        """Returns by how much another's logits differ, as a share of the spread of these; inf if it saw other tokens."""
        if (self.tokens, self.places) != (other.tokens, other.places):
            return float("inf")
        mine, theirs = self.logits.double(), other.logits.double()
        spread, moved = float((mine - mine.mean(dim=1, keepdim=True)).norm()), float((mine - theirs).norm())
        return moved / spread if spread > 0 else float("inf") if moved else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values: a row of logits is a line of text."""
        rows = [" ".join(f"{value:.7g}" for value in row) for row in self.logits.tolist()]
        return {"tokens": self.tokens, "places": self.places, "logits": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Reads what `to_dict` returns.

        Raises:
            CheckpointError: It is something else.
        """
        try:
            rows = [[float(value) for value in row.split()] for row in values["logits"]]
            found = cls([*map(int, values["tokens"])], [*map(int, values["places"])], torch.tensor(rows))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"a fingerprint of logits cannot be read: {error!r}") from error
        if found.logits.shape != (len(found.tokens), len(found.places)):
            raise CheckpointError(f"a fingerprint of logits has shape {tuple(found.logits.shape)}; wanted tokens by places")
        return found


def fixed_tokens(model: Any) -> torch.Tensor:
    """Returns the tokens that a model is asked, with shape (1, n): the same ones for every model of its vocabulary."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or TOKENS
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (1, TOKENS), generator=generator)[:, :context]


def fingerprint_of(model: Any) -> Fingerprint:
    """Runs a model on the fixed tokens; packed layers may rewrite their weights, so save it first.

    Raises:
        NumericsError: Its logits hold NaN or inf.
    """
    tokens = fixed_tokens(model)
    with torch.no_grad():
        logits = model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits[0]
    require_finite(logits, "logits of the compressed model on fixed tokens")
    count, last = min(PLACES, logits.shape[1]), logits.shape[1] - 1
    places = torch.arange(count) * last // max(1, count - 1)
    return Fingerprint(tokens[0].tolist(), places.tolist(), logits.cpu()[:, places].float())


class Passenger:
    """The fixed tokens on their way through the compressed blocks of a model that is never in memory as a whole.

    Args:
        model: The model, perhaps a skeleton.
        residency: Which of its blocks have their weights.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, residency: Residency = RESIDENT) -> None:
        self._model, self._blocks = model, find_blocks(model).modules
        self._kinds = block_kinds(model, len(self._blocks))
        self._tokens = fixed_tokens(model)
        (self._call,) = capture(model, self._blocks, self._kinds, [self._tokens], residency)
        self._way = Way(None, 0)

    @torch.no_grad()
    def through(self, index: int) -> None:
        """Goes through a block, which has its weights."""
        ways: list[Way] = []
        with way_of(self._blocks[index], ways):
            self._call.hidden = self._call.run(self._blocks[index], self._kinds[index])
        self._way = ways[-1]

    def state(self) -> dict[str, torch.Tensor]:
        """Returns where it is."""
        way = torch.tensor([CONTAINERS.index(self._way.container), self._way.others])
        return {"hidden": self._call.hidden, "way": way}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes where `state` was taken."""
        container, others = state["way"].tolist()
        self._call.hidden, self._way = state["hidden"].to(self._call.hidden), Way(CONTAINERS[container], others)

    def arrive(self) -> Fingerprint:
        """Returns the fingerprint, behind the last block.

        Raises:
            NumericsError: The logits hold NaN or inf.
        """
        with passed_over(self._blocks, [self._way] * len(self._blocks), self._call.hidden):
            return fingerprint_of(self._model)
