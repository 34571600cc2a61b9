"""Decoding in which tokens leave early and layers really do not run: continuous batching over depth.

Each stage, the layers between two exits, is a program of its own, called for the rows that wait for it. Which rows go
on is decided on the host, from the confidences of a call; rows that left begin their next token at once, so that calls
stay full. While the device runs one call, the host takes in what the call before found. Never a `vmap` over depth,
never a loop over stacked weights. Letters: R rows, N exits.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from ...dynamic import DepthQueue, EarlyExit, PropagateState, RecomputeLayers, split_confidence
from ..decoder import DecoderLM
from ..layer_stack import refuse_batch_dependence, with_layers
from .engine import Drawn, Usage
from .host_rows import HostRow, HostRows
from .request import Request
from .samplers import Greedy, Sampler
from .stages import Answer, Call, Weights, empty_staged_rows, stages


class Depths(NamedTuple):
    """Where tokens left, those that a prompt ends with not counted."""

    layers: tuple[int, ...]
    """That run before each exit."""
    tokens: tuple[int, ...]
    """Drawn at each exit."""

    @property
    def mean(self) -> float:
        """Layers per token; NaN where none was drawn."""
        total = sum(self.tokens)
        ran = sum(depth * count for depth, count in zip(self.layers, self.tokens, strict=True))
        return ran / total if total else float("nan")


class _Flight(NamedTuple):
    """A call that the device may still be running."""

    stage: int
    indices: list[int]
    rows: list[HostRow]
    """Who was in them: one that was cancelled meanwhile gets nothing."""
    answer: Answer


_IN_FLIGHT = 2
"""Calls that the device has been given at a time: one runs, one waits behind it."""


class EarlyExitEngine:
    """Draws tokens for requests by a policy of early exit. Otherwise as `Engine`.

    engine = EarlyExitEngine(model, EarlyExit(thresholds=Constant(threshold=0.8)), rows=32, width=16)
    engine.submit(Request(prompt=prompt, max_tokens=100))
    for drawn in engine.run():
        print(drawn.request, drawn.token)
    print(engine.depths.mean)

    The prompt, and with it the first token, goes through all layers.
    """

    def __init__(
        self,
        model: DecoderLM,
        policy: EarlyExit,
        *,
        rows: int = 8,
        width: int | None = None,
        slots: int = 1024,
        sampler: Sampler | None = None,
        chunk: int = 512,
        vocab: int | None = None,
    ):
        """
        Args:
            model: stacked or unstacked, with exits.
            policy: who leaves, and when.
            rows: R, requests at a time.
            width: rows of a call at most; with fewer than R, rows wait until others stand at the same depth, and calls
                stay full. None: R.
            slots: tokens of prompt and answer that a row can hold.
            sampler: how tokens are chosen; None: greedily.
            chunk: tokens of a prompt that are read at a time.
            vocab: ids from here on are never drawn.

        Raises:
            ValueError: a number is out of bounds; the model has no exits, or others than the policy; its mixtures would
                make a request depend on its neighbours; or a filter of the sampler looks at earlier tokens.
        """
        limit, width = model.config.vocab if vocab is None else vocab, rows if width is None else width
        for name, value in (("rows", rows), ("width", width), ("slots", slots), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if width > rows:
            raise ValueError(f"width is {width} and rows {rows}; a call has no more rows than there are")
        if not 1 <= limit <= model.config.vocab:
            raise ValueError(f"vocab is {limit}; it must be at least 1 and at most the model's {model.config.vocab}")
        if model.config.exits is None:
            raise ValueError("Decoder.exits is None; a policy of early exit needs a model that was trained with exits")
        refuse_batch_dependence(model.config, None)
        sampler = Greedy() if sampler is None else sampler
        if sampler.needs_seen:
            raise ValueError(f"sampler is {sampler}; with early exit no filter may look at the tokens before")
        self.policy, self._depths = policy, model.config.exit_depths
        policy.thresholds.check_exits(len(self._depths) - 1)
        self._most = policy.skipped.waiting
        # Before a stage stand what may wait there and the newest, and as many as came through the stage before at once.
        capacity = tuple(_power_of_two((self._most + 1) * (exit + 1)) for exit in range(len(self._depths) - 1))
        graph, state = nnx.split(with_layers(model, stacked=False))
        leaves, structure = jax.tree.flatten(state)
        confidence, trained = split_confidence(policy.confidence)
        self._weights = Weights(leaves, trained)
        self._held = empty_staged_rows(model, policy.confidence, rows=rows, slots=slots, capacity=capacity)
        self._propagates = isinstance(policy.skipped, PropagateState)
        self._stages = stages(
            graph, structure, sampler, confidence, policy.thresholds, limit, self._depths, self._propagates
        )
        self._rows = HostRows(rows, slots=slots, vocab=model.config.vocab)
        self._queue = DepthQueue(len(self._depths), width, together=policy.batch.together)
        self._flights: deque[_Flight] = deque()
        self._counts = [0] * len(self._depths)
        self._chunk, self.slots, self.vocab = min(chunk, slots), slots, model.config.vocab
        self.usage = Usage()

    @property
    def depths(self) -> Depths:
        """Where tokens have left so far."""
        return Depths(self._depths, tuple(self._counts))

    def submit(self, request: Request) -> int:
        """Queue a request, also while others run, and return its number, counted from 0.

        Raises:
            ValueError: as `Request.check`.
        """
        return self._rows.submit(request)

    def cancel(self, number: int) -> None:
        """End a request: it draws nothing more. One that has ended stays as it is."""
        row = self._rows.cancel(number)
        if row is not None:
            self._queue.remove(row)

    def run(self) -> Iterator[Drawn]:
        """Draw until no request is left. It may be left and called again: it goes on where it was."""
        while True:
            while self._rows.arrived:
                yield self._rows.arrived.popleft()
            self._admit()
            if self._flights or not self._queue.empty:
                self._advance()
            elif not self._rows.arrived and not self._rows.waiting:
                return

    def _admit(self) -> None:
        """Read the prompts of waiting requests into free rows. Rows that leave together also begin together."""
        if self._queue.together and (self._flights or not self._queue.empty):
            return
        self._queue.add(0, [index for index in self._rows.admit() if self._read(index)])

    def _read(self, index: int) -> bool:
        """A prompt through all layers, and its first token; whether more are wanted."""
        start, row = time.perf_counter(), self._rows[index]
        prompt, token = row.request.prompt, 0
        for begin in range(0, len(prompt), self._chunk):
            part = prompt[begin : begin + self._chunk]
            call = padded_call(self._rows, [index], [begin], [0], [part])
            self._held, tokens = self._stages.read(self._weights, self._held, call)
            token = int(np.asarray(tokens)[0])
        row.ran = [len(prompt)] * len(self._depths)
        usage = self.usage
        self.usage = usage._replace(
            prompt_tokens=usage.prompt_tokens + len(prompt),
            prompt_seconds=usage.prompt_seconds + time.perf_counter() - start,
        )
        return self._rows.hand_out(index, token)

    def _advance(self) -> None:
        """Give the device what waits, as long as it holds few calls, and then take in what the oldest one found."""
        start = time.perf_counter()
        # Behind another call only a full one: rows that come back from that one may fill it.
        while not self._flights or (len(self._flights) < _IN_FLIGHT and self._queue.full):
            self._flights.append(self._begin(*self._queue.next()))
        drawn = self._finish(self._flights.popleft())
        self.usage = self.usage._replace(
            drawn_tokens=self.usage.drawn_tokens + drawn,
            drawn_seconds=self.usage.drawn_seconds + time.perf_counter() - start,
        )

    def _begin(self, stage: int, indices: list[int]) -> _Flight:
        """One stage for some rows."""
        if isinstance(self.policy.skipped, RecomputeLayers):
            self._run_again(stage, indices)
        rows = [self._rows[index] for index in indices]
        starts = [row.ran[stage] for row in rows]
        stops = [len(row.tokens) if stage == 0 else row.ran[stage - 1] for row in rows]
        call = self._stage_call(stage, indices, starts, stops, recomputed=False)
        self._held, answer = self._stages.run[stage](self._weights, self._held, call)
        for row, stop in zip(rows, stops, strict=True):
            row.ran[stage] = stop
        return _Flight(stage, indices, rows, answer)

    def _finish(self, flight: _Flight) -> int:
        """Who leaves and who goes on; returns how many tokens were drawn."""
        stage, count = flight.stage, len(flight.indices)
        found, sure = (each[:count].tolist() for each in jax.device_get(flight.answer))
        still = [n for n, index in enumerate(flight.indices) if self._rows.holds(index, flight.rows[n])]
        indices, tokens = [flight.indices[n] for n in still], [found[n] for n in still]
        left = self._leaving(stage, indices, [sure[n] for n in still])
        on = [index for index, leaves in zip(indices, left, strict=True) if not leaves]
        self._queue.add(stage + 1, on) if on else None
        gone = [index for index, leaves in zip(indices, left, strict=True) if leaves]
        if self._propagates:
            for index in gone:  # the device has filled what they skip
                ran = self._rows[index].ran
                ran[stage + 1 :] = [ran[stage]] * (len(ran) - stage - 1)
        self._counts[stage] += len(gone)
        answers = zip(indices, tokens, left, strict=True)
        self._queue.add(0, [index for index, token, leaves in answers if leaves and self._rows.hand_out(index, token)])
        return len(gone)

    def _leaving(self, stage: int, indices: Sequence[int], sure: Sequence[bool]) -> list[bool]:
        """Which rows have their token now."""
        if stage == len(self._depths) - 1:
            return [True] * len(indices)
        rows = [self._rows[index] for index in indices]
        room = [row.ran[stage] - row.ran[stage + 1] <= max(self._most, 1) for row in rows]
        left = [a and b for a, b in zip(sure, room, strict=True)]
        return [all(left)] * len(left) if self.policy.batch.together else left

    def _run_again(self, stage: int, indices: Sequence[int]) -> None:
        """All tokens that wait before a stage through the stages before it, where more than the newest one wait."""
        rows = [self._rows[index] for index in indices]
        starts, stops = [row.ran[stage] for row in rows], [row.ran[stage - 1] if stage else 0 for row in rows]
        if stage and max(stop - start for start, stop in zip(starts, stops, strict=True)) > 1:
            for before in range(stage):
                call = self._stage_call(before, indices, starts, stops, recomputed=True)
                self._held, _ = self._stages.run[before](self._weights, self._held, call)

    def _stage_call(
        self, stage: int, indices: Sequence[int], starts: Sequence[int], stops: Sequence[int], *, recomputed: bool
    ) -> Call:
        rows = [self._rows[index] for index in indices]
        parts = [row.tokens[start:stop] for row, start, stop in zip(rows, starts, stops, strict=True)]
        last = stage == len(self._depths) - 1
        keep = not (last or recomputed or self._propagates)
        behind = [starts[n] - row.ran[stage + 1] if keep else 0 for n, row in enumerate(rows)]
        return padded_call(self._rows, indices, starts, behind, parts)


def padded_call(
    rows: HostRows,
    indices: Sequence[int],
    starts: Sequence[int],
    behind: Sequence[int],
    parts: Sequence[Sequence[int]],
) -> Call:
    """Tokens of some rows as arrays of the next larger powers of two: few shapes are compiled.

    Args:
        rows: all; one more is nobody's.
        indices: those of the call.
        starts: positions of their first tokens.
        behind: see `Call`.
        parts: their tokens.
    """
    width, length = _power_of_two(len(indices)), _power_of_two(max(map(len, parts)))
    tokens, numbers = np.zeros((width, length), np.int32), np.zeros((5, width), np.int32)
    numbers[0] = len(rows)
    key = np.zeros((width, *rows[indices[0]].key.shape), np.uint32)
    for n, (index, part) in enumerate(zip(indices, parts, strict=True)):
        tokens[n, : len(part)] = part
        numbers[:, n] = index, starts[n], len(part), behind[n], rows[index].drawn
        key[n] = rows[index].key
    return Call(tokens, numbers, key)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
