"""What JAX's runtime says when it aborts a process of a job, said again as one clear line.

When a process of a job is gone, the runtime of every other one logs a few lines and aborts, before Python can say
anything. So a helper stands between this process's standard error and the real one: it hands on every line as it comes,
and when the lines end with such an abort, it adds what happened and what to do. It ends with the process.

This file is a script too, which needs nothing but the standard library.
"""

import os
import re
import subprocess
import sys

ABORT = "Terminating process because the JAX distributed service detected fatal errors"
GONE = re.compile(r"unhealthy \(stopped sending heartbeats\):\s*((?:\d+[,\s]*)+)")
PORT_TAKEN = re.compile(r"Failed to add port to server: .*:(\d+)'")
AGAIN = "Start the same command again in every process: a run continues from its last checkpoint"


def relay_errors() -> None:
    """Send this process's standard error through the helper, from here to the end of the process."""
    sys.stderr.flush()
    command = [sys.executable, "-I", "-S", os.path.abspath(__file__)]
    # A session of its own: Ctrl-C in a terminal is for the process, not for its helper.
    helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    assert helper.stdin is not None
    os.dup2(helper.stdin.fileno(), 2)
    helper.stdin.close()
    helper.returncode = 0  # it outlives this process: nobody waits for it


def explanation(log: str) -> str | None:
    """What an abort means, in one line; None where the log tells of none."""
    if taken := PORT_TAKEN.search(log):
        return (
            f"port {taken[1]} of this machine is taken, and process 0 needs one that is free: choose another in "
            "JAX_COORDINATOR_ADDRESS, or by JAX_COORDINATOR_PORT where JAX detects the job"
        )
    if ABORT not in log:
        return None
    if gone := GONE.findall(log):
        names = sorted({int(name) for name in re.findall(r"\d+", gone[-1])})
        who = f"process {names[0]} is" if len(names) == 1 else f"processes {', '.join(map(str, names))} are"
        return f"{who} gone (killed, preempted, or the machine is lost), and this one ends with the job. {AGAIN}"
    if "RegisterTask" in log:
        return (
            "the processes of the job did not all meet in time. Is every process started, with the same "
            "JAX_COORDINATOR_ADDRESS and number of processes, and can each reach process 0 at that port? "
            "--job.start-timeout gives them more seconds"
        )
    if "Failed to send RPC to coordination service" in log or "Socket closed" in log:
        return (
            "process 0, which coordinates the job, is gone (ended, killed, preempted, or unreachable), and this one "
            f"ends with the job. {AGAIN}"
        )
    return f"another process of the job ended too early, and this one ends with it; its own log says why. {AGAIN}"


def _relay() -> None:
    kept = b""
    while data := os.read(0, 65536):
        os.write(2, data)
        kept = (kept + data)[-100_000:]
    if (what := explanation(kept.decode(errors="replace"))) is not None:
        os.write(2, f"dynamoe: error: {what}\n".encode())


if __name__ == "__main__":
    _relay()
