"""A polite stop: SIGTERM and Ctrl-C end a run after the step under way, not in the middle of it.

Several processes stop before the same step, whichever of them got the signal. JAX's preemption service agrees on the
step: it catches SIGTERM itself, tells all processes in the background, and takes the step after the largest that one of
them has begun. Asking it costs 30 microseconds a step, and no exchange between the devices.
"""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interruption:
    """While the context is open, the first SIGTERM or Ctrl-C only asks for a stop; a second Ctrl-C stops at once."""

    def __init__(self):
        self.requested: signal.Signals | None = None
        """The signal that ends this run; of several processes, in one that got none, SIGTERM."""
        self._together = jax.distributed.is_initialized()
        self._interrupted = False

    def __enter__(self) -> "Interruption":
        # Python lets only the main thread handle signals; a run in another is stopped by its caller.
        main = threading.current_thread() is threading.main_thread()
        mine = (signal.SIGINT,) if self._together else (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.getsignal(number) for number in mine if main}
        for number in self._previous:
            signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stops_before(self, step: int) -> bool:
        """Whether the run ends instead of doing this step; all processes ask before every step."""
        if self._together and multihost_utils.reached_preemption_sync_point(step):
            self.requested = signal.SIGINT if self._interrupted else signal.SIGTERM
        return self.requested is not None

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted = number == signal.SIGINT
        if self._together:
            signal.raise_signal(signal.SIGTERM)  # JAX's service hears SIGTERM alone
        else:
            self.requested = signal.Signals(number)
