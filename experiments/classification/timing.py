"""What answers take: whole models over all examples in calls of one size, and medians over rounds in turn.

Letters: n examples.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ...dynamic import Buckets
from ..data.examples import Examples


def equal_calls(examples: Examples, buckets: Buckets) -> list[np.ndarray]:
    """All inputs in calls of one size, the largest bucket that they need; the last is filled up with its first row."""
    size = buckets.size(min(len(examples.labels), buckets.largest))
    parts = [examples.inputs[start : start + size] for start in range(0, len(examples.labels), size)]
    parts[-1] = np.concatenate([parts[-1], np.repeat(parts[-1][:1], size - len(parts[-1]), axis=0)])
    return parts


def answers_of(
    run: Callable[[Array], Float[Array, "R V"]], examples: Examples, buckets: Buckets
) -> Callable[[], Int[np.ndarray, " n"]]:
    """A function that answers all examples by a jitted model, in `equal_calls`."""
    calls = equal_calls(examples, buckets)

    def answer() -> Int[np.ndarray, " n"]:
        logits = [run(jnp.asarray(inputs)) for inputs in calls]
        return np.concatenate([np.asarray(each) for each in logits]).argmax(axis=1)[: len(examples.labels)]

    return answer


def timed(arms: dict[Any, Callable[[], Any]], rounds: int) -> tuple[dict[Any, Any], dict[Any, float]]:
    """What each gives, of a first time in which all shapes are compiled, and the median of its seconds in turn."""
    results = {name: arm() for name, arm in arms.items()}
    seconds: dict[Any, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            begin = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - begin)
    return results, {name: statistics.median(values) for name, values in seconds.items()}
