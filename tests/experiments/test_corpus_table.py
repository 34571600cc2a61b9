"""A hash table counted over a text."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from dynamoe.experiments.corpus_table import CorpusTable
from dynamoe.experiments.data import Bytes, Source
from dynamoe.experiments.serialization import from_json, to_json
from dynamoe.moe import Hash, balanced_table


@dataclass(frozen=True, kw_only=True)
class Repeated(Source):
    """`count` documents that are all the same."""

    text: str = "abracadabra"
    count: int = 200

    def documents(self, split):
        assert split == "train"
        return [self.text] * self.count

    def describe(self):
        return {}


def table_of(config, vocab=258, experts=3):
    return np.asarray(Hash(vocab=vocab, table=config).build(width=4, experts=experts, key=jax.random.key(0)).table[...])


def test_the_table_is_balanced_on_the_texts_counts():
    # Each of 200 documents holds 5 a, 2 b, 2 r, 1 c, 1 d, and a mark at its beginning and its end.
    counts = np.zeros(258, int)
    for byte, count in {"a": 5, "b": 2, "r": 2, "c": 1, "d": 1}.items():
        counts[ord(byte)] = 200 * count
    counts[256:] = 200
    found = table_of(CorpusTable(source=Repeated(), tokenizer=Bytes()))
    np.testing.assert_array_equal(found, balanced_table(counts, 3))
    np.testing.assert_array_equal(np.bincount(found.ravel(), weights=counts), [1000, 800, 800])


def test_counting_stops_after_so_many_bytes():
    @dataclass(frozen=True, kw_only=True)
    class Endless(Repeated):
        def documents(self, split):
            yield from super().documents(split)
            raise AssertionError("it reads on")

    # 11 bytes a document: 200 of them are 2,200.
    table_of(CorpusTable(source=Endless(), tokenizer=Bytes(), max_bytes=2200))
    with pytest.raises(AssertionError, match="it reads on"):
        table_of(CorpusTable(source=Endless(), tokenizer=Bytes(), max_bytes=2201))


def test_a_recipe_with_it_is_written_to_json_and_back():
    config = Hash(vocab=258, table=CorpusTable(source=Repeated(), tokenizer=Bytes()))
    assert from_json(to_json(config)) == config


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(ValueError, match=r"Hash\.vocab is 200; Bytes\(\) has 258 ids: it must be at least that"):
        table_of(CorpusTable(source=Repeated(), tokenizer=Bytes()), vocab=200)


def test_no_bytes_are_refused():
    with pytest.raises(ValueError, match=r"CorpusTable\.max_bytes is 0; it must be at least 1"):
        CorpusTable(source=Repeated(), tokenizer=Bytes(), max_bytes=0)
