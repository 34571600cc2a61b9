"""What the environment says of a job is read, and half a job is refused with the variable to set."""

import pytest

from dynamoe.experiments.processes.last_words import explanation
from dynamoe.experiments.processes.meeting import Meeting, explicit_place

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"}


def test_an_explicit_place_comes_before_slurm() -> None:
    found = explicit_place(EXPLICIT | SLURM)
    assert found == {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}


def test_without_one_jax_detects() -> None:
    assert explicit_place({}) == explicit_place(SLURM | {"SLURM_LOCALID": "0"}) == {}
    assert explicit_place({"JAX_COORDINATOR_ADDRESS": "[::1]:80"}) == {}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"JAX_PROCESS_ID": "0"},
            "JAX_PROCESS_ID is 0, and JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES not set; set all of",
        ),
        (EXPLICIT | {"JAX_PROCESS_ID": ""}, "and JAX_PROCESS_ID not set; set all of"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID is 4 and JAX_NUM_PROCESSES is 4; .* 0 to JAX_NUM_PROCE"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; it must be a number"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "node1"}, "JAX_COORDINATOR_ADDRESS is 'node1'; it must be host:port"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "n:99999"}, "'n:99999'; it must be host:port"),
        (
            {"SLURM_JOB_ID": "7"},
            "SLURM_JOB_ID is 7, and SLURM_STEP_NODELIST, .* not set: .*start .* with srun",
        ),
        (SLURM, "and SLURM_LOCALID not set"),
    ],
)
def test_half_a_job_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explicit_place(environment)


def test_patience_has_a_least() -> None:
    with pytest.raises(ValueError, match="heartbeat_timeout is 0; it must be at least 5 seconds"):
        Meeting(heartbeat_timeout=0)


ABORT = "F1127 client.h:80] Terminating process because the JAX distributed service detected fatal errors. "


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "unhealthy (stopped sending heartbeats):\n1\nThe tasks have crashed." + ABORT,
            "process 1 is gone (killed, preempted, or the machine is lost)",
        ),
        ("unhealthy (stopped sending heartbeats):\n3, 12\nThe tasks" + ABORT, "processes 3, 12 are gone"),
        (ABORT + "DEADLINE_EXCEEDED RPC: /xla.coordination.CoordinationService/RegisterTask", "did not all meet"),
        (
            ABORT + "UNAVAILABLE: Failed to send RPC to coordination service.",
            "process 0, which coordinates the job",
        ),
        (
            "Failed to add port to server: No address added out of total 1 resolved for '[::]:246'",
            "port 246 of this machine is taken",
        ),
        (ABORT + "something new", "another process of the job ended too early"),
    ],
)
def test_an_abort_of_the_runtime_is_explained(log: str, said: str) -> None:
    assert said in (explanation(log) or "")


def test_other_errors_need_no_explanation() -> None:
    assert explanation("dynamoe: error: steps is -3; it must be at least 1") is None
