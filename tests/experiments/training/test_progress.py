"""Tokens per second count training alone; a file gets plain lines."""

import io
import time

import pytest
from rich.console import Console

from dynamoe.experiments.training.progress import TrainingProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, that `time.perf_counter` tells."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def progress_to(file: io.StringIO, quiet: bool = False) -> TrainingProgress:
    return TrainingProgress(
        Console(file=file), name="run", step=0, steps=10, unit="tokens", units_per_step=50, quiet=quiet
    )


def test_the_first_step_and_pauses_are_not_timed(clock: list[float]) -> None:
    file = io.StringIO()
    with progress_to(file) as progress:
        for seconds in (60.0, 0.5, 0.5):  # the first compiles
            clock[0] += seconds
            progress.stepped(1)
        assert progress.units_per_second == 100.0
        progress.paused()
        clock[0] += 30.0  # an evaluation, and the step behind it
        progress.stepped(4)
        clock[0] += 0.5
        progress.stepped(5)
        assert progress.units_per_second == 100.0
        progress.measured(5, 2.5)
    assert file.getvalue() == "step 5/10  loss 2.500  100 tokens/s  ETA 2 s\n"


def test_other_processes_than_the_first_show_nothing() -> None:
    file = io.StringIO()
    with progress_to(file, quiet=True) as progress:
        progress.stepped(1)
        progress.measured(1, 2.5)
        progress.note("a note")
    assert file.getvalue() == ""
