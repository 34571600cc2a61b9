import dataclasses

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from dynamoe.experiments.data import Bytes, Completion, PackedWindows, Windows, encode_corpus, target_mask
from dynamoe.experiments.data.packing import Corpus

texts = st.lists(st.text(alphabet="ab\u00e4", max_size=7), max_size=6)


def pack(documents, sequence_length, keep_partial=False):
    corpus = encode_corpus(documents, Bytes())
    windows = PackedWindows(corpus=corpus, sequence_length=sequence_length, keep_partial=keep_partial)
    return [windows[i] for i in range(len(windows))]


def test_two_documents_by_hand():
    # 256 a b 257 | 256 c 257, in windows of 4+1: the second begins with the last token of the first
    first, second = pack(["ab", "c"], 4, keep_partial=True)
    np.testing.assert_array_equal(first.tokens, [256, 97, 98, 257, 256])
    np.testing.assert_array_equal(first.segments, [1, 1, 1, 1, 2])
    np.testing.assert_array_equal(first.positions, [0, 1, 2, 3, 0])
    np.testing.assert_array_equal(target_mask(first), [True, True, True, False])
    np.testing.assert_array_equal(second.tokens, [256, 99, 257, 0, 0])
    np.testing.assert_array_equal(second.segments, [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(second.positions, [0, 1, 2, 0, 0])
    np.testing.assert_array_equal(target_mask(second), [True, True, False, False])


def test_document_that_crosses_a_window_restarts_its_positions():
    _, second = pack(["abcdef"], 3)  # 256 a b c | c d e f; the eos is dropped with the partial window
    np.testing.assert_array_equal(second.tokens, [99, 100, 101, 102])
    np.testing.assert_array_equal(second.positions, [0, 1, 2, 3])
    np.testing.assert_array_equal(second.segments, [1, 1, 1, 1])


@given(texts, st.sampled_from([1, 3, 8]))
def test_every_token_but_bos_is_a_target_exactly_once(documents, sequence_length):
    found = []
    for window in pack(documents, sequence_length, keep_partial=True):
        mask = target_mask(window)
        found += window.tokens[1:][mask].tolist()
    expected = [token for document in documents for token in [*document.encode(), 257]]
    assert found == expected


@given(texts, st.sampled_from([1, 3, 8]))
def test_windows_agree_with_a_walk_over_single_tokens(documents, sequence_length):
    walk = [
        (token, number) for number, text in enumerate(documents) for token in Bytes().encode_document(text).tolist()
    ]
    windows = pack(documents, sequence_length, keep_partial=True)
    for i, window in enumerate(windows):
        part = walk[i * sequence_length : i * sequence_length + sequence_length + 1]
        segment, position, before = 0, 0, None
        for column, (token, number) in enumerate(part):
            segment, position = (segment, position + 1) if number == before else (segment + 1, 0)
            before = number
            row = (window.tokens[column], window.segments[column], window.positions[column])
            assert row == (token, segment, position)
        assert not any(field[len(part) :].any() for field in window)
    assert len(pack(documents, sequence_length)) == max(0, len(walk) - 1) // sequence_length


def test_target_mask_is_the_same_for_jax():
    segments = np.array([[1, 1, 2, 2, 0, 0], [1, 2, 3, 0, 0, 0]], np.int32)
    windows = Windows(segments, segments, segments, np.ones_like(segments))
    on_device = Windows(*(jnp.asarray(array) for array in windows))
    np.testing.assert_array_equal(target_mask(windows), np.asarray(target_mask(on_device)))
    np.testing.assert_array_equal(target_mask(windows)[0], [True, False, True, False, False])


def test_prompts_are_read_and_not_learned():
    tokenizer = Bytes()
    pairs = [Completion("ab", "c"), Completion("", "de")]
    windows = PackedWindows(corpus=encode_corpus(pairs, tokenizer), sequence_length=9, keep_partial=True)
    window = windows[0]
    assert len(windows) == 1
    np.testing.assert_array_equal(window.tokens, [256, *b"abc", 257, 256, *b"de", 257, 0])
    np.testing.assert_array_equal(window.segments, [1] * 5 + [2] * 4 + [0])
    np.testing.assert_array_equal(window.learned, [0, 0, 0, 1, 1, 0, 1, 1, 1, 0])
    counted = window.tokens[1:][target_mask(window)]
    np.testing.assert_array_equal(counted, [*b"c", 257, *b"de", 257])


def test_pairs_stay_whole_and_a_long_prompt_loses_its_beginning():
    pairs = [Completion("a", "b"), Completion("c", "d"), Completion("xyz" * 9, "e")]
    windows = PackedWindows(corpus=encode_corpus(pairs, Bytes()), sequence_length=6)
    assert len(windows) == 3
    np.testing.assert_array_equal(windows[0].tokens, [256, *b"ab", 257, 0, 0, 0])
    np.testing.assert_array_equal(windows[2].tokens, [*b"yzxyz", *b"e", 257])
    np.testing.assert_array_equal(windows[2].learned, [0] * 5 + [1] * 2)
    with pytest.raises(ValueError, match="document 0: its completion has 10 tokens; sequence_length=6 holds at most"):
        len(PackedWindows(corpus=encode_corpus([Completion("a", "b" * 9)], Bytes()), sequence_length=6))


def test_a_source_gives_one_kind_of_documents():
    with pytest.raises(ValueError, match="a source gives texts and prompts with completions; mix two sources instead"):
        encode_corpus(["a", Completion("a", "b")], Bytes())


def test_windows_are_int32_whatever_the_corpus_stores():
    corpus = encode_corpus(["abc"], Bytes())
    assert corpus.tokens.dtype == np.uint16
    assert {field.dtype for field in PackedWindows(corpus=corpus, sequence_length=2)[0]} == {np.dtype(np.int32)}


def test_window_outside_the_corpus_is_refused():
    windows = PackedWindows(corpus=Corpus(np.arange(9), np.array([0])), sequence_length=4)
    with pytest.raises(IndexError, match="window 2: there are 2"):
        windows[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Bytes):
    def encode(self, text):
        return super().encode(text) + 200


def test_id_outside_the_vocabulary_names_document_id_and_range():
    with pytest.raises(ValueError, match=r"document 1: Broken\(\) gave the id 297; allowed are 0 to 257"):
        encode_corpus(["", "a"], Broken())


def test_document_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="document 1 is None; expected text"):
        encode_corpus((text for text in ["a", None]), Bytes())  # pyright: ignore[reportArgumentType]
