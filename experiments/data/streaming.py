"""Windows of a source that can only be read in order."""

from collections import deque
from typing import Any

import grain
import numpy as np

from .packing import Windows, encode_checked, lay_out
from .source import Source
from .tokenizers import Tokenizer


class StreamedWindows(grain.IterDataset):
    """Endless packed windows of the training split: the source is read again when it ends.

    The same windows as `PackedWindows`, except that the tokens left over at the end of the source begin its next round.

    Args:
        source: what is read.
        tokenizer: what makes ids of it.
        sequence_length: S.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, sequence_length: int):
        super().__init__()
        self.source = source
        self.tokenizer = tokenizer
        self.length = sequence_length + 1

    def __iter__(self) -> "_Iterator":
        return _Iterator(self)


class _Iterator(grain.DatasetIterator):
    """State: the source's position before the first document that is still needed, and the tokens of it already used.

    So a checkpoint stays small; restoring reads and tokenizes that document again.
    """

    def __init__(self, dataset: StreamedWindows):
        super().__init__()
        self._dataset = dataset
        self._start({"stream": None, "used": 0})

    def get_state(self) -> dict[str, Any]:
        return {"stream": self._buffer[0][1] if self._buffer else self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._start(state)

    def __next__(self) -> Windows:
        length = self._dataset.length
        while self._held - self._used < length:
            self._read()
        pieces: list[np.ndarray] = []
        skip, missing = self._used, length
        for ids, _ in self._buffer:
            pieces.append(ids[skip : skip + missing])
            skip, missing = 0, missing - pieces[-1].size
            if not missing:
                break
        starts = np.cumsum([piece.size for piece in pieces[:-1]])
        self._advance(length - 1)
        return lay_out(np.concatenate(pieces), starts, length)

    def _start(self, state: dict[str, Any]) -> None:
        self._before = state["stream"]
        self._used = state["used"]
        self._buffer: deque[tuple[np.ndarray, Any]] = deque()  # documents and the positions before them
        self._held = 0  # tokens in the buffer
        self._number = 0
        # How many tokens this round gave. A restored round is known to be long enough.
        self._round = self._dataset.length if self._before is not None else 0
        self._reader = self._dataset.source.stream("train", self._before)

    def _read(self) -> None:
        document = next(self._reader, None)
        if document is None:
            self._next_round()
            return
        text, after = document
        if not isinstance(text, str):
            raise ValueError(f"source={self._dataset.source} streams prompts with completions; allowed are texts")
        ids = encode_checked([(self._number, text)], self._dataset.tokenizer)[0].ids
        self._number += 1
        if ids.size:
            self._buffer.append((ids, self._before))
            self._held += ids.size
            self._round += ids.size
        self._before = after

    def _next_round(self) -> None:
        if self._round < self._dataset.length:
            raise ValueError(
                f"source={self._dataset.source}: its training split has {self._round} tokens; "
                f"sequence_length={self._dataset.length - 1} needs at least {self._dataset.length}"
            )
        self._before, self._round, self._number = None, 0, 0
        self._reader = self._dataset.source.stream("train", None)

    def _advance(self, count: int) -> None:
        self._used += count
        while self._used >= self._buffer[0][0].size:
            size = self._buffer.popleft()[0].size
            self._used -= size
            self._held -= size
