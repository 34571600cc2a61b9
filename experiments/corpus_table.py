"""The table of a hash router, balanced on a text."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from ..moe import HashTable, balanced_table
from .data import Document, Source, Tokenizer, document_text

_DOCUMENTS = 64
"""Documents that are tokenized at once."""


@dataclass(frozen=True, kw_only=True)
class CorpusTable(HashTable):
    """Counts token ids in the training documents of a source, and gives every expert equally many tokens: the balanced
    assignment of Roller et al. 2021, https://arxiv.org/abs/2106.04426.

    All layers get the same table. It is counted whenever a model is built, once per process; the table of a checkpoint
    takes its place.
    """

    source: Source
    """The text."""
    tokenizer: Tokenizer
    """Makes token ids of text; the model's."""
    max_bytes: int = 10_000_000
    """Whole documents are counted until they come to so many bytes of UTF-8."""

    def __post_init__(self):
        if self.max_bytes < 1:
            raise ValueError(f"CorpusTable.max_bytes is {self.max_bytes}; it must be at least 1")

    def build(self, *, vocab: int, experts: int, k: int, key: jax.Array) -> Int[np.ndarray, "V K"]:
        if vocab < self.tokenizer.vocab_size:
            raise ValueError(
                f"Hash.vocab is {vocab}; {self.tokenizer} has {self.tokenizer.vocab_size} ids: it must be at least that"
            )
        return _balanced(self, vocab, experts, k)


@functools.lru_cache(maxsize=8)
def _balanced(config: CorpusTable, vocab: int, experts: int, k: int) -> Int[np.ndarray, "V K"]:
    counts = np.zeros(vocab, np.int64)
    for batch in _batches(config.source.documents("train"), config.max_bytes):
        for ids in config.tokenizer.encode_documents(batch):
            counts += np.bincount(ids, minlength=vocab)
    return balanced_table(counts, experts, k)


def _batches(documents: Iterable[Document], max_bytes: int) -> Iterable[list[str]]:
    """Documents, some at a time, until they come to so many bytes."""
    batch, size = [], 0
    for document in documents:
        batch.append(document_text(document))
        size += len(batch[-1].encode())
        if size >= max_bytes:
            break
        if len(batch) == _DOCUMENTS:
            yield batch
            batch = []
    yield batch
