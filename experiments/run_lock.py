"""One process at a time trains in a run's directory.

On a mounted file system the kernel holds the lock and frees it however the process ends. An object store has no such
lock. There the holder writes `lock.json` and renews it every 10 seconds. Who finds the file watches it for 40 seconds:
if it changes, its holder is alive and the newcomer is refused; if it does not, the holder was killed and the newcomer
takes over. Nobody compares the clocks of two machines.

What this does not give: two processes that start within the same second may both go on, and so may a holder that was
cut off from the store for 40 seconds. The one whose lock was overwritten learns it before its next upload of metrics,
which comes before every checkpoint, and stops there.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from .places import Place, is_remote

LOCK = "lock.json"
RENEWED_EVERY, WATCHED, SETTLED = 10.0, 40.0, 1.0
"""Seconds between two renewals, of watching a lock that is there, and until one's own is read back."""


@contextlib.contextmanager
def hold(path: Place) -> Iterator[Callable[[], None]]:
    """Holds a run's directory for this process.

    Yields:
      A function that raises ValueError once another process has taken the directory over.

    Raises:
      ValueError: another process holds it.
    """
    with _hold_object(path) if is_remote(path) else _hold_directory(path) as check:
        yield check


@contextlib.contextmanager
def _hold_directory(path: Place) -> Iterator[Callable[[], None]]:
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lambda: None
    except BlockingIOError as error:
        raise ValueError(f"run directory {path}: another process trains in it; wait for it, or stop it") from error
    finally:
        os.close(handle)


@contextlib.contextmanager
def _hold_object(path: Place) -> Iterator[Callable[[], None]]:
    file = path / LOCK
    mine = {
        "host": platform.node(),
        "process": os.getpid(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
    }

    def check() -> None:
        found = _read(file)
        if found is not None and found.get("token") != mine["token"]:
            raise ValueError(f"run directory {path}: {_holder(found)} has taken it over; this one stops")

    _wait_until_free(path, file)
    _write(file, mine, 0)
    time.sleep(SETTLED)
    check()
    stop = threading.Event()
    renewing = threading.Thread(target=_renew, args=(file, mine, stop), daemon=True)
    renewing.start()
    try:
        yield check
    finally:
        stop.set()
        renewing.join()
        found = _read(file)
        if found is not None and found.get("token") == mine["token"]:
            file.unlink(missing_ok=True)


def _wait_until_free(path: Place, file: Place) -> None:
    first = _read(file)
    if first is None:
        return
    logging.getLogger(__name__).warning(
        "run directory %s: %s held it; watching for %.0f seconds whether it still does", path, _holder(first), WATCHED
    )
    deadline = time.monotonic() + WATCHED
    while time.monotonic() < deadline:
        time.sleep(WATCHED / 20)
        found = _read(file)
        if found is None:
            return
        if found != first:
            raise ValueError(f"run directory {path}: {_holder(found)} trains in it; wait for it, or stop it")


def _renew(file: Place, mine: dict[str, Any], stop: threading.Event) -> None:
    count = 0
    while not stop.wait(RENEWED_EVERY):
        count += 1
        # A store that does not answer now is asked again; each client has errors of its own.
        with contextlib.suppress(Exception):
            found = _read(file)
            if found is not None and found.get("token") != mine["token"]:
                return
            _write(file, mine, count)


def _read(file: Place) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Place, owner: dict[str, Any], count: int) -> None:
    # Always of one length: a client reads as many bytes as the listing said that it keeps.
    file.write_bytes(json.dumps(owner | {"renewed": count}).ljust(500).encode())


def _holder(found: dict[str, Any]) -> str:
    return f"process {found.get('process', '?')} of {found.get('host', '?')}, which began at {found.get('since', '?')},"
