"""Call a Triton kernel from JAX: through jax-triton on a GPU, or in Triton's interpreter on a CPU.

The interpreter (TRITON_INTERPRET=1, set before Python starts; it needs torch) runs a kernel as it stands, block by
block, for tests and for a reader's debugger. Its products of bfloat16 are wrong, so such arrays are widened before and
rounded after. Triton and jax-triton are imported where a kernel is called, and not before.
"""

import functools
import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import partial_eval
from jax.custom_batching import sequential_vmap

from .implementations import platform
from .manual_axes import vary_as
from .traced_device import device_kind

CAPABILITY = 90
"""Compute capability that is compiled for where no device says its own."""
LEAST_CAPABILITY, BLACKWELL = 80, 100
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is called."""

    name: str
    """Of the call in profiles and reports."""
    kernel: Any
    """Made by `triton.jit`."""
    programs: int
    constants: Mapping[str, Any]
    """What is in capital letters in a kernel; `PROGRAMS` is added."""
    warps: int
    stages: int
    """Steps of a loop whose loads are under way at once."""

    @property
    def identity(self) -> bytes:
        """The same for what is compiled to the same kernel: a report finds a call's kernel by it."""
        return repr((self.kernel.__name__, self.programs, self.warps, self.stages, *self.constants.items())).encode()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refuse_without_gpu(implementation: str) -> None:
    """Refuse to trace for a platform on which no Triton kernel can run.

    Raises:
        NotImplementedError: it is no CUDA GPU, or too old a one, or what is needed is not installed.
    """
    if interpreted():
        for needed in ("triton", "torch"):
            if importlib.util.find_spec(needed) is None:
                raise NotImplementedError(f"Triton's interpreter needs {needed}: pip install 'dynamoe[parity]'")
        return
    if platform() != "gpu":
        raise NotImplementedError(
            f"{implementation} is for GPUs; the platform is {platform()}. Allowed besides are a compile for a GPU that "
            "is not present (dynamoe.kernels.aot) and Triton's interpreter (TRITON_INTERPRET=1)"
        )
    here = jax.devices()[0]
    if jax.default_backend() == "gpu" and not _numeric(getattr(here, "compute_capability", None)):
        raise NotImplementedError(f"{implementation} is for CUDA GPUs; here is {here.device_kind}")
    if capability() < LEAST_CAPABILITY:
        raise NotImplementedError(
            f"{implementation} needs compute capability {LEAST_CAPABILITY / 10}; here it is {capability() / 10}"
        )
    if importlib.util.find_spec("jax_triton") is None:
        raise NotImplementedError(f"{implementation} needs jax-triton: pip install 'dynamoe[gpu]'")


def _numeric(capability: Any) -> bool:
    return str(capability).replace(".", "").isdecimal()


def capability() -> int:
    """Compute capability, as 90, of the GPU that is here; of one that is not, CAPABILITY, which all of `CHIPS` have."""
    here = jax.devices()[0]
    if jax.default_backend() != "gpu" or here.device_kind != device_kind():
        return CAPABILITY
    return int(here.compute_capability.replace(".", ""))


def triton_call(launch: Launch, *arrays: jax.Array, out: jax.ShapeDtypeStruct) -> jax.Array:
    """Run a kernel over arrays, which come to it before its output. Under vmap, one after the other.

    Args:
        launch: the kernel and how it is called.
        *arrays: those of one dtype other than the kernel's may be refused by Triton itself.
        out: what it writes.
    """
    call = sequential_vmap(functools.partial(_interpret if interpreted() else _compile, launch, out))
    return vary_as(call(*arrays), arrays[0])


def _compile(launch: Launch, out: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
    call, words = _jax_triton()
    return call(
        *arrays,
        kernel=launch.kernel,
        grid=launch.programs,
        name=launch.name,
        num_warps=launch.warps,
        num_stages=launch.stages,
        compute_capability=capability(),
        serialized_metadata=launch.identity,
        PROGRAMS=launch.programs,
        **words(out),
        **launch.constants,
    )


@functools.cache
def _jax_triton() -> tuple[Callable[..., Any], Callable[[Any], dict[str, Any]]]:
    """The function that calls a kernel, and its arguments that have another name in each version.

    What it sets holds for the whole process, for a user's own kernels, too.
    """
    from jax_triton import triton_lib  # pyright: ignore[reportMissingImports]
    from triton import knobs  # pyright: ignore[reportMissingImports]

    if capability() < BLACKWELL:
        # Triton writes PTX as new as the newest assembler that it brings, which the driver or XLA's may not read.
        os.environ.setdefault("TRITON_PTXAS_BLACKWELL_PATH", knobs.nvidia.ptxas.path)
    # The rule of 0.4.1 for code that nobody needs fails on every call; without one JAX keeps a call as a whole.
    partial_eval.dce_rules.pop(triton_lib.triton_kernel_call_p, None)
    if "out_type" in inspect.signature(triton_lib.triton_call).parameters:
        return triton_lib.triton_call, lambda out: {"out_type": out, "backend_options": {"enable_fp_fusion": True}}
    return triton_lib.triton_call, lambda out: {"out_shape": out}


def _interpret(launch: Launch, out: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
    wide = [array.astype(_wider(array.dtype)) for array in arrays]
    dtype = _wider(out.dtype)
    run = functools.partial(_run_in_interpreter, launch, out.shape, dtype)
    return jax.pure_callback(run, jax.ShapeDtypeStruct(out.shape, dtype), *wide).astype(out.dtype)


def _run_in_interpreter(launch: Launch, shape: Sequence[int], dtype: np.dtype, *arrays: Any) -> np.ndarray:
    import torch  # pyright: ignore[reportMissingImports]

    # NaN where floats are not written: what a kernel leaves out shows.
    result = np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else -1, dtype)
    tensors = [torch.from_numpy(np.array(array)) for array in (*arrays, result)]
    with _one_at_a_time:  # the interpreter keeps its state in globals, and XLA calls back from several threads
        launch.kernel[(launch.programs,)](*tensors, PROGRAMS=launch.programs, **launch.constants)
    return tensors[-1].numpy()


def _wider(dtype: Any) -> np.dtype:
    return np.dtype(np.float32) if dtype == jnp.bfloat16 else np.dtype(dtype)
