"""A polite stop: SIGTERM and Ctrl-C end a run after the step under way, not in the middle of it."""

import signal
import threading
from types import FrameType


class Interruption:
    """While the context is open, the first SIGTERM or Ctrl-C only sets `requested`; a second Ctrl-C stops at once."""

    def __init__(self):
        self.requested: signal.Signals | None = None

    def __enter__(self) -> "Interruption":
        # Python lets only the main thread handle signals; a run in another is stopped by its caller.
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
        self._previous = {number: signal.getsignal(number) for number in numbers}
        for number in self._previous:
            signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
