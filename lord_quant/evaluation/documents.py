# SPDX-License-Identifier: Apache-2.0
"""Documents in the shape that lm-eval's tasks want, read from local files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lord_quant.corpus import STDLIB, TEXT_KEY, load_corpus


if TYPE_CHECKING:
    from datasets import DatasetDict

DEFAULT_DOCUMENTS = 12
DEFAULT_CHARACTERS = 4096


def select_documents(texts: Sequence[str], max_documents: int | None, max_characters: int | None) -> list[str]:
    """Takes the `max_documents` texts with the smallest hashes, in that order, and cuts each to `max_characters`.

    A hash spreads the choice over the whole corpus, where the first files in order would be one folder. Without
    `max_documents` all texts are kept in their order.
    """
    chosen = list(texts)
    if max_documents is not None:
        chosen = sorted(chosen, key=lambda text: hashlib.sha256(text.encode()).digest())[:max_documents]
    return [text[:max_characters] for text in chosen]


def load_code(
    dataset: str = STDLIB,
    text_key: str = TEXT_KEY,
    max_documents: int | None = None,
    max_characters: int | None = None,
    **_: Any,
) -> DatasetDict:
    """Reads the documents of the task `lord_code_ppl`; lm-eval passes metadata and model arguments, most unused.

    Raises:
        CalibrationError: The dataset does not exist, holds no text, or is binary.
    """
    corpus = load_corpus(dataset, split="heldout", text_key=text_key)
    if dataset == STDLIB:
        max_documents = DEFAULT_DOCUMENTS if max_documents is None else max_documents
        max_characters = DEFAULT_CHARACTERS if max_characters is None else max_characters
    texts = select_documents(corpus.documents, max_documents, max_characters)
    return as_test_split([{"text": text} for text in texts])


def as_test_split(rows: list[dict[str, Any]]) -> DatasetDict:
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(rows)})
