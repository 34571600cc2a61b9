"""Texts in windows that do not overlap, by hand."""

import numpy as np
import pytest

from dynamoe.experiments.data import Bytes, concatenated, target_mask


class NoMarks(Bytes):
    """Bytes alone."""

    bos = None
    eos = None


def scored(text) -> list[list[int]]:
    pairs = (pair for batch in text.batches for pair in zip(batch.tokens, target_mask(batch), strict=True))
    return [row[1:][mask].tolist() for row, mask in pairs]


def test_each_window_stands_alone_and_its_first_token_is_no_target():
    text, left_out = concatenated(["abcd", "ef"], NoMarks(), batch_size=2, sequence_length=3)
    assert scored(text) == [list(b"bc"), list(b"\n\n")]  # abc, d\n\n; ef is left out
    assert (text.tokens, left_out, text.bytes, text.documents) == (4, 2, 8, 2)
    assert all((batch.positions == [0, 1, 2]).all() for batch in text.batches)


def test_the_mark_of_the_beginning_stands_once_and_none_at_the_end():
    text, left_out = concatenated(["ab", "c"], Bytes(), batch_size=4, sequence_length=6)
    np.testing.assert_array_equal(text.batches[0].tokens[0], [256, *b"ab\n\nc"])
    assert (text.tokens, left_out) == (5, 0)
    assert scored(text)[1:] == [[], [], []]  # the batch is filled up with rows that do not count


def test_a_text_shorter_than_a_window_is_one_window():
    text, left_out = concatenated(["abc"], NoMarks(), batch_size=1, sequence_length=100)
    assert (scored(text), left_out) == ([list(b"bc")], 0)


@pytest.mark.parametrize(
    ("documents", "sizes", "message"),
    [
        (["abc"], (0, 4), "batch_size=0: allowed are 1 and above"),
        (["abc"], (1, 1), "sequence_length=1: allowed are 2 and above"),
        (["a"], (1, 4), "the text has 1 tokens by NoMarks"),
    ],
)
def test_refuses_with_the_name_and_what_is_allowed(documents, sizes, message):
    with pytest.raises(ValueError, match=message):
        concatenated(documents, NoMarks(), batch_size=sizes[0], sequence_length=sizes[1])
