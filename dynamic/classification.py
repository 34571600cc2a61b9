"""Classification with exits: after each stage the host sends the rows that are sure home, and compacts the others.

Letters: B rows, D width, V classes, N exits, one after each stage.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .buckets import Buckets, run_in_buckets
from .confidence import Confidence, merge_confidence, split_confidence
from .thresholds import Thresholds

Stage = Callable[[Any], "StageOutput"]
"""Layers up to the next exit, and its head: jitted, from the inputs or the last stage's `carried`."""


class StageOutput(NamedTuple):
    """What a stage gives."""

    carried: Any
    """For the next stage: a pytree of arrays [R, ...]."""
    hidden: Float[Array, "R D"]
    """What the exit's head read of a row: its class token, or a mean."""
    logits: Float[Array, "R V"]


class ExitRun(NamedTuple):
    """Answers and what they took."""

    prediction: Int[np.ndarray, " B"]
    logits: Float[np.ndarray, "B V"]
    """Of the exit that a row left at."""
    exit_index: Int[np.ndarray, " B"]
    """Where, from 0."""
    rows: list[int]
    """That entered each stage; 0 where none was left."""
    rows_with_padding: list[int]
    """That each stage computed: what was paid for."""


def run_with_exits(
    stages: Sequence[Stage], inputs: Any, confidence: Confidence, thresholds: Thresholds, buckets: Buckets
) -> ExitRun:
    """Answer each row at the first exit that is sure enough of it; at the last all leave.

    Args:
        stages: one of each exit. Jit them once and keep them: each size of bucket is compiled once.
        inputs: pytree of arrays [B, ...] with at least one row.
        confidence: scores rows at each exit but the last.
        thresholds: a row leaves with a score of at least this.
        buckets: sizes that the rows which remain are padded to.

    Raises:
        ValueError: there is no stage or no row.
    """
    if not stages:
        raise ValueError("stages is empty; there must be one of each exit")
    parts = split_confidence(confidence)
    left = here = np.arange(_count("inputs", inputs))  # rows that go on, and where they lie in `carried`
    carried, state, logits = inputs, None, np.zeros((0, 0), np.float32)
    exit_index = np.zeros(len(left), np.int64)
    rows, paid = [], []
    for at, stage in enumerate(stages):
        rows.append(len(left))
        if not len(left):
            paid.append(0)
            continue
        output, state, here = _run(stage, carried, state, here, buckets)
        paid.append(len(output.logits))
        found = np.asarray(output.logits)[here]
        if at == 0:
            logits = np.zeros_like(found)
        if at == len(stages) - 1:
            leaves = np.ones(len(left), bool)
        else:
            if at == 0:
                state = confidence.initial(*output.hidden.shape)
            score, state = _score(*parts, at, output.logits, output.hidden, state)
            zero = jnp.zeros((1,), jnp.int32)
            leaves = np.asarray(score)[here] >= np.asarray(thresholds.at(zero + at, zero))
        logits[left[leaves]] = found[leaves]
        exit_index[left[leaves]] = at
        left, here, carried = left[~leaves], here[~leaves], output.carried
    return ExitRun(logits.argmax(axis=1), logits, exit_index, rows, paid)


def _run(
    stage: Stage, carried: Any, state: Any, here: Int[np.ndarray, " left"], buckets: Buckets
) -> tuple[StageOutput, Any, Int[np.ndarray, " left"]]:
    """The stage's output for some rows, their state, and where they lie in both now."""
    if buckets.sizes(len(here)) == [_count("carried", carried)]:
        # Compacting would save nothing: rows that have left stay as padding.
        return stage(carried), state, here
    (output, state), _ = run_in_buckets(lambda given: (stage(given[0]), given[1]), (carried, state), here, buckets)
    return output, state, np.arange(len(here))


@partial(jax.jit, static_argnums=(0, 2))
def _score(static: Any, weights: Any, at: int, logits: Any, hidden: Any, state: Any) -> Any:
    index = jnp.full((len(logits),), at, jnp.int32)
    return merge_confidence(static, weights).score(index, logits, hidden, state)


def _count(name: str, arrays: Any) -> int:
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(arrays)}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"{name} has arrays of {sorted(counts)} rows; all must have the same number, at least 1")
    return counts.pop()
