"""The n-gram baseline against a hand calculation, the textbook formula in dictionaries, and real text."""

import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamoe.experiments.ngram import NGram

pytestmark = pytest.mark.smoke

BOS, EOS, V = 256, 257, 258


def ids(*symbols: int) -> np.ndarray:
    return np.array(symbols, np.int32)


def byte_document(text: bytes) -> np.ndarray:
    return np.concatenate([ids(BOS), np.frombuffer(text, np.uint8).astype(np.int32), ids(EOS)])


def standard_library(names: list[str]) -> list[bytes]:
    return [(Path(sysconfig.get_paths()["stdlib"]) / name).read_bytes() for name in names]


@pytest.fixture(scope="module")
def train_text() -> list[bytes]:
    return standard_library(["argparse.py", "ast.py", "dataclasses.py", "enum.py", "inspect.py", "typing.py"])


def test_toy_text_has_the_probabilities_computed_by_hand():
    # Pairs of 0 1 2 1 2: 01 once, 12 twice, 21 once. Left neighbours: 1 has {0, 2}, 2 has {1}, 0 none.
    # Too few counts to estimate discounts, so 1/2 of count 1 and 1 of count 2.
    # No context: total 3, reserved 1 + 1/2, shared over 3 ids: p(0) = 1/6, p(1) = 1/3 + 1/6, p(2) = 1/6 + 1/6.
    # After 1: total 2, 2 keeps 1, reserved 1: p(0) = 1/2 * 1/6, p(1) = 1/2 * 1/2, p(2) = 1/2 + 1/2 * 1/3.
    # After 0: total 1, 1 keeps 1/2, reserved 1/2: p(0) = 1/12, p(1) = 1/2 + 1/4, p(2) = 1/6.
    model = NGram.fit([ids(0, 1, 2, 1, 2)], vocab_size=3, order=1)
    np.testing.assert_allclose(model.probabilities([1]), [1 / 12, 1 / 4, 2 / 3])
    np.testing.assert_allclose(model.probabilities([0]), [1 / 12, 3 / 4, 1 / 6])
    # 0 1 2 has probability 3/4 * 2/3 = 1/2: one bit.
    assert model.nats([ids(0, 1, 2)]) == pytest.approx(np.log(2))
    assert model.bits_per_byte([ids(0, 1, 2)], 2) == pytest.approx(0.5)


def textbook_probability(documents: list[list[int]], order: int, vocab_size: int, context: list[int], symbol: int):
    """Interpolated modified Kneser-Ney as the paper writes it: dictionaries and a recursion, one probability a call."""
    occurrences: Counter = Counter()
    for document in documents:
        padded = [document[0]] * order + document
        for position in range(order + 1, len(padded)):
            occurrences[tuple(padded[position - order : position + 1])] += 1

    def counts_of(length: int) -> Counter:
        if length == order:
            return occurrences
        left_neighbours = defaultdict(set)
        for gram in counts_of(length + 1):
            left_neighbours[gram[1:]].add(gram[0])
        return Counter({gram: len(neighbours) for gram, neighbours in left_neighbours.items()})

    def probability(length: int, history: tuple[int, ...]) -> float:
        if length < 0:
            return 1 / vocab_size
        counts = counts_of(length)
        n = Counter(counts.values())
        discount = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5}
        if n[1] and n[2] and n[3]:
            y = n[1] / (n[1] + 2 * n[2])
            estimate = {0: 0.0, **{i: i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)}}
            if min(estimate[i] for i in (1, 2, 3)) > 0:
                discount = estimate
        followers = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == history}
        shorter = probability(length - 1, history[1:])
        total = sum(followers.values())
        if not total:
            return shorter
        reserved = sum(discount[min(count, 3)] for count in followers.values())
        own = followers.get(symbol, 0)
        return (own - discount[min(own, 3)]) / total + reserved / total * shorter

    return probability(order, tuple(context))


documents_of_four_symbols = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=40), min_size=1, max_size=4)


@given(documents=documents_of_four_symbols, context=st.tuples(*[st.integers(0, 4)] * 3), order=st.integers(1, 3))
def test_probabilities_equal_the_textbook_formula(documents, context, order):
    context = list(context[:order])
    model = NGram.fit([ids(*document) for document in documents], vocab_size=5, order=order)
    expected = [textbook_probability(documents, order, 5, context, symbol) for symbol in range(5)]
    np.testing.assert_allclose(model.probabilities(context), expected, rtol=1e-12)


def test_estimated_discounts_equal_the_textbook_formula():
    # A skewed text long enough to hold n-grams of every count, which the small ones above may lack.
    text = np.minimum(np.random.default_rng(0).geometric(0.5, 400), 6).tolist()
    model = NGram.fit([ids(*text)], vocab_size=8, order=2)
    assert not np.array_equal(model.levels[2].discounts, [0.0, 0.5, 1.0, 1.5])
    for context in ([1, 1], [1, 2], [6, 5], [7, 0]):
        expected = [textbook_probability([text], 2, 8, context, symbol) for symbol in range(8)]
        np.testing.assert_allclose(model.probabilities(context), expected, rtol=1e-12)


@pytest.mark.parametrize("context", [list(b"def"), [BOS, BOS, BOS], [BOS, 0, EOS], [EOS, EOS, EOS]])
def test_probabilities_sum_to_one_after_seen_and_unseen_contexts(train_text, context):
    probabilities = NGram.fit(map(byte_document, train_text), vocab_size=V).probabilities(context)
    assert probabilities.shape == (V,) and probabilities.min() > 0
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)


def test_nats_add_up_the_probability_of_every_id_after_the_first(train_text):
    model = NGram.fit(map(byte_document, train_text), vocab_size=V)
    document = byte_document("naïve = \x00".encode())
    padded = [BOS, BOS, *document.tolist()]
    steps = [model.probabilities(padded[i : i + 3])[padded[i + 3]] for i in range(len(document) - 1)]
    assert model.nats([document]) == pytest.approx(-np.sum(np.log(steps)))


def test_a_longer_context_predicts_unseen_real_text_better(train_text):
    unseen = standard_library(["textwrap.py", "shlex.py"])
    documents, size = [byte_document(text) for text in unseen], sum(map(len, unseen))
    bits = [
        NGram.fit(map(byte_document, train_text), vocab_size=V, order=order).bits_per_byte(documents, size)
        for order in (1, 2, 3)
    ]
    assert 3.0 > bits[1] > bits[2] > 1.5 and bits[0] > bits[1] + 0.3


def test_documents_do_not_see_each_other():
    apart = NGram.fit([ids(0, 1), ids(2, 3), ids(0, 1)], vocab_size=4, order=1)
    assert apart.probabilities([1])[2] == apart.probabilities([1])[0], "2 follows 1 only across a document's end"


@pytest.mark.parametrize(
    "documents, options, message",
    [
        ([ids(0, 9)], {"vocab_size": 9}, r"documents\[0\] has ids from 0 to 9: expected ids in \[0, 9\)"),
        ([ids(0), ids(-1)], {"vocab_size": 9}, r"documents\[1\] has ids from -1 to -1"),
        ([np.zeros((2, 2), np.int32)], {"vocab_size": 9}, r"documents\[0\] is int32\[2, 2\]: expected a 1-D array"),
        ([np.zeros(2, np.float32)], {"vocab_size": 9}, r"documents\[0\] is float32\[2\]"),
        ([ids(0)], {"vocab_size": 9}, "no document holds more than its first id"),
        ([ids(0, 1)], {"vocab_size": 9, "order": 0}, "order=0 with vocab_size=9 cannot be counted"),
        ([ids(0, 1)], {"vocab_size": 50_000, "order": 4}, "order=4 with vocab_size=50000 cannot be counted"),
    ],
)
def test_bad_text_is_refused_by_name(documents, options, message):
    with pytest.raises(ValueError, match=message):
        NGram.fit(documents, **options)


def test_a_context_of_the_wrong_length_is_refused():
    model = NGram.fit([ids(0, 1)], vocab_size=2)
    with pytest.raises(ValueError, match=r"context is \[1\]: expected 3 ids in \[0, 2\)"):
        model.probabilities([1])
    with pytest.raises(ValueError, match="text_bytes=0 must be at least 1"):
        model.bits_per_byte([ids(0, 1)], 0)
