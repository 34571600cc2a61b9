"""The pipeline: source -> tokenizer -> packed windows -> shuffle -> this process's rows of each batch -> prefetch.

Grain carries it, so its position is a few numbers that `grain.checkpoint.CheckpointSave(iterator)` writes beside the
model. The sequence of global batches depends on the source, tokenizer, sizes and seed, and not on the number of
processes: rows are dealt out after packing and shuffling.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import grain
import numpy as np

from .examples import Examples
from .mixture import Mixture
from .packing import PackedWindows, Windows, empty_window, encode_corpus, stack, target_mask
from .source import Completion, Document, Source, document_bytes
from .streaming import StreamedWindows
from .tokenizers import Tokenizer

SHUFFLED_AT_ONCE = 512  # windows of a stream that are held and shuffled together


class HeldOut(NamedTuple):
    """Validation text, ready to score.

    Bits per byte is the sum of the nats of all targets, divided by ln 2 and by `bytes`. The eos of a document is a
    target; its bos is not, for no token of the same document precedes it. A tokenizer without bos leaves the first
    token of each document unscored, which flatters the figure by about `documents / (tokens + documents)`.
    """

    batches: list[Windows]  # [B, S+1], the last filled up with rows of segment 0
    bytes: int  # of the text in UTF-8
    documents: int
    tokens: int  # targets that count


def training_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    rows: Sequence[int] | np.ndarray | None = None,
    prefetch: int = 2,
) -> grain.DatasetIterator[Windows]:
    """Endless training batches; each round through a source has its own order.

    Sources with random access are read and tokenized here, once, and kept in memory. A source that streams is read as
    it goes, by every process whole, and shuffled within 512 windows.

    Args:
        source: the text.
        tokenizer: what makes ids of it.
        batch_size: B, rows of the global batch.
        sequence_length: S; windows have S+1 tokens.
        seed: of the order, 0 to 2**32 - 1.
        rows: the numbers of the rows of each global batch that this process reads, 0 to B-1; None: all.
        prefetch: batches made ahead in a thread; 0: none.

    Returns:
        An iterator of `Windows` with this process's rows, with `get_state` and `set_state`. The state counts global
        batches: it is the same in every process, and fits any number of processes.

    Raises:
        ValueError: a number is outside its range, or the training split is empty or shorter than one window.
    """
    _check_sizes(batch_size, sequence_length)
    mine = _checked_rows(rows, batch_size)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: allowed are 0 to 2**32 - 1")
    if prefetch < 0:
        raise ValueError(f"prefetch={prefetch}: allowed are 0 and above")
    seeds = np.random.SeedSequence(seed)
    if source.streams:
        stream = _streamed(source, tokenizer, sequence_length, seeds).batch(batch_size, batch_fn=stack)
        batches = stream.map(lambda batch: Windows(*(column[mine] for column in batch)))
        if prefetch:
            batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
        return iter(batches)
    return _dealt(_shuffled(source, tokenizer, sequence_length, seeds), batch_size, mine, prefetch, stack)


def shuffled_examples(
    examples: Examples,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | np.ndarray | None = None,
    prefetch: int = 2,
) -> grain.DatasetIterator[Examples]:
    """Endless batches of labelled examples; each round through them has its own order. Arguments as of
    `training_batches`.

    Raises:
        ValueError: a number is outside its range, or there are fewer examples than a batch has rows.
    """
    if not 1 <= batch_size <= len(examples.labels):
        raise ValueError(
            f"batch_size={batch_size}: allowed are 1 to the number of training examples, {len(examples.labels)}"
        )
    mine = _checked_rows(rows, batch_size)
    numbers = grain.MapDataset.range(len(examples.labels)).shuffle(_number(np.random.SeedSequence(seed))).repeat()
    return _dealt(numbers, batch_size, mine, prefetch, lambda batch: Examples(*(part[batch] for part in examples)))


def held_out(
    source: Source, tokenizer: Tokenizer, *, batch_size: int, sequence_length: int, max_bytes: int | None = None
) -> HeldOut:
    """The validation split, or its beginning, always the same.

    Args:
        source: the text.
        tokenizer: what makes ids of it.
        batch_size: B.
        sequence_length: S; windows have S+1 tokens.
        max_bytes: takes the first documents whose text fits into so many bytes, one at least; None: all. Of a mixture,
            each source's share of it goes by the weights.

    Raises:
        ValueError: a number is outside its range, or the validation split has nothing to predict.
    """
    _check_sizes(batch_size, sequence_length)
    documents = leading_documents(source, max_bytes)
    kinds = [[each for each in documents if isinstance(each, kind)] for kind in (str, Completion)]
    corpora = [encode_corpus(kind, tokenizer) for kind in kinds if kind]
    packed = [PackedWindows(corpus=each, sequence_length=sequence_length, keep_partial=True) for each in corpora]
    rows = [windows[i] for windows in packed for i in range(len(windows))]
    tokens = sum(int(target_mask(row).sum()) for row in rows)
    if not tokens:
        raise ValueError(
            f"source={source}: its validation split has {len(documents)} documents with "
            f"{sum(corpus.tokens.size for corpus in corpora)} tokens; at least one document with two tokens is needed"
        )
    rows += [empty_window(sequence_length + 1)] * (-len(rows) % batch_size)
    batches = [stack(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return HeldOut(batches, sum(len(document_bytes(document)) for document in documents), len(documents), tokens)


def _dealt(
    dataset: grain.MapDataset, batch_size: int, rows: np.ndarray, prefetch: int, batch_fn: Callable
) -> grain.DatasetIterator:
    """This process's rows of each global batch, made ahead in a thread."""
    options = grain.ReadOptions(num_threads=min(1, prefetch), prefetch_buffer_size=prefetch)
    batches = _ProcessRows(dataset, batch_size, rows).batch(len(rows), drop_remainder=True, batch_fn=batch_fn)
    return iter(batches.to_iter_dataset(options))


class _ProcessRows(grain.MapDataset):
    """The rows of each global batch that belong to one process."""

    def __init__(self, windows: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(windows)
        self._batch_size = batch_size
        self._rows = rows.tolist()

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]


def _shuffled(
    source: Source, tokenizer: Tokenizer, sequence_length: int, seeds: np.random.SeedSequence
) -> grain.MapDataset:
    if isinstance(source, Mixture):
        children = zip(source.sources, seeds.spawn(len(source.sources)), strict=True)
        parts = [_shuffled(child, tokenizer, sequence_length, seed) for child, seed in children]
        return grain.MapDataset.mix(parts, source.weights)
    corpus = encode_corpus(source.documents("train"), tokenizer)
    windows = PackedWindows(corpus=corpus, sequence_length=sequence_length)
    if not len(windows):
        raise ValueError(
            f"source={source}: its training split has {corpus.starts.size} documents with {corpus.tokens.size} tokens; "
            f"sequence_length={sequence_length} needs at least {sequence_length + 1}"
        )
    # Numbers are shuffled and windows made of them last: Grain measures the bytes of every element that a source gives.
    return grain.MapDataset.range(len(windows)).shuffle(_number(seeds)).repeat().map(windows.__getitem__)


def _streamed(
    source: Source, tokenizer: Tokenizer, sequence_length: int, seeds: np.random.SeedSequence
) -> grain.IterDataset:
    if not source.streams:
        in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return _shuffled(source, tokenizer, sequence_length, seeds).to_iter_dataset(in_this_thread)
    if isinstance(source, Mixture):
        children = zip(source.sources, seeds.spawn(len(source.sources)), strict=True)
        parts = [_streamed(child, tokenizer, sequence_length, seed) for child, seed in children]
        return grain.IterDataset.mix(parts, source.weights)
    windows = StreamedWindows(source, tokenizer, sequence_length)
    return grain.experimental.WindowShuffleIterDataset(windows, window_size=SHUFFLED_AT_ONCE, seed=_number(seeds))


def leading_documents(source: Source, max_bytes: int | None) -> list[Document]:
    """The first documents of the validation split, whole ones up to so many bytes, at least one; None: all. Of a
    mixture, each source's share of them goes by the weights.

    Raises:
        ValueError: `max_bytes` is below 1.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes}: allowed are 1 and above, or None")
    return _leading(source, max_bytes)


def _leading(source: Source, max_bytes: int | None) -> list[Document]:
    if isinstance(source, Mixture):
        shares = [weight / sum(source.weights) for weight in source.weights]
        limits = [None if max_bytes is None else math.floor(max_bytes * share) for share in shares]
        parts = zip(source.sources, limits, strict=True)
        return [document for child, limit in parts for document in _leading(child, limit)]
    documents: list[Document] = []
    size = 0
    for document in source.documents("validation"):
        if not isinstance(document, Document):
            raise ValueError(f"document {len(documents)} is {document!r}; expected text")
        size += len(document_bytes(document))
        if documents and max_bytes is not None and size > max_bytes:
            break
        documents.append(document)
    return documents


def _number(seeds: np.random.SeedSequence) -> int:
    return int(seeds.generate_state(1, np.uint32)[0])


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value < 1:
            raise ValueError(f"{name}={value}: allowed are 1 and above")


def _checked_rows(rows: Sequence[int] | np.ndarray | None, batch_size: int) -> np.ndarray:
    numbers = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not numbers.size or not 0 <= numbers.min() <= numbers.max() < batch_size:
        raise ValueError(f"rows={numbers.tolist()}: expected numbers from 0 to batch_size - 1 = {batch_size - 1}")
    return numbers
