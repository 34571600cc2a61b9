"""One process's place in a job, and the promise that all end together: well, or soon after the first that fails.

JAX's runtime notices a process that is gone. It does not notice one that has raised an error and waits to leave, nor
tell the others what the error was: they would hang in the next exchange. So each process watches one entry in the
store of JAX's coordination service, where the first that fails writes why.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
from rich.console import Console

from ..errors import status_of, tell
from ..serialization import differences
from .last_words import AGAIN

FAILED = "dynamoe/failed"
"""The entry that the first process to fail writes: "2: what went wrong". Empty: the job ended well."""
SIGNS = "dynamoe/failures"
"""A directory: what each process has to say once one has failed, also that it is alive."""
PATIENCE, LINGER = 3.0, 1.5
"""Seconds to wait for the others' signs of life; seconds that process 0 then stays, because the store goes with it.
Together less than the shortest heartbeat timeout, or the runtime would abort process 0 for those that have left."""
SOON = 2.0
"""Seconds within which processes that do the same fail of the same."""
GRACE = 1.0
"""Seconds between the news of a failure and the end of a process that has not noticed it otherwise."""
MOST_NAMED = 4


class Job:
    """The job that this process has joined; a context that ends it, see the module."""

    def __init__(self, client: Any, index: int, count: int):
        self.index = index
        self.count = count
        self._client = client
        self._exchanges = 0
        self._failing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="dynamoe-job", daemon=True)

    @classmethod
    def joined(cls) -> "Job":
        """The job that `jax.distributed` has joined."""
        from jax._src.distributed import global_state  # the store has no other door; Orbax uses it too

        return cls(global_state.client, global_state.process_id, global_state.num_processes)

    def console(self, console: Console) -> Console:
        """The console in process 0, a silent one in the others."""
        return console if self.index == 0 else Console(quiet=True)

    def check_alike(self, facts: Mapping[str, Any], *, timeout: float = 300.0) -> None:
        """Compare what must be the same in all processes; each calls it with its own facts.

        Args:
            facts: JSON values.
            timeout: seconds to wait for the others.

        Raises:
            ValueError: some process has other facts; all raise it, with every process and field that differs.
        """
        self._exchanges += 1
        place, patience = f"dynamoe/facts/{self._exchanges}", int(timeout * 1000)
        if self.index:
            self._client.key_value_set(f"{place}/{self.index}", json.dumps(facts))
            verdict = self._client.blocking_key_value_get(f"{place}/verdict", patience)
        else:
            mine = json.loads(json.dumps(facts))
            lines = []
            for other in range(1, self.count):
                theirs = json.loads(self._client.blocking_key_value_get(f"{place}/{other}", patience))
                if found := differences(mine, theirs, "in process 0", f"in process {other}"):
                    lines.append(_first_few(found, "fields"))
            verdict = _first_few(lines, "processes")
            self._client.key_value_set(f"{place}/verdict", verdict)
        if verdict:
            raise ValueError(
                f"the processes of the job differ ({verdict}); start all with the same command, files and versions"
            )

    def __enter__(self) -> "Job":
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave with the others, or tell them why not and end this process."""
        if error is not None:
            self._fail(error)
        if self.index == 0:
            self._client.key_value_set(FAILED, "")
        jax.distributed.shutdown()
        self._watcher.join(GRACE)

    def _fail(self, error: BaseException) -> None:
        """End the process without waiting for the others, as JAX would on the way out of Python."""
        self._failing.set()
        message = " ".join((str(error) or type(error).__name__).split())
        signs: dict[int, str] = {}
        first: tuple[str, str] | None = None
        # The store may be gone with process 0; then the runtime is about to abort this process.
        with contextlib.suppress(Exception):
            self._sign(message)
            with contextlib.suppress(Exception):
                self._client.key_value_set(FAILED, f"{self.index}: {message}")
            signs = self._signs()
            other, _, reason = self._client.key_value_try_get(FAILED).partition(": ")
            first = (other, reason) if other != str(self.index) and reason != message else None
        silent = [str(other) for other in range(self.count) if other not in signs and other != self.index]
        note = ""
        if first and not silent:
            note = f"process {first[0]} failed first: {first[1]}"
        if silent:
            who = f"process {silent[0]}" if len(silent) == 1 else f"processes {', '.join(silent[:20])}"
            note = f"{who} of {self.count} gave no sign of life: killed, preempted, or the machine is lost. {AGAIN}"
        # What all have to say, process 0 says for all.
        if self.index == 0 or signs.get(0) != message or silent:
            tell(error, note)
        if self.index == 0:
            time.sleep(LINGER)
        self._end(status_of(error))

    def _signs(self) -> dict[int, str]:
        """What the processes have to say, as soon as each has said something, or after some patience. One that only
        lives may be about to fail of the same."""
        begin = time.monotonic()
        while True:
            entries, waited = self._client.key_value_dir_get(SIGNS), time.monotonic() - begin
            signs = {int(key.rsplit("/", 1)[1]): said for key, said in entries}
            all_live = len(signs) == self.count
            if (all_live and (all(signs.values()) or waited > SOON)) or waited > PATIENCE:
                return signs
            time.sleep(0.1)

    def _sign(self, message: str) -> None:
        self._client.key_value_set(f"{SIGNS}/{self.index}", message, allow_overwrite=True)

    def _watch(self) -> None:
        """Wait for the first failure, and end this process if it hangs in an exchange with the one that failed."""
        try:
            reason = self._client.blocking_key_value_get(FAILED, 10**9)
            if not reason:
                return
            if not self._failing.is_set():
                self._sign("")
        except Exception:
            return  # the job ended, or its store is gone and the runtime aborts the process
        time.sleep(GRACE)
        if self._failing.is_set():
            return
        tell(RuntimeError(f"process {reason}"), "This process ends with it.")
        if self.index == 0:
            time.sleep(LINGER)
        self._end(1)

    def _end(self, status: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _first_few(lines: list[str], what: str) -> str:
    rest = len(lines) - MOST_NAMED
    return "; ".join(lines[:MOST_NAMED] + [f"and {rest} more {what}"] * (rest > 0))
