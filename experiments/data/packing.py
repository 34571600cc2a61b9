"""Packing: documents to windows of S+1 tokens that know where documents begin.

Window i holds the tokens i*S to i*S+S of all documents in a row: windows overlap by one token, so that every token but
the first is a target exactly once. Letters: B batch, S sequence, N tokens of a corpus.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple, overload

import jax
import numpy as np
from jaxtyping import Bool, Int

from .tokenizers import Tokenizer

DOCUMENTS_AT_ONCE = 1024  # how many are tokenized in one call: enough for a parallel tokenizer


class Windows(NamedTuple):
    """Packed tokens, all int32 [B, S+1] (a single window: [S+1]).

    A token attends to tokens of its own segment only. Inputs are the first S columns, targets the last S; which
    targets count says `target_mask`.
    """

    tokens: Int[np.ndarray, "*B S1"]
    segments: Int[np.ndarray, "*B S1"]  # 1, 2, ... for the documents in a window, 0 for padding
    positions: Int[np.ndarray, "*B S1"]  # from 0 at the beginning of each document and of the window


class Corpus(NamedTuple):
    """All documents in a row."""

    tokens: np.ndarray  # [N], uint16 where the vocabulary allows, else int32
    starts: Int[np.ndarray, "documents"]  # where each document begins, ascending


@overload
def target_mask(segments: Int[np.ndarray, "*B S1"]) -> Bool[np.ndarray, "*B S"]: ...
@overload
def target_mask(segments: Int[jax.Array, "*B S1"]) -> Bool[jax.Array, "*B S"]: ...
def target_mask(segments: Any) -> Any:
    """Which targets count: token t predicts token t+1 of its own document, and neither is padding.

    Args:
        segments: [..., S+1], NumPy or JAX.

    Returns:
        bool [..., S]; its entry t is about the target tokens[..., t+1].
    """
    return (segments[..., :-1] == segments[..., 1:]) & (segments[..., :-1] > 0)


def encode_corpus(documents: Iterable[str], tokenizer: Tokenizer) -> Corpus:
    """Tokenizes documents and lays them in a row. Documents without tokens are left out.

    Args:
        documents: texts.
        tokenizer: what makes ids of them.

    Raises:
        ValueError: a document is not text, or an id is outside the tokenizer's vocabulary.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    encoded: list[np.ndarray] = []
    numbered = enumerate(documents)
    while batch := list(itertools.islice(numbered, DOCUMENTS_AT_ONCE)):
        encoded += [ids.astype(dtype) for ids in encode_checked(batch, tokenizer) if ids.size]
    lengths = [ids.size for ids in encoded]
    tokens = np.concatenate(encoded) if encoded else np.zeros(0, dtype)
    return Corpus(tokens, np.cumsum([0, *lengths])[:-1])


def encode_checked(numbered: list[tuple[int, Any]], tokenizer: Tokenizer) -> list[Int[np.ndarray, "S"]]:
    """Tokenizes numbered documents; refuses what is no text and ids outside the vocabulary."""
    for number, document in numbered:
        if not isinstance(document, str):
            raise ValueError(f"document {number} is {document!r}; expected text")
    encoded = tokenizer.encode_documents([document for _, document in numbered])
    for (number, _), ids in zip(numbered, encoded, strict=True):
        if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
            raise ValueError(
                f"document {number}: {tokenizer} gave the id {wrong}; allowed are 0 to {tokenizer.vocab_size - 1}"
            )
    return encoded


def lay_out(tokens: np.ndarray, starts: np.ndarray, length: int) -> Windows:
    """One window, padded on the right.

    Args:
        tokens: [n], n <= length.
        starts: indices into `tokens`, above 0 and ascending, where another document begins.
        length: S+1.
    """
    size = tokens.size
    window = Windows(*np.zeros((3, length), np.int32))
    window.tokens[:size] = tokens
    window.segments[:size] = 1
    window.positions[:size] = np.arange(size)
    for start in starts:
        window.segments[start:size] += 1
        window.positions[start:size] = np.arange(size - start)
    return window


def stack(windows: Iterable[Windows]) -> Windows:
    """Windows [S+1] to one bundle [B, S+1]."""
    return Windows(*(np.array(column) for column in zip(*windows, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedWindows:
    """The windows of a corpus, by random access.

    Args:
        corpus: the documents.
        sequence_length: S.
        keep_partial: whether the last window may be short and padded; else it is dropped.
    """

    corpus: Corpus
    sequence_length: int
    keep_partial: bool = False

    def __len__(self) -> int:
        targets = max(0, self.corpus.tokens.size - 1)
        return -(-targets // self.sequence_length) if self.keep_partial else targets // self.sequence_length

    def __getitem__(self, index: Any) -> Windows:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"window {index}: there are {len(self)}")
        begin = index * self.sequence_length
        tokens = self.corpus.tokens[begin : begin + self.sequence_length + 1]
        first, last = self.corpus.starts.searchsorted((begin + 1, begin + tokens.size))
        return lay_out(tokens, self.corpus.starts[first:last] - begin, self.sequence_length + 1)
