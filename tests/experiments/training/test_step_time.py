"""Steps are timed in turns, and the first of each is not counted."""

import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.experiments.data import Windows
from dynamoe.experiments.experiment import Experiment
from dynamoe.experiments.training.step import TrainState, build_trainer
from dynamoe.experiments.training.step_time import step_seconds
from dynamoe.models import Layout, MeshShape


def test_runs_take_turns_and_the_median_of_the_timed_steps_counts(
    tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny()
    trainer = build_trainer(experiment.model, experiment.optimizer, Layout(MeshShape().build()), steps=6)
    # A clock that only the steps move: the first step of each run takes 100 s, then a's take 1, 2, 9 and b's 5, 5, 5.
    now, order, durations = [0.0], [], {"a": iter([100.0, 1.0, 9.0, 2.0]), "b": iter([100.0, 5.0, 5.0, 5.0])}
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run(name: str) -> Any:
        def step(state: TrainState, windows: Windows) -> tuple[TrainState, dict]:
            order.append((name, int(state.step)))
            now[0] += next(durations[name])
            return state._replace(step=state.step + 1), {}

        return trainer._replace(step=step), trainer.init(jnp.uint32(0))

    batch = Windows(*(np.zeros((4, 17), np.int32) for _ in Windows._fields))
    assert step_seconds({"a": run("a"), "b": run("b")}, batch, rounds=3) == {"a": 2.0, "b": 5.0}
    assert order == [(name, turn) for turn in range(4) for name in ("a", "b")]
