"""Text of an answer: pieces that join to the whole, stop strings, characters of several tokens."""

import jax
import pytest

from dynamoe.models import Attention, Decoder
from dynamoe.models.ffn import Dense
from dynamoe.models.generation import Categorical, Engine, Finish, Request, TextRequest, generate_text
from dynamoe.models.generation.text import _Stream, held_back


def decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def streamed(answer: bytes, *, stop=(), prompt=b"> ", stop_tokens=()):
    """What a stream shows for each token, up to the stop string; the last token ends the request."""
    request = Request(prompt=tuple(prompt), max_tokens=len(answer), stop_tokens=stop_tokens)
    stream, shown = _Stream(TextRequest(request=request, stop=stop), decode), []
    for place, token in enumerate(answer):
        finish = Finish.STOP if token in stop_tokens else Finish.LENGTH if place == len(answer) - 1 else None
        text, stopped = stream.add(token, finish)
        shown.append(text)
        if stopped:
            break
    return shown


def test_each_token_is_shown_as_it_comes():
    assert streamed(b"abc") == ["a", "b", "c"]


def test_a_character_waits_for_all_of_its_bytes():
    assert streamed("aé€".encode()) == ["a", "", "é", "", "", "€"]
    assert streamed("é".encode()[:1]) == ["\ufffd"]  # none will come


def test_a_stop_string_and_what_follows_it_is_never_shown():
    assert streamed(b"one\n\ntwo", stop=("\n\n",)) == ["o", "n", "e", "", ""]
    assert streamed(b"a\nb", stop=("\n\n",)) == ["a", "", "\nb"]  # it was none
    assert streamed(b"x END", stop=("END", "x E")) == ["", "", ""]
    assert streamed(b"abE", stop=("END",)) == ["a", "b", "E"]  # the last token: no more can come


def test_the_prompt_has_no_stop_string():
    assert streamed(b"ab", stop=(">",)) == ["a", "b"]


def test_a_stop_token_gives_no_text():
    assert streamed(b"ab\x00", stop_tokens=(0,)) == ["a", "b", ""]


def test_what_may_begin_a_stop_string_is_held_back():
    assert held_back("abab", ("abc", "b")) == 2
    assert held_back("xyz", ("abc",)) == 0
    assert held_back("ab", ()) == 0


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="TextRequest.stop holds an empty string"):
        TextRequest(request=Request(prompt=(1,), max_tokens=1), stop=("a", ""))


@pytest.fixture(scope="module")
def engine():
    config = Decoder(vocab=128, width=8, layers=1, attention=Attention(heads=2), ffn=Dense(hidden=8))
    return Engine(config.build(jax.random.key(0)), rows=2, slots=32, chunk=16, sampler=Categorical())


def texts(engine, requests):
    found, finishes = [""] * len(requests), [None] * len(requests)
    for piece in generate_text(engine, requests, decode):
        assert finishes[piece.request] is None
        found[piece.request] += piece.text
        finishes[piece.request] = piece.finish
    return found, finishes


def test_a_request_that_met_its_stop_string_makes_room_for_the_next(engine):
    plain = [TextRequest(request=Request(prompt=(65, 66), max_tokens=20, seed=seed)) for seed in range(3)]
    whole, finishes = texts(engine, plain)
    assert finishes == [Finish.LENGTH] * 3 and len(set(whole)) == 3
    stop = whole[0][4:6]
    stopping = [
        TextRequest(request=each.request, stop=(stop,) if not place else ()) for place, each in enumerate(plain)
    ]
    found, finishes = texts(engine, stopping)
    assert found == [whole[0][: whole[0].index(stop)], *whole[1:]]
    assert finishes == [Finish.STOP, Finish.LENGTH, Finish.LENGTH]


def test_a_bad_request_is_refused_before_any_is_queued(engine):
    good, bad = (TextRequest(request=Request(prompt=(1,), max_tokens=tokens)) for tokens in (1, 99))
    with pytest.raises(ValueError, match="the cache needs 99 slots, and has 32"):
        generate_text(engine, [good, bad], decode)
    assert list(engine.run()) == []
