"""How likely a model finds given continuations of given contexts. Letters: B rows, S sequence."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..models import DecoderLM
from ..models.sequence_blocks import by_blocks

SMALLEST_WIDTH = 32
"""Tokens; rows are padded to this times a power of two, so that few shapes are compiled."""


class Pair(NamedTuple):
    """Token ids."""

    context: Sequence[int]
    """At least one: the first token of a text has no probability."""
    continuation: Sequence[int]


class Score(NamedTuple):
    """What a model says of a continuation."""

    log_likelihood: float
    """In nats; 0 or less."""
    greedy: bool
    """Whether each of its tokens is the most likely one."""


def score(model: DecoderLM, pairs: Sequence[Pair], *, longest: int, rows: int = 8) -> list[Score]:
    """Score continuations, each by itself.

    Args:
        model: its configuration's `loss_block` bounds the logits that are held at once.
        pairs: what is longer than `longest` loses the beginning of its context.
        longest: tokens that the model reads at once.
        rows: B, pairs at a time.

    Raises:
        ValueError: a number is below 1, a part of a pair is empty, or a continuation is longer than `longest`.
    """
    for name, value in (("longest", longest), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    for number, pair in enumerate(pairs):
        if not pair.context or not pair.continuation:
            raise ValueError(f"pairs[{number}] is {pair}; context and continuation must have a token each")
        if len(pair.continuation) > longest:
            raise ValueError(
                f"pairs[{number}] has a continuation of {len(pair.continuation)} tokens; the model reads {longest}"
            )
    scored: dict[int, Score] = {}
    graph, state = nnx.split(model)
    function = functools.partial(_scored(graph), state)
    order = sorted(range(len(pairs)), key=lambda number: _length(pairs[number], longest))
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        width = SMALLEST_WIDTH
        while width < _length(pairs[numbers[-1]], longest):
            width *= 2
        inputs, targets, counted = _padded([pairs[number] for number in numbers], rows, min(width, longest), longest)
        nats, best = jax.device_get(function(inputs, targets))
        for row, number in enumerate(numbers):
            mask = counted[row]
            scored[number] = Score(-float(nats[row][mask].sum(dtype=np.float64)), bool(best[row][mask].all()))
    return [scored[number] for number in range(len(pairs))]


def _length(pair: Pair, longest: int) -> int:
    """Tokens that are read: all but the last."""
    return min(len(pair.context) + len(pair.continuation) - 1, longest)


def _padded(
    pairs: Sequence[Pair], rows: int, width: int, longest: int
) -> tuple[Int[np.ndarray, "2 B S"], Int[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    """Tokens and segments, what is to follow each, and which of that is continuation."""
    inputs, targets = np.zeros((2, rows, width), np.int32), np.zeros((rows, width), np.int32)
    counted = np.zeros((rows, width), bool)
    for row, pair in enumerate(pairs):
        ids = [*pair.context, *pair.continuation][-(longest + 1) :]
        count = len(ids) - 1
        inputs[0, row, :count], inputs[1, row, :count], targets[row, :count] = ids[:-1], 1, ids[1:]
        counted[row, count - len(pair.continuation) : count] = True
    return inputs, targets, counted


@functools.lru_cache(maxsize=8)
def _scored(graph: nnx.GraphDef) -> Any:
    """Compiled: the nats of each target, and whether it is the most likely token."""

    @jax.jit
    def run(
        state: nnx.State, inputs: Int[Array, "2 B S"], targets: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
        model = nnx.merge(graph, state)
        x = model.hidden(inputs[0], inputs[1]).x

        def both(x: jax.Array, targets: jax.Array) -> jax.Array:
            logits = model.head(x)
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return jnp.stack([nats, (logits.argmax(axis=-1) == targets).astype(nats.dtype)], axis=-1)

        found = by_blocks(both, model.config.loss_block, x, targets)
        return found[..., 0], found[..., 1] > 0

    return run
