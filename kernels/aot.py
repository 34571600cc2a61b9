"""Compile any function for a chip that is not here, and say what the compiler knows about it.

`report = compile_for("v5p", function, *shapes)` runs the real compiler of that chip: XLA:TPU and Mosaic, of the libtpu
that JAX names, or XLA:GPU, of JAX' plugin for CUDA. Set JAX_PLATFORMS=cpu, or JAX looks for the chips first.
Nothing here is a measurement: no time on the chip is estimated. What may be believed, and what is
therefore counted here instead: `flops.py` and `collectives.py`.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .chips import CHIPS, MEBI
from .collectives import Collective, read_collectives
from .flops import count_flops
from .ptx import Resources, triton_resources

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # else libtpu warns that it finds none; what counts is the topology
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process dies on a lock file
}
_TPU_COMPILER = "libtpu", "libtpu", "libtpu"
_GPU_COMPILER = "jax_cuda13_plugin", "jax-cuda13-plugin", "JAX' plugin for CUDA"
"""The module, the package and how one calls it."""


class Kernel(NamedTuple):
    """One call of a Pallas or Triton kernel in the program."""

    name: str
    grid: tuple[int, ...] | None
    flops: float | None
    """At every step of the grid: a bound, where the kernel skips some."""
    vmem_bytes: int | None
    """What the compiler gave it of a core's VMEM; None: it does not say, or left the call out."""
    resources: Resources | None = None
    """Of a Triton kernel, where ptxas is installed."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiler said, per device, and what was counted. None: it does not say."""

    chip: str
    devices: int
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    alias_bytes: int
    """Of outputs that take the place of donated arguments."""
    flops: float | None
    """Of matrix products, over all devices, loops with their lengths; of kernels a bound."""
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    compile_seconds: float
    ragged_flops: float | None = None
    """Of `flops`, those of ragged products, which skip rows that belong to no group: a bound."""
    own_flops: float | None = None
    """The compiler's own count of all operations on one device, a loop's body once."""

    @property
    def memory_bytes(self) -> int:
        """What a device must hold at once, about: arguments, outputs and temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """Whether a device has that much. A TPU's compiler refuses what does not fit; a GPU's does not."""
        return self.memory_bytes <= CHIPS[self.chip.partition(":")[0]].hbm_bytes

    @property
    def vmem_bytes(self) -> int | None:
        """Of the kernel that takes most."""
        return max((kernel.vmem_bytes for kernel in self.kernels if kernel.vmem_bytes is not None), default=None)

    def table(self) -> list[tuple[str, str]]:
        """Rows of a name and a value to print."""
        chip = CHIPS[self.chip.partition(":")[0]]
        rows = [
            ("chip", f"{self.chip}, {self.devices} device{'s' * (self.devices > 1)}"),
            ("arguments", readable_bytes(self.argument_bytes)),
            ("outputs", readable_bytes(self.output_bytes)),
            ("temporaries", readable_bytes(self.temporary_bytes)),
            ("memory", f"{readable_bytes(self.memory_bytes)} of {readable_bytes(chip.hbm_bytes)} per device"),
            ("matrix products", "not known" if self.flops is None else f"{self.flops:.4g} FLOP over all devices"),
        ]
        for kernel in self.kernels:
            grid = "known at run time" if kernel.grid is None else " x ".join(map(str, kernel.grid))
            grid += "" if kernel.grid is None else f" = {math.prod(kernel.grid)} steps"
            flops = "FLOP not known" if kernel.flops is None else f"at most {kernel.flops:.4g} FLOP"
            if chip.vmem_bytes is not None:
                vmem = "VMEM not known" if kernel.vmem_bytes is None else f"{readable_bytes(kernel.vmem_bytes)} of VMEM"
                flops += f", {vmem} of {readable_bytes(chip.vmem_bytes)}"
            if kernel.resources is not None:
                registers, spilled, shared = kernel.resources
                flops += f", {registers} registers, {spilled} bytes spilled, {readable_bytes(shared)} shared"
            rows.append((kernel.name, f"grid {grid}, {flops}"))
        for kind, size, axes, times in self.collectives:
            over = "axes not known" if axes is None else "over " + (", ".join(axes) or "one device")
            count = "times not known" if times is None else f"{times} times"
            rows.append((kind, f"{readable_bytes(size)} {over}, {count}"))
        return [*rows, ("compiled in", f"{self.compile_seconds:.1f} s")]


def mesh_for(chip: str, axes: Mapping[str, int]) -> Mesh:
    """A mesh of devices that are not here, the first ones of the topology.

    Args:
        chip: a key of `CHIPS`, or one with a topology, as "v5p:4x4x4" or "h100:1x4x8" (4 boxes of 8).
        axes: sizes of the mesh axes by name.

    Raises:
        ValueError: the chip is not known, or its topology has fewer devices.
        ModuleNotFoundError: the compiler for it is not installed.
    """
    devices = absent_devices(chip)
    wanted = math.prod(axes.values())
    if wanted > len(devices):
        raise ValueError(
            f"axes are {dict(axes)}, {wanted} devices; {chip} has {len(devices)}: name a larger topology, as "
            f"{_example(chip.partition(':')[0])}"
        )
    return Mesh(
        np.array(devices[:wanted]).reshape(*axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
    )


def compile_for(
    chip: str,
    function: Callable[..., Any],
    *shapes: Any,
    mesh: Mesh | None = None,
    options: Mapping[str, str] | None = None,
    read: Callable[[str], None] | None = None,
) -> Report:
    """Compile a function for a chip that is not here.

    Args:
        chip: a key of `CHIPS`, or with a topology, as "v5p:4x4x4".
        function: plain, or what `jax.jit` returns, with its donations and shardings.
        *shapes: its arguments: pytrees of `jax.ShapeDtypeStruct` or arrays. One without a sharding is replicated.
        mesh: of `mesh_for`; None: one device.
        options: of the compiler, by name.
        read: gets the compiled program's text, for what the report does not say.

    Raises:
        ValueError: the chip is not known.
        ModuleNotFoundError: its compiler is not installed.
        jax.errors.JaxRuntimeError: the compiler refuses, as where VMEM or HBM do not suffice; it says by how much.
    """
    mesh = mesh if mesh is not None else mesh_for(chip, {"device": 1})
    placed = jax.tree.map(lambda shape: _placed(shape, mesh), shapes)
    # Inside the mesh Pallas knows the chip, and what was traced for another is not found in a cache.
    with jax.set_mesh(mesh):
        jitted = function if hasattr(function, "trace") else jax.jit(function)
        traced = jitted.trace(*placed)
        start = time.perf_counter()
        with warnings.catch_warnings():  # JAX' cache stores programs for absent devices, and cannot load them again
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
            lowered = traced.lower()
            compiled = lowered.compile(compiler_options=dict(options) if options else None)
        seconds = time.perf_counter() - start
    counted, text, memory = count_flops(traced.jaxpr), compiled.as_text() or "", compiled.memory_analysis()
    assert memory is not None  # both compilers say
    if read is not None:
        read(text)
    vmem, resources = _vmem_by_name(text), triton_resources(lowered.compiler_ir())
    return Report(
        chip=chip,
        devices=mesh.size,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        flops=counted.flops,
        kernels=tuple(
            Kernel(call.name, call.grid, call.flops, vmem.get(call.name), resources.get(call.identity))
            for call in counted.kernels
        ),
        collectives=tuple(read_collectives(text, mesh.shape)),
        compile_seconds=seconds,
        ragged_flops=counted.ragged,
        own_flops=(compiled.cost_analysis() or {}).get("flops"),
    )


def absent_devices(chip: str) -> list[Any]:
    """The devices of a chip's topology, in their own order. Compilers and meshes take them; nothing can run on them.

    Args:
        chip: a key of `CHIPS`, or with a topology, as "v5p:4x4x4".

    Raises:
        ValueError: the chip is not known.
        ModuleNotFoundError: its compiler is not installed.
        ImportError: its compiler is not the one that JAX names.
        RuntimeError: JAX has found other devices already, and the compiler cannot be loaded beside them.
    """
    kind, _, topology = chip.partition(":")
    if kind not in CHIPS:
        raise ValueError(
            f"chip is {chip!r}; allowed are {', '.join(CHIPS)}, each also with a topology, as {_example('v5p')}"
        )
    gpu, topology = CHIPS[kind].gpu, topology or CHIPS[kind].topology
    _check_compiler(chip, *(_TPU_COMPILER if gpu is None else _GPU_COMPILER))
    if gpu is not None:
        try:
            found = topologies.get_topology_desc(
                platform="cuda", topology_name=kind, target_config=gpu, topology=topology
            )
        except NotImplementedError as error:
            raise RuntimeError(
                f"the compiler for {chip} is not loaded ({error}): set JAX_PLATFORMS=cpu before JAX starts"
            ) from error
        return list(found.devices)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # read when libtpu loads
    return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{topology}").devices)


def _check_compiler(chip: str, module: str, package: str, called: str) -> None:
    """Refuse a compiler that is missing, or that JAX does not name: another one fails in the middle of a program."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"compiling for {chip} needs {called}: pip install 'dynamoe[aot]'")
    try:
        wanted, found = _required(package), importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return  # it was built by hand: who did that knows its version
    # "0.0.42.*" admits what begins so, "0.10.2" that alone.
    if wanted is not None and not re.fullmatch(re.escape(wanted).replace(r"\*", ".*"), found):
        raise ImportError(
            f"compiling for {chip} needs {package} {wanted}, which JAX {jax.__version__} names; {found} is installed: "
            f"pip install 'dynamoe[aot]' '{package}=={wanted}'"
        )


def _required(package: str) -> str | None:
    """The version of a package that JAX names exactly, as "0.0.42.*"."""
    for line in importlib.metadata.requires("jax") or ():
        exactly = rf"{re.escape(package)}(?:\[[\w-]+\])?(?:==([\w.*]+)|<=([\w.]+),>=\2\b)"
        if match := re.match(exactly, line.replace("_", "-")):
            return match[1] or match[2]
    return None


def _example(kind: str) -> str:
    return f"{kind}:{CHIPS[kind].larger}"


def _placed(shape: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    sharding = getattr(shape, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh != mesh:
        sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _vmem_by_name(text: str) -> dict[str, int]:
    """The largest VMEM of the Mosaic kernels of each name."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        name = re.search(r'op_name="[^"]*?([^/"]+)/pallas_call"', line) or re.search(r"%([\w.\-]+?)(?:\.\d+)* = ", line)
        used = re.search(r'"used_scoped_memory_configs":(\[.*?\])', line)
        if name and used:
            sizes = re.findall(r'"memory_space":"1"[^}]*?"size":"(\d+)"', used[1])
            found[name[1]] = max(found.get(name[1], 0), sum(map(int, sizes)))
    return found


def readable_bytes(count: int | float) -> str:
    """As "3.50 GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", MEBI), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
