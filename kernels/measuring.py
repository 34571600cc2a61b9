"""What every kernel's benchmark is made of: contenders, checks of their results, and times in turns."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

LONG_ENOUGH = 2e-3
"""Seconds. On an accelerator, whose calls queue up, shorter ones are timed several at once: else the host is timed."""


class Contender(NamedTuple):
    """What is timed: an implementation of ours or a peer, over operands of some kind of numbers."""

    name: str
    numbers: str = ""
    """Empty where a benchmark has one kind alone."""
    main: bool = True
    """Whether these are the numbers that the peers are measured with."""
    peer: bool = False

    def __str__(self) -> str:
        return self.name if self.main else f"{self.name} {self.numbers}"


class Check(NamedTuple):
    """What became of a contender's result."""

    contender: Contender
    which: str
    """The pass."""
    error: float | None
    """Largest error over largest element of the float64 result; None: it was not to be compared, or there is none."""
    allowed: float
    refusal: str = ""
    """Why there is no result."""

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error <= self.allowed


class Call(NamedTuple):
    """A computation that can be repeated."""

    start: Callable[[], Any]
    wait: Callable[[Any], object] = jax.block_until_ready
    """Until the last result that `start` returned is there."""

    def __call__(self) -> Any:
        result = self.start()
        self.wait(result)
        return result


class Ratio(NamedTuple):
    """How many times as long something takes as something else."""

    median: float
    """Over the rounds, of the two times of a round."""
    fastest: float
    """Of the fastest rounds, for what disturbs only ever adds."""


def in_turns(calls: Mapping[Any, Call], rounds: int) -> dict[Any, np.ndarray]:
    """The seconds of every call in every round, each called before.

    In every round each call runs twice and the second counts: in the first, the threads of the one before may still be
    spinning.
    """
    seconds = {name: np.empty(rounds) for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times = _times(time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(times - 1):
                call.start()
            call()
            seconds[name][turn] = (time.perf_counter() - start) / times
    return seconds


def ratio(ours: np.ndarray, theirs: np.ndarray) -> Ratio:
    """Of seconds in the same rounds."""
    return Ratio(float(np.median(ours / theirs)), float(ours.min() / theirs.min()))


def _times(seconds: float) -> int:
    return 1 if jax.default_backend() == "cpu" else min(max(int(LONG_ENOUGH / seconds), 1), 64)
