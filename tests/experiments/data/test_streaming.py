import json

import numpy as np
import pytest

from dynamoe.experiments.data import Bytes, PackedWindows, encode_corpus
from dynamoe.experiments.data.streaming import StreamedWindows

DOCUMENTS = ("abcdefghij", "", "k", "lmnopqrstuvwxyz0123456789", "end")


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sequence_length", [3, 7])
def test_streamed_windows_are_the_packed_windows_of_the_repeated_text(in_memory, sequence_length):
    source = in_memory(train=DOCUMENTS, streaming=True)
    packed = PackedWindows(corpus=encode_corpus(DOCUMENTS * 3, Bytes()), sequence_length=sequence_length)
    streamed = take(iter(StreamedWindows(source, Bytes(), sequence_length)), len(packed))
    assert all(same(packed[i], window) for i, window in enumerate(streamed))


def test_position_is_exact_after_any_window(in_memory):
    dataset = StreamedWindows(in_memory(train=DOCUMENTS, streaming=True), Bytes(), 5)
    iterator = iter(dataset)
    for _ in range(40):  # a round has about ten windows
        state = json.loads(json.dumps(iterator.get_state()))
        resumed = iter(dataset)
        resumed.set_state(state)
        following = take(iter_from(dataset, state), 3)
        assert all(same(a, b) for a, b in zip(take(resumed, 3), following, strict=True))
        assert same(following[0], next(iterator))


def iter_from(dataset, state):
    iterator = iter(dataset)
    iterator.set_state(state)
    return iterator


def test_position_stays_small(in_memory):
    iterator = iter(StreamedWindows(in_memory(train=("x" * 100_000,), streaming=True), Bytes(), 16))
    take(iterator, 100)
    assert iterator.get_state() == {"stream": None, "used": 1600}


@pytest.mark.parametrize("documents", [(), ("ab",)])
def test_stream_shorter_than_a_window_is_an_error(in_memory, documents):
    iterator = iter(StreamedWindows(in_memory(train=documents, streaming=True), Bytes(), 4))
    with pytest.raises(ValueError, match="training split has . tokens; sequence_length=4 needs at least 5"):
        next(iterator)
