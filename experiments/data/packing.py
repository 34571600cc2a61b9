"""Packing: documents to windows of S+1 tokens that know where documents begin.

Window i holds the tokens i*S to i*S+S of all documents in a row: windows overlap by one token, so that every token but
the first is a target exactly once. Letters: B batch, S sequence, N tokens of a corpus.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from .source import Completion, Document
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
    learned: Int[np.ndarray, "*B S1"]  # 1 where the token is to be predicted, 0 in prompts and padding

    @property
    def inputs(self) -> tuple[Any, Any, Any]:
        """Tokens, segments and positions [B, S] that a model reads."""
        return self.tokens[..., :-1], self.segments[..., :-1], self.positions[..., :-1]


class Corpus(NamedTuple):
    """All documents in a row."""

    tokens: np.ndarray  # [N], uint16 where the vocabulary allows, else int32
    starts: Int[np.ndarray, "documents"]  # where each document begins, ascending
    learned: Bool[np.ndarray, "N"] | None = None  # which tokens are to be predicted; None: all


class Encoded(NamedTuple):
    """The tokens of a document."""

    ids: Int[np.ndarray, "S"]
    prompt: int | None = None  # how many come before what is learned; None: it is a text, and all is


def target_mask(windows: Windows) -> Any:
    """Which targets count: token t predicts token t+1 of its own document, which is to be learned, and neither is
    padding.

    Args:
        windows: NumPy or JAX.

    Returns:
        bool [..., S]; its entry t is about the target tokens[..., t+1].
    """
    segments = windows.segments
    same = (segments[..., :-1] == segments[..., 1:]) & (segments[..., :-1] > 0)
    return same & (windows.learned[..., 1:] > 0)


def encode_corpus(documents: Iterable[Document], tokenizer: Tokenizer) -> Corpus:
    """Tokenizes documents and lays them in a row. Documents without tokens are left out.

    Args:
        documents: texts, or prompts with their completions.
        tokenizer: what makes ids of them.

    Raises:
        ValueError: a document is none, or an id is outside the tokenizer's vocabulary.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    encoded: list[Encoded] = []
    numbered = enumerate(documents)
    while batch := list(itertools.islice(numbered, DOCUMENTS_AT_ONCE)):
        encoded += [each for each in encode_checked(batch, tokenizer) if each.ids.size]
    tokens = np.concatenate([each.ids.astype(dtype) for each in encoded]) if encoded else np.zeros(0, dtype)
    starts = np.cumsum([0, *(each.ids.size for each in encoded)])[:-1]
    if all(each.prompt is None for each in encoded):
        return Corpus(tokens, starts)
    if any(each.prompt is None for each in encoded):
        raise ValueError("a source gives texts and prompts with completions; mix two sources instead, see Mixture")
    learned = [np.arange(each.ids.size) >= (each.prompt or 0) for each in encoded]
    return Corpus(tokens, starts, np.concatenate(learned))


def encode_checked(numbered: list[tuple[int, Any]], tokenizer: Tokenizer) -> list[Encoded]:
    """Tokenizes numbered documents; refuses what is none and ids outside the vocabulary.

    A prompt and its completion are tokenized apart and joined, so that what is learned does not depend on the border.
    """
    for number, document in numbered:
        if not isinstance(document, Document):
            raise ValueError(f"document {number} is {document!r}; expected text")
    texts = [document for _, document in numbered if isinstance(document, str)]
    texts_encoded = iter(tokenizer.encode_documents(texts))
    encoded = [
        Encoded(next(texts_encoded)) if isinstance(document, str) else _encode_pair(document, tokenizer)
        for _, document in numbered
    ]
    for (number, _), (ids, _) in zip(numbered, encoded, strict=True):
        if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
            raise ValueError(
                f"document {number}: {tokenizer} gave the id {wrong}; allowed are 0 to {tokenizer.vocab_size - 1}"
            )
    return encoded


def _encode_pair(pair: Completion, tokenizer: Tokenizer) -> Encoded:
    prompt, completion = tokenizer.encode_many([pair.prompt, pair.completion])
    before = [] if tokenizer.bos is None else [tokenizer.bos]
    after = [] if tokenizer.eos is None else [tokenizer.eos]
    return Encoded(np.concatenate([before, prompt, completion, after]).astype(np.int32), len(before) + prompt.size)


def lay_out(
    tokens: np.ndarray, starts: np.ndarray, length: int, learned: Bool[np.ndarray, "n"] | None = None
) -> Windows:
    """One window, padded on the right.

    Args:
        tokens: [n], n <= length.
        starts: indices into `tokens`, above 0 and ascending, where another document begins.
        length: S+1.
        learned: which tokens are to be predicted; None: all.
    """
    size = tokens.size
    window = Windows(*np.zeros((len(Windows._fields), length), np.int32))
    window.tokens[:size] = tokens
    window.segments[:size] = 1
    window.positions[:size] = np.arange(size)
    window.learned[:size] = 1 if learned is None else learned
    for start in starts:
        window.segments[start:size] += 1
        window.positions[start:size] = np.arange(size - start)
    return window


def empty_window(length: int) -> Windows:
    """A window of padding alone."""
    return Windows(*np.zeros((len(Windows._fields), length), np.int32))


def stack(windows: Iterable[Windows]) -> Windows:
    """Windows [S+1] to one bundle [B, S+1]."""
    return Windows(*(np.array(column) for column in zip(*windows, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedWindows:
    """The windows of a corpus, by random access.

    Texts fill the windows without gaps. Prompts with completions are not cut: each lies whole in a window, which is
    padded where the next does not fit; of one that is longer than a window the prompt loses its beginning.

    Args:
        corpus: the documents.
        sequence_length: S.
        keep_partial: whether the last window may be short and padded; else it is dropped.
    """

    corpus: Corpus
    sequence_length: int
    keep_partial: bool = False

    @functools.cached_property
    def _whole(self) -> list[tuple[list[int], list[int]]]:
        """Of each window of whole documents where its documents begin and end in the corpus."""
        length, windows, room = self.sequence_length + 1, [], 0
        learned: Any = self.corpus.learned
        stops = np.append(self.corpus.starts[1:], self.corpus.tokens.size)
        for number, (start, stop) in enumerate(zip(self.corpus.starts.tolist(), stops.tolist(), strict=True)):
            first = max(start, stop - length)
            if first > start and learned[first]:
                raise ValueError(
                    f"document {number}: its completion has {int(learned[start:stop].sum())} tokens; "
                    f"sequence_length={self.sequence_length} holds at most as many"
                )
            if stop - first > room:
                windows.append(([], []))
                room = length
            windows[-1][0].append(first)
            windows[-1][1].append(stop)
            room -= stop - first
        return windows

    def __len__(self) -> int:
        if self.corpus.learned is not None:
            return len(self._whole)
        targets = max(0, self.corpus.tokens.size - 1)
        return -(-targets // self.sequence_length) if self.keep_partial else targets // self.sequence_length

    def __getitem__(self, index: Any) -> Windows:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"window {index}: there are {len(self)}")
        if self.corpus.learned is not None:
            return self._of_whole(index)
        begin = index * self.sequence_length
        tokens = self.corpus.tokens[begin : begin + self.sequence_length + 1]
        first, last = self.corpus.starts.searchsorted((begin + 1, begin + tokens.size))
        return lay_out(tokens, self.corpus.starts[first:last] - begin, self.sequence_length + 1)

    def _of_whole(self, index: int) -> Windows:
        learned: Any = self.corpus.learned
        parts = [slice(*bounds) for bounds in zip(*self._whole[index], strict=True)]
        starts = np.cumsum([part.stop - part.start for part in parts])[:-1]
        tokens, counted = (np.concatenate([array[part] for part in parts]) for array in (self.corpus.tokens, learned))
        return lay_out(tokens, starts, self.sequence_length + 1, counted)
