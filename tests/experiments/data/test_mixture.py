import collections

import pytest

from dynamoe.experiments.data import Bytes, Mixture, held_out, training_batches


@pytest.mark.parametrize("streaming", [False, True])
def test_windows_come_in_proportion_to_the_weights(in_memory, streaming):
    parts = [in_memory(train=(letter * 50,), streaming=streaming and letter == "b") for letter in "abc"]
    source = Mixture(sources=tuple(parts), weights=(5.0, 2.0, 3.0))
    batches = training_batches(source, Bytes(), batch_size=10, sequence_length=4, seed=0)
    counts = collections.Counter()
    for _ in range(40):
        counts.update(chr(row[2]) for row in next(batches).tokens)
    assert source.streams == streaming
    assert [counts[letter] / 400 for letter in "abc"] == pytest.approx([0.5, 0.2, 0.3], abs=0.02)


def test_mixtures_nest(in_memory):
    a, b, c = (in_memory(train=(letter * 50,)) for letter in "abc")
    inner = Mixture(sources=(a, b), weights=(1.0, 1.0))
    batches = training_batches(
        Mixture(sources=(inner, c), weights=(1.0, 1.0)), Bytes(), batch_size=40, sequence_length=4, seed=0
    )
    counts = collections.Counter(chr(row[2]) for row in next(batches).tokens)
    assert counts == {"a": 10, "b": 10, "c": 20}


def test_held_out_bytes_are_shared_by_weight(in_memory):
    a, b = (in_memory(train=("x",), validation=(letter * 10,) * 9) for letter in "ab")
    mixture = Mixture(sources=(a, b), weights=(3.0, 1.0))
    text = held_out(mixture, Bytes(), batch_size=1, sequence_length=128, max_bytes=80)
    shown = Bytes().decode(token for batch in text.batches for token in batch.tokens[0].tolist() if token)
    assert (text.bytes, shown.count("a"), shown.count("b")) == (80, 60, 20)


def test_description_holds_those_of_its_parts(in_memory):
    a, b = in_memory(train=("a",)), in_memory(train=("b",))
    facts = Mixture(sources=(a, b), weights=(1.0, 2.0)).describe()
    assert facts == {"kind": "Mixture", "weights": [1, 2], "sources": [{"kind": "InMemory"}] * 2}


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_wrong_weights_are_refused(in_memory, weights):
    with pytest.raises(ValueError, match=r"weights=\(1.0,.*: expected"):
        Mixture(sources=(in_memory(train=("a",)), in_memory(train=("b",))), weights=weights)


def test_one_source_is_no_mixture(in_memory):
    with pytest.raises(ValueError, match="expected a tuple of two or more sources"):
        Mixture(sources=(in_memory(train=("a",)),), weights=(1.0,))
