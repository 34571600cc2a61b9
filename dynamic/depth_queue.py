"""Which rows run which stage next, where each row may be at another depth: continuous batching over depth.

A stage is what lies between two exits. Rows that left early begin their next token while others go on; a stage is
called when enough rows wait for it, so that its weights are read for many tokens at once. Host code alone.
"""

from collections import deque
from collections.abc import Sequence


class DepthQueue:
    """Rows by the stage that they wait for.

    queue = DepthQueue(stages=4, width=16)
    queue.add(0, row)
    stage, rows = queue.next()
    """

    def __init__(self, stages: int, width: int, *, together: bool = False):
        """
        Args:
            stages: how many there are.
            width: rows of a call at most.
            together: rows that came together go on together, whoever else waits.

        Raises:
            ValueError: a number is below 1.
        """
        for name, value in (("stages", stages), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.width, self.together = width, together
        self._waiting: list[deque[int]] = [deque() for _ in range(stages)]

    def add(self, stage: int, rows: Sequence[int]) -> None:
        """Let rows wait for a stage."""
        self._waiting[stage].extend(rows)

    def remove(self, row: int) -> None:
        """Take a row out, wherever it waits."""
        for waiting in self._waiting:
            if row in waiting:
                waiting.remove(row)

    @property
    def full(self) -> bool:
        """Whether some stage has enough rows for a whole call."""
        return any(len(waiting) >= self.width for waiting in self._waiting)

    @property
    def empty(self) -> bool:
        return not any(self._waiting)

    def next(self) -> tuple[int, list[int]]:
        """The stage that is called next, and its rows, the longest waiting first.

        Of the stages that fill a call the deepest, for it frees rows; else the fullest. Rows that go together take the
        deepest.

        Raises:
            ValueError: nothing waits.
        """
        if self.empty:
            raise ValueError("the queue is empty; add rows before asking for the next")
        stages = [stage for stage, waiting in enumerate(self._waiting) if waiting]
        full = [stage for stage in stages if len(self._waiting[stage]) >= self.width]
        if self.together or full:
            stage = max(stages if self.together else full)
        else:
            stage = max(stages, key=lambda stage: (len(self._waiting[stage]), stage))
        waiting = self._waiting[stage]
        return stage, [waiting.popleft() for _ in range(min(self.width, len(waiting)))]
