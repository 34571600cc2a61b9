"""Tokens are shown so that a person can read them, each on one line."""

import pytest

from dynamoe.experiments.data import Bytes
from dynamoe.experiments.data.token_names import token_name


@pytest.mark.parametrize(
    ("token", "name"),
    [(65, "A"), (32, "␣"), (10, "\\n"), (0, "\\x00"), (0xC3, "\\xc3"), (256, "<bos>"), (257, "<eos>"), (263, "<263>")],
)
def test_bytes_are_readable(token: int, name: str) -> None:
    assert token_name(Bytes(), token) == name


def test_a_token_of_a_vocabulary_keeps_its_space_and_loses_its_line_ends() -> None:
    class Words(Bytes):
        def decode(self, ids: object) -> str:
            return " wörd\n"

    assert token_name(Words(), 7) == "␣wörd\\n"
