"""Continuous batching: a fixed number of rows, which requests enter and leave while others go on.

Yu et al. 2022 (Orca), https://www.usenix.org/conference/osdi22/presentation/yu, with prompts read in chunks as in
Agrawal et al. 2023 (Sarathi), https://arxiv.org/abs/2308.16369. Letters: B rows.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..decoder import DecoderLM
from ..layer_stack import refuse_batch_dependence, with_layers
from ..sharding import Layout
from .programs import Chunk, empty_rows, programs, shapes_of
from .request import Finish, Request
from .samplers import Greedy, Sampler

SMALLEST_CHUNK = 16
"""Tokens; the end of a prompt is padded to this times a power of 2."""


class Drawn(NamedTuple):
    """A token of a request."""

    request: int
    """The number that `submit` gave it."""
    token: int
    finish: Finish | None
    """Why this is its last token; None: it is not."""


class Usage(NamedTuple):
    """What an engine has done. Time that the caller took between tokens is left out; compiling is not."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    """Of reading prompts, each request's first token among it."""
    drawn_tokens: int = 0
    """After the first of each request."""
    drawn_seconds: float = 0.0


class _Row:
    """A request that is under way in a row."""

    def __init__(self, number: int, request: Request):
        self.number, self.request = number, request
        self.key = np.asarray(jax.random.key_data(jax.random.key(np.uint32(request.seed))))
        self.read = 0
        """Tokens of the prompt that are read."""
        self.asked = 0
        """Tokens that the devices were asked to draw."""
        self.drawn = 0
        """Those of them that have come."""
        self.ended = False

    @property
    def active(self) -> bool:
        return 0 < self.asked < self.request.max_tokens


class Engine:
    """Draws tokens for requests; how many share the model at a time, and for how long, changes nothing in them.

    engine = Engine(model, rows=8, slots=1024, sampler=Greedy())
    numbers = [engine.submit(Request(prompt=prompt, max_tokens=100)) for prompt in prompts]
    for drawn in engine.run():
        print(drawn.request, drawn.token)
    """

    def __init__(
        self,
        model: DecoderLM,
        *,
        rows: int = 8,
        slots: int = 1024,
        sampler: Sampler | None = None,
        chunk: int = 512,
        chunks_between_steps: int | None = None,
        vocab: int | None = None,
        layout: Layout | None = None,
    ):
        """
        Args:
            model: stacked or unstacked. With a layout its parameters are placed on the mesh.
            rows: B, requests at a time.
            slots: tokens of prompt and answer that a row can hold.
            sampler: how tokens are chosen; None: greedily.
            chunk: tokens of a prompt that are read at a time.
            chunks_between_steps: how many are read between two tokens of the other requests; None: all that wait. Fewer
                keep their tokens coming while long prompts are read, and take longer in all.
            vocab: ids from here on are never drawn: the tokenizer's vocabulary where the model's is padded beyond it.
            layout: the mesh to run on; None: where the parameters are.

        Raises:
            ValueError: a number is out of bounds, the model's mixtures would make a request depend on its neighbours,
                or something does not divide over the mesh.
        """
        limit = model.config.vocab if vocab is None else vocab
        for name, value in (("rows", rows), ("slots", slots), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if chunks_between_steps is not None and chunks_between_steps < 1:
            raise ValueError(f"chunks_between_steps is {chunks_between_steps}; it must be at least 1, or None")
        if not 1 <= limit <= model.config.vocab:
            raise ValueError(f"vocab is {limit}; it must be at least 1 and at most the model's {model.config.vocab}")
        refuse_batch_dependence(model.config, layout)
        sampler = Greedy() if sampler is None else sampler
        graph, state = nnx.split(with_layers(model, stacked=False))
        state = state if layout is None else jax.device_put(state, layout.shardings(state))
        self._leaves, structure = jax.tree.flatten(state)
        self._held = empty_rows(model, rows=rows, slots=slots, sampler=sampler, layout=layout)
        self._programs = programs(graph, structure, sampler, limit, layout, shapes_of(self._held))
        self._rows: list[_Row | None] = [None] * rows
        self._waiting: deque[_Row] = deque()
        self._flying: deque[_Flight] = deque()
        self._arrived: deque[Drawn] = deque()
        self._submitted = 0
        # On a mesh all rows read together, for the batch is split over it.
        self._together = layout is not None
        self._chunk, self._chunks_between_steps = min(chunk, slots), chunks_between_steps
        self.slots, self.vocab = slots, model.config.vocab
        self.usage = Usage()

    def submit(self, request: Request) -> int:
        """Queue a request, also while others run, and return its number, counted from 0.

        Raises:
            ValueError: as `Request.check`.
        """
        request.check(slots=self.slots, vocab=self.vocab)
        self._waiting.append(_Row(self._submitted, request))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, number: int) -> None:
        """End a request: it draws nothing more. One that has ended stays as it is."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        for row in self._rows:
            if row is not None and row.number == number:
                self._end(row)

    def run(self) -> Iterator[Drawn]:
        """Draw until no request is left. It may be left and called again: it goes on where it was."""
        while True:
            while self._arrived:
                yield self._arrived.popleft()
            self._admit()
            if any(self._unread()):
                self._land(0)
                self._read()
            active = [row if row and row.active else None for row in self._rows]
            if any(active):
                self._draw(active)
                # One step is under way while the tokens of the one before are looked at.
                self._land(1)
            elif self._flying:
                self._land(0)
            elif not self._arrived and not self._waiting and not any(self._rows):
                return

    def _admit(self) -> None:
        for index, row in enumerate(self._rows):
            if row is None and self._waiting:
                self._rows[index] = self._waiting.popleft()

    def _unread(self) -> list[_Row | None]:
        return [row if row and row.read < len(row.request.prompt) else None for row in self._rows]

    def _read(self) -> None:
        """Read chunks of the prompts; those that are read to their end have their first token."""
        chunks = 0
        while any(reading := self._unread()) and chunks != self._chunks_between_steps:
            start, chunks = time.perf_counter(), chunks + 1
            one = next(index for index, row in enumerate(reading) if row)
            chosen, row = (reading, None) if self._together else (reading[one : one + 1], one)
            chunk = self._next_chunk(chosen, row)
            self._held, tokens = self._programs.read(self._leaves, self._held, chunk)
            finished: list[_Row | None] = []
            counts = np.asarray(chunk.count).tolist()
            for reader, count in zip(chosen, counts, strict=True):
                if reader is not None:
                    reader.read += count
                    reader.asked = int(reader.read == len(reader.request.prompt))
                finished.append(reader if reader and reader.asked else None)
            self._hand_out(finished, np.asarray(tokens))
            usage, seconds = self.usage, time.perf_counter() - start
            self.usage = usage._replace(
                prompt_tokens=usage.prompt_tokens + sum(counts),
                prompt_seconds=usage.prompt_seconds + seconds,
            )

    def _next_chunk(self, reading: list[_Row | None], row: int | None) -> Chunk:
        """The longest parts that are left, cut to a chunk, in the smallest compiled width that holds them."""
        left = [0 if one is None else len(one.request.prompt) - one.read for one in reading]
        width = SMALLEST_CHUNK
        while width < min(max(left), self._chunk) and not self._together:
            width *= 2
        # Together always of one width: a request's must not follow from its neighbours'.
        width = self._chunk if self._together else min(width, self._chunk)
        tokens = np.zeros((len(reading), width), np.int32)
        start, count = np.zeros(len(reading), np.int32), np.zeros(len(reading), np.int32)
        key = np.zeros((len(reading), *self._held.key.shape[1:]), np.uint32)
        for index, one in enumerate(reading):
            if one is not None:
                part = one.request.prompt[one.read : one.read + width]
                tokens[index, : len(part)] = part
                start[index], count[index], key[index] = one.read, len(part), one.key
        tokens, start, count, key = (jnp.asarray(array) for array in (tokens, start, count, key))
        return Chunk(tokens, start, count, key, None if row is None else jnp.asarray(row, jnp.int32))

    def _draw(self, active: list[_Row | None]) -> None:
        start = time.perf_counter()
        mask = np.array([row is not None for row in active])
        self._held, tokens = self._programs.draw(self._leaves, self._held, mask)
        for row in active:
            if row is not None:
                row.asked += 1
        self._flying.append(_Flight(tokens, active))
        self._spend(start, 0)

    def _land(self, keep: int) -> None:
        """Wait for the tokens that are under way, but for the last `keep` steps."""
        while len(self._flying) > keep:
            start, flight = time.perf_counter(), self._flying.popleft()
            values = np.asarray(flight.tokens)
            self._spend(start, sum(row is not None and not row.ended for row in flight.rows))
            self._hand_out(flight.rows, values)

    def _spend(self, start: float, tokens: int) -> None:
        self.usage = self.usage._replace(
            drawn_tokens=self.usage.drawn_tokens + tokens,
            drawn_seconds=self.usage.drawn_seconds + time.perf_counter() - start,
        )

    def _hand_out(self, rows: list[_Row | None], values: np.ndarray) -> None:
        for row, value in zip(rows, values.tolist(), strict=True):
            if row is None or row.ended:
                continue
            row.drawn += 1
            finish = None
            if value in row.request.stop_tokens:
                finish = Finish.STOP
            elif row.drawn == row.request.max_tokens:
                finish = Finish.LENGTH
            if finish is not None:
                self._end(row)
            self._arrived.append(Drawn(row.number, value, finish))

    def _end(self, row: _Row) -> None:
        row.ended = True
        self._rows[self._rows.index(row)] = None


class _Flight(NamedTuple):
    """Tokens that are being drawn, and whose they are."""

    tokens: jax.Array
    rows: list[_Row | None]
