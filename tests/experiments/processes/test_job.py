"""A job ends as one: processes that differ are refused, and one that fails or is killed takes the others with it."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

Start = Callable[..., list[subprocess.Popen[str]]]

CHILD = """
import os, signal, sys, time
from jax.experimental import multihost_utils
from dynamoe.experiments.errors import tell
from dynamoe.experiments.processes import Meeting

me, what = int(os.environ["JAX_PROCESS_ID"]), sys.argv[1]
try:
    job = Meeting(heartbeat_timeout=5, start_timeout=3).join()
except ValueError as error:
    tell(error)
    sys.exit(1)
with job:
    job.check_alike({"model": {"layers": 4 + me * (what == "differs")}, "devices": 2})
    print("alike", flush=True)
    if what == "raises" and me == 1:
        raise ValueError("row 7 is no text")
    if what == "all raise":
        raise ValueError("steps is -3")
    if what == f"kill {me}":
        os.kill(os.getpid(), signal.SIGKILL)
    if what != "ends well":
        time.sleep(60)  # as in an exchange with a process that does not come
print("left", flush=True)
"""


def run(start: Start, what: str, count: int = 2, **options: object) -> list[tuple[int, str, list[str]]]:
    children = start(count, 1, [sys.executable, "-c", CHILD, what], **options)
    ends = [(child.communicate(timeout=60), child.returncode) for child in children]
    return [(status, output, errors.splitlines()) for (output, errors), status in ends]


def own(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("dynamoe")]


def test_a_job_that_ends_well_says_nothing(start_processes: Start) -> None:
    for status, output, errors in run(start_processes, "ends well"):
        assert (status, output, errors) == (0, "alike\nleft\n", [])


def test_processes_that_differ_are_refused_with_the_field_and_its_values(start_processes: Start) -> None:
    first, *others = run(start_processes, "differs", count=3)
    assert [status for status, *_ in (first, *others)] == [1, 1, 1]
    (line,) = own(first[2])
    assert "model.layers: 4 in process 0, 5 in process 1; model.layers: 4 in process 0, 6 in process 2" in line
    assert "start all with the same command" in line and "devices" not in line
    assert all(output == "" and errors == [] for _, output, errors in others)  # process 0 says it for all


def test_an_error_of_one_process_ends_the_others_soon(start_processes: Start) -> None:
    begin = time.monotonic()
    first, second = run(start_processes, "raises")
    assert time.monotonic() - begin < 30
    assert (first[0], second[0]) == (1, 1)
    assert own(second[2]) == ["dynamoe: error: row 7 is no text"]
    assert own(first[2]) == ["dynamoe: error: process 1: row 7 is no text", "dynamoe: This process ends with it."]


def test_what_all_refuse_is_said_once(start_processes: Start) -> None:
    first, second = run(start_processes, "all raise")
    assert (first[0], second[0], second[2]) == (1, 1, [])
    assert own(first[2]) == ["dynamoe: error: steps is -3"]


@pytest.mark.parametrize(
    ("killed", "said"), [(1, "process 1 is gone"), (0, "process 0, which coordinates the job, is")]
)
def test_a_killed_process_ends_the_others_with_one_clear_line(start_processes: Start, killed: int, said: str) -> None:
    ends = run(start_processes, f"kill {killed}")
    assert ends[killed][0] == -9 and ends[1 - killed][0] != 0
    (line,) = own(ends[1 - killed][2])
    assert f"dynamoe: error: {said}" in line and "Start the same command again" in line


def test_a_process_that_waits_in_vain_says_for_what(start_processes: Start) -> None:
    ((status, output, errors),) = run(start_processes, "ends well", 1, environment={"JAX_NUM_PROCESSES": "2"})
    assert status != 0 and output == ""
    assert "the processes of the job did not all meet in time" in own(errors)[0]


def test_no_job_to_join_says_what_is_looked_for(start_processes: Start) -> None:
    nothing = {"JAX_COORDINATOR_ADDRESS": "", "JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": "0"}
    half = "JAX_PROCESS_ID is 0, and JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES not set"
    ((status, _, errors),) = run(start_processes, "ends well", 1, environment=nothing)
    assert status == 1 and half in own(errors)[0]
    lonely = {**nothing, "JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_PROCESS_ID": ""}
    code = CHILD.replace('int(os.environ["JAX_PROCESS_ID"])', "0")
    (child,) = start_processes(1, 1, [sys.executable, "-c", code, "ends well"], environment=lonely)
    errors = child.communicate(timeout=60)[1].splitlines()
    assert child.returncode == 1 and "looked for, in this order: JAX_COORDINATOR_ADDRESS" in own(errors)[0]
    assert "srun" in own(errors)[0]
