"""What the assembler says of a program's Triton kernels: registers, spills and shared memory.

jax-triton puts a kernel's PTX into the program as a message of jaxlib's `triton.proto`; NVIDIA's `ptxas` compiles it
here as the driver would there. Nothing is run.
"""

import functools
import importlib.metadata
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = ("triton_kernel_call", "triton_kernel_call_ffi")
"""Of jax-triton 0.3, and 0.4."""
KERNEL_CALL, METADATA = 1, 3
"""Fields of a message: the call, which may be of several kinds, and what was sent along with it."""
KERNEL = 1
"""Of a call."""
SHARED, PTX, CAPABILITY = 3, 4, 6
"""Of a kernel."""


class Resources(NamedTuple):
    """Of one kernel."""

    registers: int
    """Of a thread."""
    spill_bytes: int
    """That a thread stores to and loads from memory because it has no registers for them."""
    shared_bytes: int
    """Of a block."""


def triton_resources(module: Any) -> dict[bytes, Resources | None]:
    """The Triton kernels of a lowered program, by the metadata of their calls.

    Args:
        module: of MLIR, as `lowered.compiler_ir()` returns it.

    Returns:
        Resources, or None where no `ptxas` is installed.

    Raises:
        RuntimeError: ptxas refuses a kernel; it says why.
    """
    found = {}
    for operation in _operations(module.operation):
        if operation.name == "stablehlo.custom_call" and operation.attributes["call_target_name"].value in TARGETS:
            call = dict(_fields(_message(operation)))
            kernel = dict(_fields(dict(_fields(call[KERNEL_CALL]))[KERNEL]))
            found[call.get(METADATA, b"")] = _assembled(kernel[PTX], kernel[CAPABILITY], kernel.get(SHARED, 0))
    return found


def _message(call: Any) -> bytes:
    attributes = call.attributes
    typed = "mhlo.backend_config" in attributes
    return zlib.decompress(
        (attributes["mhlo.backend_config"]["opaque"] if typed else attributes["backend_config"]).value_bytes
    )


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _operations(inner.operation)


@functools.lru_cache(maxsize=64)
def _assembled(ptx: bytes, capability: int, shared_bytes: int) -> Resources | None:
    ptxas = _ptxas()
    if ptxas is None:
        return None
    # From 9.0 on, the instructions of one generation alone are part of its "a" target: Triton writes wgmma.
    arch = f"sm_{capability}{'a' * (capability >= 90)}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_bytes(ptx)
        command = [ptxas, "-v", f"-arch={arch}", str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas refuses a kernel for {arch}: {done.stderr.strip()[:500]}")
    registers = max(map(int, re.findall(r"Used (\d+) registers", done.stderr)))
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
    return Resources(registers, spills, shared_bytes)


def _ptxas() -> str | None:
    """Of NVIDIA's package for compiling, else of a CUDA that is installed. Triton's own may be older than its PTX."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.name == "ptxas":
            return str(file.locate())
    return shutil.which("ptxas")


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and bytes of a protocol buffer, by the numbers of their fields."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _number(message, at)
        else:
            size, at = _number(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _number(message: bytes, at: int) -> tuple[int, int]:
    """Seven bits in each byte, the lowest first; the highest bit says that more follow."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
