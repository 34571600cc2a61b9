"""`mosaic_gpu` compiles for Hopper GPUs: tensor cores and TMA are used, no register is spilled, shared memory suffices.

What Mosaic dumps is read: PTX, what ptxas says, and the launches in its log. Nothing here is a measurement of time.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynamoe.kernels import grouped_matmul
from dynamoe.kernels.aot import compile_for, mesh_for
from dynamoe.kernels.grouped_matmul.mosaic_gpu_kernels.calls import fp8_grouped_matmul, grouped_matmul_mosaic_gpu
from dynamoe.kernels.manual_axes import vary_alike
from dynamoe.kernels.quantized import INT4, INT8, Format, Quantized, quantize

HOPPERS = "h100", "h200"
SHARED_MEMORY = 227 * 1024
TINY, OLMOE, MIXTRAL, DECODE = (
    (192, 128, 128, 4),
    (65536, 2048, 1024, 64),
    (65536, 4096, 14336, 8),
    (64, 2048, 1024, 64),
)
"""Rows, D, F and groups."""
PASSES = ["grouped_matmul", "grouped_matmul_dw", "grouped_matmul_dx"]


class Dumped(NamedTuple):
    """What is known of one kernel."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    serialized: bool
    """Whether ptxas says that it waits for each product, for want of registers or order."""
    ptx: str


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Dumped]]:
    """`compiled(function, *shapes)`: compile it for both chips; its Mosaic kernels.

    JAX keeps a kernel that it has compiled: the second chip, which is the same to it, dumps nothing.
    """
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

    def compile(function: Callable[..., Any], *shapes: Any) -> list[Dumped]:
        for chip in HOPPERS:
            compile_for(chip, function, *shapes)
        found = [read_dump(path) for path in tmp_path.glob("*.ptx")]
        for path in tmp_path.iterdir():
            path.unlink()  # a log has tens of megabytes
        return found

    return compile


def read_dump(ptx: Path) -> Dumped:
    said = ptx.with_suffix(".ptxas").read_text()
    launches = re.findall(
        r"dynamic_shared_memory_size %c(\d+)_i32", ptx.with_suffix(".mlir-passes.log").read_text(errors="replace")
    )
    return Dumped(
        name=ptx.stem.rpartition("_")[0],
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        spilled_bytes=sum(
            map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)\n?", said.partition("Function")[2]))
        ),
        shared_bytes=max(map(int, launches)),
        serialized=bool(re.search("C7510|C7511|C7514", said)),
        ptx=ptx.read_text(),
    )


def assert_well_compiled(kernels: list[Dumped], names: list[str], product: str = "bf16.bf16") -> None:
    assert {kernel.name for kernel in kernels} == set(names)
    for kernel in kernels:
        print(kernel[:-1])
        assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+\.f32\.{product}", kernel.ptx)
        assert "cp.async.bulk.tensor" in kernel.ptx
        assert not kernel.serialized, f"{kernel.name}: products wait for one another"
        assert_registers_suffice(kernel)
        assert kernel.spilled_bytes == 0
        assert 0 < kernel.shared_bytes <= SHARED_MEMORY


def assert_registers_suffice(kernel: Dumped) -> None:
    """A warpgroup that asks for more than what was given to the block and freed waits for ever."""
    (threads,) = map(int, re.findall(r"\.maxntid (\d+)", kernel.ptx))
    (fewer,), (more,) = (
        {int(count) for count in re.findall(rf"setmaxnreg\.{change}\.sync\.aligned\.u32\s+(\d+)", kernel.ptx)}
        for change in ("dec", "inc")
    )
    # Registers are given in eights.
    assert fewer + more * (threads // 128 - 1) <= -(-kernel.registers // 8) * 8 * (threads // 128)


def shape(*sizes: int, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def forward_and_backward(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> Any:
    y, back = jax.vjp(lambda x, w: grouped_matmul_mosaic_gpu(x, w, sizes), x, w)
    return y, *back(dy)


def gradient_of_rows(x: jax.Array, w: Quantized, dy: jax.Array, sizes: jax.Array) -> Any:
    y, back = jax.vjp(lambda x: grouped_matmul_mosaic_gpu(x, w, sizes), x)
    return y, *back(dy)


def shapes_of(
    sizes: tuple[int, int, int, int], dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> list[jax.ShapeDtypeStruct]:
    rows, inner, width, groups = sizes
    arrays = (rows, inner), (groups, inner, width), (rows, width)
    return [*(shape(*array, dtype=dtype) for array in arrays), shape(groups, dtype=jnp.int32)]


@pytest.mark.parametrize("sizes", [TINY, OLMOE, MIXTRAL, DECODE], ids=["tiny", "olmoe", "mixtral", "decode"])
def test_plain_matrices_compile_forward_and_backward(compiled, sizes):
    assert_well_compiled(compiled(forward_and_backward, *shapes_of(sizes)), PASSES)


def test_float16_compiles(compiled):
    assert_well_compiled(compiled(forward_and_backward, *shapes_of(TINY, jnp.float16)), PASSES, "f16.f16")


def test_rows_that_no_eight_divides_and_the_least_width_compile(compiled):
    assert_well_compiled(compiled(forward_and_backward, *shapes_of((7, 64, 192, 256))), PASSES)


@pytest.mark.parametrize("inner", [64, 192])
def test_two_warpgroups_with_tiles_of_64_rows_compile(compiled, inner):
    assert_well_compiled(compiled(forward_and_backward, *shapes_of((1024, inner, 256, 4))), PASSES)


@pytest.mark.parametrize("sizes", [OLMOE, DECODE], ids=["olmoe", "decode"])
def test_fp8_compiles(compiled, sizes):
    rows, inner, width, groups = sizes
    codes = shape(rows, inner, dtype=jnp.float8_e4m3fn), shape(groups, width, inner, dtype=jnp.float8_e4m3fn)
    scales = shape(rows, 1, dtype=jnp.float32), shape(groups, 1, width, dtype=jnp.float32)
    kernels = compiled(fp8_grouped_matmul, *codes, *scales, shape(groups, dtype=jnp.int32))
    assert_well_compiled(kernels, ["grouped_matmul"], "e4m3.e4m3")


def packed_shape(
    sizes: tuple[int, int, int, int], format: Format, group_size: int | None, zero_points: bool
) -> Quantized:
    _, inner, width, groups = sizes

    def pack(w: jax.Array) -> Quantized:
        return quantize(w, format, group_size=group_size, zero_points=zero_points)

    return jax.eval_shape(pack, shape(groups, inner, width))


@pytest.mark.parametrize("sizes", [OLMOE, DECODE], ids=["olmoe", "decode"])
def test_packed_matrices_compile_forward_and_backward(compiled, sizes):
    x, _, dy, counts = shapes_of(sizes)
    for format, group_size, zero_points in ((INT8, None, False), (INT4, 128, True)):
        w = packed_shape(sizes, format, group_size, zero_points)
        kernels = compiled(gradient_of_rows, x, w, dy, counts)
        assert_well_compiled(kernels, ["grouped_matmul_packed", "grouped_matmul_packed_dx"])


def test_small_groups_of_packed_matrices_compile(compiled):
    x, _, _, counts = shapes_of(OLMOE)
    kernels = compiled(grouped_matmul_mosaic_gpu, x, packed_shape(OLMOE, INT4, 32, False), counts)
    assert_well_compiled(kernels, ["grouped_matmul_packed"])


def test_large_groups_of_packed_matrices_compile(compiled):
    x, _, dy, counts = shapes_of(DECODE)
    kernels = compiled(gradient_of_rows, x, packed_shape(DECODE, INT4, 256, True), dy, counts)
    assert_well_compiled(kernels, ["grouped_matmul_packed", "grouped_matmul_packed_dx"])


def test_on_a_mesh_each_device_multiplies_its_own_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    mesh = mesh_for("h100", {"data": 2, "tensor": 2})
    by_rows, by_width = PartitionSpec("data"), PartitionSpec(None, None, "tensor")

    def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        local: Callable[..., jax.Array] = jax.shard_map(
            lambda *arrays: grouped_matmul_mosaic_gpu(*vary_alike(*arrays)),
            mesh=mesh,
            in_specs=(by_rows, by_width, by_rows),
            out_specs=PartitionSpec("data", "tensor"),
        )
        return jnp.sum(local(x, w, sizes).astype(jnp.float32))

    def placed(array: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    x, w = placed(shape(384, 256), by_rows), placed(shape(8, 256, 512), by_width)
    sizes = placed(shape(16, dtype=jnp.int32), by_rows)
    compile_for("h100", jax.grad(product, (0, 1)), x, w, sizes, mesh=mesh)
    assert {"grouped_matmul_dx", "grouped_matmul_dw"} <= {path.stem.rpartition("_")[0] for path in tmp_path.iterdir()}


def test_another_chip_is_named():
    x, w, _, sizes = shapes_of(TINY)
    with pytest.raises(NotImplementedError, match="mosaic_gpu is for Hopper GPUs .*; the device is TPU v5 lite"):
        compile_for("v5e", grouped_matmul_mosaic_gpu, x, w, sizes)


def test_a_report_counts_its_products():
    sizes = rows, inner, width, _ = TINY

    def step(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> Any:
        y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="mosaic_gpu"), x, w)
        return y, *back(dy)

    report = compile_for("h100", step, *shapes_of(sizes))
    assert report.flops == 3 * 2 * rows * inner * width
    assert [kernel.name for kernel in report.kernels] == ["grouped_matmul", "grouped_matmul_dx", "grouped_matmul_dw"]
