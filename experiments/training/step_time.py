"""Training steps timed side by side: a machine's speed drifts, so runs take turns and a ratio is taken of medians."""

import statistics
import time
from collections.abc import Mapping

import jax

from ..data import Windows
from .step import Trainer, TrainState, to_device


def step_seconds(runs: Mapping[str, tuple[Trainer, TrainState]], batch: Windows, *, rounds: int) -> dict[str, float]:
    """Median seconds of a training step of each run; see `step_rounds`."""
    return {name: statistics.median(seconds) for name, seconds in step_rounds(runs, batch, rounds=rounds).items()}


def step_rounds(
    runs: Mapping[str, tuple[Trainer, TrainState]], batch: Windows, *, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a training step of each run, on one batch, round by round; in a round the runs take turns.

    Args:
        runs: trainers and states; the states are consumed.
        batch: this process's rows of a global batch.
        rounds: timed steps of each run; one more before them is not timed.
    """
    states = {name: state for name, (_, state) in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, (trainer, _) in runs.items():
            windows = to_device(batch, trainer.layout)
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(trainer.step(states[name], windows))
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}
