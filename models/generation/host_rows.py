"""Requests in a fixed number of rows, whose tokens the host knows: for engines that decide on the host how to go on."""

from collections import deque

import jax
import numpy as np

from .engine import Drawn
from .request import Finish, Request


class HostRow:
    """A request that is under way in a row."""

    def __init__(self, number: int, request: Request):
        self.number, self.request = number, request
        self.key = np.asarray(jax.random.key_data(jax.random.key(np.uint32(request.seed))))
        self.tokens = list(request.prompt)
        self.ran: list[int] = []
        """Tokens that each stage of layers has run for."""
        self.drawn = 0


class HostRows:
    """Who is in which row, who waits, and which tokens have come and were not handed out."""

    def __init__(self, count: int, *, slots: int, vocab: int):
        """
        Args:
            count: rows.
            slots: tokens of prompt and answer that a row can hold.
            vocab: of the model.
        """
        self.slots, self.vocab = slots, vocab
        self.arrived: deque[Drawn] = deque()
        self._rows: list[HostRow | None] = [None] * count
        self._waiting: deque[HostRow] = deque()
        self._submitted = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> HostRow:
        row = self._rows[index]
        assert row is not None
        return row

    def holds(self, index: int, row: HostRow) -> bool:
        """Whether a row's request is still there."""
        return self._rows[index] is row

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    @property
    def busy(self) -> list[int]:
        """Rows with a request."""
        return [index for index, row in enumerate(self._rows) if row is not None]

    def submit(self, request: Request) -> int:
        """Queue a request, and return its number. Raises ValueError as `Request.check`."""
        request.check(slots=self.slots, vocab=self.vocab)
        self._waiting.append(HostRow(self._submitted, request))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, number: int) -> int | None:
        """Forget a request, and return the row that it had."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        for index in self.busy:
            if self[index].number == number:
                self._rows[index] = None
                return index
        return None

    def admit(self) -> list[int]:
        """Let waiting requests into free rows, and return these."""
        entered = []
        for index, row in enumerate(self._rows):
            if row is None and self._waiting:
                self._rows[index] = self._waiting.popleft()
                entered.append(index)
        return entered

    def hand_out(self, index: int, token: int) -> bool:
        """A token of a row; whether more of it are wanted."""
        row = self[index]
        row.tokens.append(token)
        row.drawn += 1
        finish = None
        if token in row.request.stop_tokens:
            finish = Finish.STOP
        elif row.drawn == row.request.max_tokens:
            finish = Finish.LENGTH
        if finish is not None:
            self._rows[index] = None
        self.arrived.append(Drawn(row.number, token, finish))
        return finish is None
