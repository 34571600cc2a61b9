"""The first signal asks, the second Ctrl-C insists."""

import os
import signal
import time
from collections.abc import Callable

import jax
import pytest

from dynamoe.experiments.training.interruption import Interruption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_and_nothing_stops(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.stops_before(1)
        os.kill(os.getpid(), number)
        assert interruption.stops_before(2) and interruption.requested is number
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigterm_changes_nothing() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.requested is signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_one_process_stops_both_before_the_same_step(
    run_with_processes: Callable[..., list[str]], name: str
) -> None:
    (first, began), (second, _) = (text.split() for text in run_with_processes(2, 1, stop_after_a_signal, name))
    assert first == second and int(first) > int(began) > 0


def stop_after_a_signal(name: str) -> None:
    """Process 0 is two steps ahead of process 1, which gets the signal."""
    me, step = jax.process_index(), 0
    with Interruption() as interruption:
        while not interruption.stops_before(step):
            step += 1
            time.sleep(0.05 if step > 2 or me else 0.0)
            if step == 10 and me == 1:
                os.kill(os.getpid(), signal.Signals[name])
            assert step < 1000
    assert interruption.requested is (signal.Signals[name] if me else signal.SIGTERM)
    print(step, 10)
