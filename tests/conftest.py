"""What holds for every test: strict numerics, checked shapes and types, the CPU, a deterministic Hypothesis."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

# Set in the environment, before JAX is imported, so that the processes that tests start run under the same rules.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling costs more than running at test sizes. A caller's XLA_FLAGS win: the last setting of a flag counts.
_FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{_FAST_COMPILE} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# A pytest plugin may have imported JAX before this file could set the environment.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Users do not pay for these checks; tests do. The hook has to be in place before any module of the package is imported.
jaxtyping.install_import_hook("dynamoe", "beartype.beartype")

# Derandomized: a red run is red again. Compiling makes the first example slow, so no deadline.
hypothesis.settings.register_profile("dynamoe", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.load_profile("dynamoe")

_CALL_IN_CHILD = """
import importlib.util, sys
import jaxtyping
jaxtyping.install_import_hook("dynamoe", "beartype.beartype")
path, name, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location("test_module", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
getattr(module, name)(*arguments)
"""

_JOIN_FIRST = """
import os, jax
address, count, index = (os.environ["JAX_" + name] for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"))
jax.distributed.initialize(address, int(count), int(index))
"""


@pytest.fixture
def key() -> jax.Array:
    """A PRNG key, the same in every test."""
    return jax.random.key(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the type checks off: for tests of the package's own errors, which the checks would forestall."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def run_with_devices() -> Callable[..., str]:
    """`run_with_devices(8, function, *arguments)`: call a test module's function where JAX sees 8 fake CPU devices.

    The number of devices is fixed when JAX starts, so this takes a fresh process. `function` is a top-level function of
    a test module and takes strings; it asserts for itself. Returns what it printed; an error fails the test with its
    traceback.
    """

    def run(count: int, function: Callable[..., None], *arguments: str, timeout: float = 300.0) -> str:
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        child = subprocess.run(
            [sys.executable, "-c", _CALL_IN_CHILD, function.__code__.co_filename, function.__name__, *arguments],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if child.returncode:
            pytest.fail(f"{function.__name__} failed on {count} devices:\n{child.stdout}{child.stderr}", pytrace=False)
        return child.stdout

    return run


@pytest.fixture
def start_processes() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """`start_processes(2, 4, [sys.executable, ...])`: a job of 2 processes that see 4 fake CPU devices each.

    All get the same command and an environment that tells each its place in the job. Options: `environment`, more
    variables for all, or a list of them, one for each. What still runs when the test ends is killed.
    """
    started: list[subprocess.Popen[str]] = []

    def start(
        count: int,
        devices: int,
        command: list[str],
        *,
        environment: dict[str, str] | list[dict[str, str]] | None = None,
    ) -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        more = environment if isinstance(environment, list) else [environment or {}] * count
        children = []
        for index in range(count):
            place = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(count), "PROCESS_ID": str(index)}
            of_job = {f"JAX_{name}": value for name, value in place.items()} | {"XLA_FLAGS": flags}
            child = subprocess.Popen(
                command,
                env={**os.environ, "JAX_PLATFORMS": "cpu", **of_job, **more[index]},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            children.append(child)
            started.append(child)
        return children

    yield start
    for child in started:
        child.kill()
        child.communicate()


@pytest.fixture
def run_with_processes(start_processes: Callable[..., list[subprocess.Popen[str]]]) -> Callable[..., list[str]]:
    """`run_with_processes(2, 4, function, *arguments)`: as `run_with_devices`, in a job of 2 processes of 4 devices.

    Returns what each printed.
    """

    def run(
        count: int, devices: int, function: Callable[..., None], *arguments: str, timeout: float = 300
    ) -> list[str]:
        call = [function.__code__.co_filename, function.__name__, *arguments]
        children = start_processes(count, devices, [sys.executable, "-c", _JOIN_FIRST + _CALL_IN_CHILD, *call])
        outputs = [child.communicate(timeout=timeout) for child in children]
        for index, (child, (output, errors)) in enumerate(zip(children, outputs, strict=True)):
            if child.returncode:
                pytest.fail(f"{function.__name__} failed in process {index}:\n{output}{errors}", pytrace=False)
        return [output for output, _ in outputs]

    return run
