# SPDX-License-Identifier: Apache-2.0
"""Token perplexity of a causal language model over a stream of tokens.

    perplexity = exp( Σ −log p(tokenᵢ | the tokens before it in its window) / number of predicted tokens )

The sum runs over tokens, not over window means: windows that predict fewer tokens (the last one, or all but the first
when windows overlap) must not weigh more per token. It is accumulated in float64; with float32 the sum over 10⁶ tokens
is off in the fifth digit.

The stream is cut into windows of `window` tokens that start `stride` tokens apart. Each token is counted once, in the
first window that holds it. With stride = window the windows are disjoint and every window's first token is unpredicted
context; with a smaller stride each window predicts its new tokens alone, with the older ones as context (at least
window − stride of them), and only the very first token of the stream goes unpredicted. More context gives a lower
perplexity: only numbers of equal window and stride compare, so the result carries both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lord_quant.errors import EvaluationError, NumericsError


if TYPE_CHECKING:
    import torch

    from lord_quant.corpus import Corpus

DEFAULT_WINDOW = 1024


class Window(NamedTuple):
    """Tokens [start, stop) of the stream, of which those from `first_new` on are predicted and counted."""

    start: int
    stop: int
    first_new: int


@dataclass(frozen=True)
class Perplexity:
    """Result over one stream.

    Attributes:
        perplexity: exp(nll / num_tokens).
        nll: Sum of the negative log-likelihoods, in nats.
        num_tokens: Predicted tokens.
        num_windows: Windows run.
        window: Tokens in one window.
        stride: Tokens from one window's start to the next.
        dtype: The model's floating-point type.
        source: Where the text came from (None for a bare stream).
        sha256: Digest of the text (None for a bare stream).
    """

    perplexity: float
    nll: float
    num_tokens: int
    num_windows: int
    window: int
    stride: int
    dtype: str
    source: str | None = None
    sha256: str | None = None


def iter_windows(num_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Cuts a stream of `num_tokens`; the last window may be shorter. A window that predicts nothing is left out.

    Raises:
        EvaluationError: window < 2 or stride not in 1 … window.
    """
    if window < 2 or not 1 <= stride <= window:
        raise EvaluationError(f"wanted window ≥ 2 and 1 ≤ stride ≤ window; found window {window}, stride {stride}")
    counted = 0
    for start in range(0, num_tokens, stride):
        stop = min(start + window, num_tokens)
        first_new = max(counted, start + 1)
        if first_new < stop:
            yield Window(start, stop, first_new)
        counted = stop
        if stop == num_tokens:
            return


def stream_perplexity(
    model: Any,
    token_ids: torch.Tensor,
    *,
    window: int = DEFAULT_WINDOW,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
) -> Perplexity:
    """Computes the perplexity of `model` on a stream; the model is left in the mode (training or not) it was in.

    Args:
        model: A causal language model: called with `input_ids` of shape (batch, length), returns `.logits` of shape
            (batch, length, vocabulary).
        token_ids: The stream, with shape (num_tokens,), integer.
        window: Tokens in one window.
        stride: Tokens from one window's start to the next; None for `window`.
        max_windows: Stop after so many windows.
        batch_size: Windows of equal length run together.

    Raises:
        EvaluationError: Illegal settings, a window beyond the model's context, or a stream too short.
        NumericsError: The logits hold NaN or infinity.
    """
    import torch

    stride = window if stride is None else stride
    if token_ids.dim() != 1:
        raise EvaluationError(f"token_ids: wanted shape (num_tokens,), found {tuple(token_ids.shape)}")
    if batch_size < 1 or (max_windows is not None and max_windows < 1):
        raise EvaluationError(f"wanted batch_size and max_windows ≥ 1; found {batch_size} and {max_windows}")
    context = context_of(getattr(model, "config", None))
    if context is not None and window > context:
        raise EvaluationError(f"window {window} is longer than the model's context of {context} tokens")
    windows = list(iter_windows(token_ids.numel(), window, stride))[:max_windows]
    if not windows:
        raise EvaluationError(f"the stream has {token_ids.numel()} tokens; wanted at least 2")

    parameter = next(model.parameters())
    nll, num_tokens = torch.zeros((), dtype=torch.float64), 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in _batches(windows, batch_size):
                ids = torch.stack([token_ids[w.start : w.stop] for w in batch]).to(parameter.device)
                logits = model(input_ids=ids, use_cache=False).logits
                for row, w in enumerate(batch):
                    nll += _window_nll(logits[row], ids[row], w)
                    num_tokens += w.stop - w.first_new
    finally:
        model.train(was_training)
    total = float(nll)
    mean = total / num_tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf  # exp overflows beyond; such a model is broken, not an error
    return Perplexity(perplexity, total, num_tokens, len(windows), window, stride, str(parameter.dtype)[6:])


def corpus_perplexity(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    *,
    window: int = DEFAULT_WINDOW,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
) -> Perplexity:
    """Tokenises the documents, joins them by EOS and computes the perplexity (settings as for `stream_perplexity`).

    Raises:
        EvaluationError: As `stream_perplexity`, or the tokenizer has no EOS token.
        NumericsError: As `stream_perplexity`.
    """
    # A corpus may be far larger than the windows asked for: what lies beyond the last one is not tokenised.
    needed = None if max_windows is None else window + (max_windows - 1) * (stride or window)
    ids = tokenize_stream(tokenizer, corpus.documents, needed)
    result = stream_perplexity(model, ids, window=window, stride=stride, max_windows=max_windows, batch_size=batch_size)
    return replace(result, source=corpus.source, sha256=corpus.sha256)


def tokenize_stream(tokenizer: Any, documents: Sequence[str], max_tokens: int | None = None) -> torch.Tensor:
    """Token ids of the documents with one EOS after each, cut to `max_tokens`, with shape (num_tokens,), int64."""
    import torch

    eos = tokenizer.eos_token_id
    if eos is None:
        raise EvaluationError("the tokenizer has no EOS token to join documents with")
    stream: list[int] = []
    for text in documents:
        # `verbose=False`: a document longer than the model's context is no mistake here, windows are cut afterwards.
        stream += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], eos]
        if max_tokens is not None and len(stream) >= max_tokens:
            break
    return torch.tensor(stream[:max_tokens], dtype=torch.int64)


def _batches(windows: list[Window], size: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for w in windows:
        if batch and (len(batch) == size or w.stop - w.start != batch[0].stop - batch[0].start):
            yield batch
            batch = []
        batch.append(w)
    yield batch


def _window_nll(logits: torch.Tensor, ids: torch.Tensor, w: Window) -> torch.Tensor:
    """Sum of −log p over the window's new tokens, float64; logits (length, vocabulary), ids (length,)."""
    import torch

    first = w.first_new - w.start
    scores = logits[first - 1 : -1].double()
    log_normaliser = torch.logsumexp(scores, dim=-1)
    targets = scores.gather(1, ids[first:, None])[:, 0]
    nll = (log_normaliser - targets).sum()
    if not torch.isfinite(nll):
        raise NumericsError(f"logits of the tokens {w.start} to {w.stop}: NaN or infinity in the log-likelihood")
    return nll.cpu()


def context_of(config: Any) -> int | None:
    """Returns the longest input a model of this configuration takes, in tokens; None where it does not say."""
    if config is None:
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) else None
