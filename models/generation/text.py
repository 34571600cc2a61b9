"""Text in, pieces of text out: what a tokenizer makes of the engine's tokens, up to a stop string."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .early_exit import EarlyExitEngine
from .engine import Engine
from .request import Finish, Request
from .self_speculation import SelfSpeculationEngine

UNFINISHED = "\ufffd"
"""What a tokenizer gives for a character whose bytes have not all come."""


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """A request whose answer is wanted as text."""

    request: Request
    stop: tuple[str, ...] = ()
    """Strings that end it; neither they nor what follows is handed out."""

    def __post_init__(self):
        if "" in self.stop:
            raise ValueError("TextRequest.stop holds an empty string; each must have a character at least")


AnyEngine = Engine | EarlyExitEngine | SelfSpeculationEngine
"""Takes requests and hands out their tokens."""


class Piece(NamedTuple):
    """A piece of a request's text."""

    request: int
    """Its place among those that were given."""
    text: str
    """May be empty."""
    finish: Finish | None


def generate_text(
    engine: AnyEngine, requests: Sequence[TextRequest], decode: Callable[[Sequence[int]], str]
) -> Iterator[Piece]:
    """The texts that follow prompts, piece by piece, as they are drawn.

    Args:
        engine: with nothing else to do.
        requests: stop tokens give no text.
        decode: the tokenizer's. of a few neighbouring tokens, it gives their text.

    Raises:
        ValueError: as `Engine.submit`; then nothing is drawn.
    """
    for each in requests:
        each.request.check(slots=engine.slots, vocab=engine.vocab)
    streams = {engine.submit(each.request): _Stream(each, decode) for each in requests}
    places = {number: place for place, number in enumerate(streams)}
    return _pieces(engine, streams, places)


def _pieces(engine: AnyEngine, streams: "dict[int, _Stream]", places: dict[int, int]) -> Iterator[Piece]:
    for drawn in engine.run():
        text, stopped = streams[drawn.request].add(drawn.token, drawn.finish)
        if stopped:
            engine.cancel(drawn.request)
        finish = Finish.STOP if stopped else drawn.finish
        if text or finish is not None:
            yield Piece(places[drawn.request], text, finish)


class _Stream:
    """The text of one answer so far."""

    def __init__(self, each: TextRequest, decode: Callable[[Sequence[int]], str]):
        self.each, self.decode = each, decode
        self.ids = list(each.request.prompt)
        # Of the tokens before `known` the text is known; from `tail` on they are decoded together with new ones.
        self.tail, self.known = max(0, len(self.ids) - _TAIL), len(self.ids)
        self.answer, self.shown = "", 0

    def add(self, token: int, finish: Finish | None) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string has come."""
        if token not in self.each.request.stop_tokens:
            self.ids.append(token)
        before, now = (self.decode(ids) for ids in (self.ids[self.tail : self.known], self.ids[self.tail :]))
        if now.endswith(UNFINISHED) and finish is None:
            return "", False
        self.answer += now[len(before) :]
        self.tail, self.known = max(self.tail, self.known - _TAIL), len(self.ids)
        stops = self.each.stop
        ends = [end for stop in stops if (end := self.answer.find(stop, max(self.shown - len(stop), 0))) >= 0]
        end = min(ends) if ends else len(self.answer) - (0 if finish else held_back(self.answer, stops))
        text = self.answer[self.shown : end]
        self.shown += len(text)
        return text, bool(ends)


_TAIL = 8
"""Tokens before a new one that it is decoded with: a tokenizer may treat the first of a text in its own way."""


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
