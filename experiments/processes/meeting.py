"""How the processes of a job find each other: JAX's own detection, behind one check of the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from . import last_words
from .job import Job

ADDRESS, COUNT, INDEX = EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""What JAX reads of a SLURM job; `srun` sets it, in every process another SLURM_PROCID."""
OPEN_MPI = "OMPI_MCA_orte_hnp_uri"

LOOKED_FOR = (
    f"looked for, in this order: {', '.join(EXPLICIT)}; Open MPI ({OPEN_MPI}); SLURM ({', '.join(SLURM)}, which srun "
    "sets); a Cloud TPU (its metadata, on GKE TPU_WORKER_HOSTNAMES and TPU_WORKER_ID); Kubernetes; see docs/pods.md"
)


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """The patience of processes with each other."""

    start_timeout: int = 300
    """Seconds that a process waits at its start for the others."""
    heartbeat_timeout: int = 60
    """Seconds without a sign of life after which a process counts as gone, and the job ends."""

    def __post_init__(self):
        for name, least in (("start_timeout", 1), ("heartbeat_timeout", 5)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least} seconds")

    def join(self) -> Job:
        """Join the job that the environment tells of, before anything asks JAX for devices.

        Raises:
            ValueError: the environment tells of no job, or of half of one.
        """
        explicit = explicit_place(os.environ)
        last_words.relay_errors()
        try:
            jax.distributed.initialize(
                **explicit,
                initialization_timeout=self.start_timeout,
                heartbeat_timeout_seconds=self.heartbeat_timeout,
            )
        except ValueError as error:
            found = {name: os.environ[name] for name in (*EXPLICIT, *SLURM) if name in os.environ}
            raise ValueError(
                f"--distributed: JAX found no complete job ({error}); {LOOKED_FOR}; set: {found or 'none'}"
            ) from error
        except RuntimeError as error:
            raise ValueError(
                f"--distributed: could not join the job: {error}; does the recipe ask JAX for devices or arrays while "
                "it is read, or is the coordinator's port taken?"
            ) from error
        return Job.joined()


def explicit_place(environment: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` that the environment states; none where JAX shall detect them.

    Raises:
        ValueError: a variable is missing, is no number or contradicts another.
    """
    given = {name: environment[name] for name in EXPLICIT if environment.get(name)}
    missing = [name for name in SLURM if name not in environment]
    if missing and not given and "SLURM_JOB_ID" in environment and OPEN_MPI not in environment:
        raise ValueError(
            f"SLURM_JOB_ID is {environment['SLURM_JOB_ID']}, and {', '.join(missing)} not set: this is no step of the "
            "job; start the processes with srun"
        )
    if set(given) <= {ADDRESS}:
        _check_address(given)
        return {}  # JAX reads the address itself, and detects the rest
    if missing := [name for name in EXPLICIT if name not in given]:
        stated = ", ".join(f"{name} is {value}" for name, value in given.items())
        raise ValueError(f"{stated}, and {', '.join(missing)} not set; set all of {', '.join(EXPLICIT)}, or none")
    _check_address(given)
    for name in (COUNT, INDEX):
        if not given[name].isdecimal():
            raise ValueError(f"{name} is {given[name]!r}; it must be a number")
    count, index = int(given[COUNT]), int(given[INDEX])
    if not 0 <= index < count:
        raise ValueError(
            f"{INDEX} is {index} and {COUNT} is {count}; each process needs a number of its own from 0 to {COUNT} - 1"
        )
    return {"coordinator_address": given[ADDRESS], "num_processes": count, "process_id": index}


def _check_address(given: Mapping[str, str]) -> None:
    host, _, port = given.get(ADDRESS, "host:1").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"{ADDRESS} is {given[ADDRESS]!r}; it must be host:port, of process 0 and a port that is free there"
        )
