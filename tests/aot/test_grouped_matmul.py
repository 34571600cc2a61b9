"""`mosaic_tpu` compiles for every TPU of the table, forward and backward, plain and packed, and fits in its VMEM."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynamoe.kernels import grouped_matmul
from dynamoe.kernels.aot import Report, compile_for, mesh_for
from dynamoe.kernels.chips import CHIPS
from dynamoe.kernels.grouped_matmul.visits import visits_by_tile
from dynamoe.kernels.quantized import FORMATS, INT4, INT8, Quantized, quantize, quantize_rows

EVERY_TPU = pytest.mark.parametrize("chip", [name for name, chip in CHIPS.items() if chip.gpu is None])
EVERY_GPU = pytest.mark.parametrize("chip", [name for name, chip in CHIPS.items() if chip.gpu is not None])
ROWS, GROUPS, INNER, WIDTH = 384, 8, 512, 768
PASSES = ("grouped_matmul", "grouped_matmul_dx", "grouped_matmul_dw")
PACKED = [(format, None, False) for format in FORMATS.values()] + [(INT4, 64, True), (INT8, 128, False)]


def shape(*sizes: int, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def forward_and_backward(x: Any, w: Any, dy: jax.Array, sizes: jax.Array, implementation: str = "mosaic_tpu") -> Any:
    def product(x: Any, w: Any) -> jax.Array:
        return grouped_matmul(x, w, sizes, implementation=implementation)

    if isinstance(w, Quantized):
        y, back = jax.vjp(lambda x: product(x, w), x)
    else:
        y, back = jax.vjp(product, x, w)
    return y, *back(dy)


def compiled(chip: str, rows: int, groups: int, inner: int, width: int, dtype: jax.typing.DTypeLike) -> Report:
    shapes = shape(rows, inner, dtype=dtype), shape(groups, inner, width, dtype=dtype), shape(rows, width, dtype=dtype)
    return compile_for(chip, forward_and_backward, *shapes, shape(groups, dtype=jnp.int32))


def assert_fits(report: Report, passes: tuple[str, ...]) -> None:
    vmem_bytes = CHIPS[report.chip].vmem_bytes or 0
    assert tuple(kernel.name for kernel in report.kernels) == passes
    for kernel in report.kernels:
        assert kernel.vmem_bytes is not None and 0 < kernel.vmem_bytes <= vmem_bytes // 2
    assert report.fits


@EVERY_TPU
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_matrices_compile(chip, dtype):
    report = compiled(chip, ROWS, GROUPS, INNER, WIDTH, dtype)
    assert_fits(report, PASSES)
    bytes_each = jnp.dtype(dtype).itemsize
    arrays = bytes_each * (ROWS * INNER + GROUPS * INNER * WIDTH + ROWS * WIDTH)
    assert arrays <= report.argument_bytes <= arrays + 4096
    assert arrays <= report.output_bytes <= arrays + 4096


@EVERY_TPU
def test_axes_that_no_tile_divides_compile(chip):
    # a depth that is cut off at the edge in both directions, three rows, more groups than rows
    assert_fits(compiled(chip, 3, 5, 77, 130, jnp.float32), PASSES)
    assert_fits(compiled(chip, 333, 3, 4100, 4100, jnp.bfloat16), PASSES)


@EVERY_TPU
def test_packed_matrices_compile(chip):
    for format, group_size, zero_points in PACKED:

        def packed(w: jax.Array, format=format, group_size=group_size, zero_points=zero_points) -> Quantized:
            return quantize(w, format, group_size=group_size, zero_points=zero_points)

        w = jax.eval_shape(packed, shape(GROUPS, INNER, WIDTH))
        sizes = shape(GROUPS, dtype=jnp.int32)
        report = compile_for(chip, forward_and_backward, shape(ROWS, INNER), w, shape(ROWS, WIDTH), sizes)
        assert_fits(report, PASSES[:2])


@EVERY_TPU
def test_products_of_integers_compile(chip):
    w = jax.eval_shape(lambda w: quantize(w, INT8), shape(GROUPS, INNER, WIDTH))

    def product(x: jax.Array, w: Quantized, sizes: jax.Array) -> jax.Array:
        return grouped_matmul(quantize_rows(x), w, sizes, implementation="mosaic_tpu")

    assert_fits(compile_for(chip, product, shape(ROWS, INNER), w, shape(GROUPS, dtype=jnp.int32)), PASSES[:1])


def test_grid_and_flops_are_those_of_the_plan():
    report = compiled("v5e", 4096, 64, 256, 256, jnp.bfloat16)
    for kernel in report.kernels:
        assert kernel.grid is not None and kernel.grid.count(1) == 2
        steps = max(kernel.grid)
        tile = next(tile for tile in (128, 256, 512) if 4096 // tile + 63 == steps)
        plan = jax.eval_shape(lambda sizes, tile=tile: visits_by_tile(sizes, 4096, tile), shape(64, dtype=jnp.int32))
        assert plan.group.shape == (steps,)
        assert kernel.flops == 2 * steps * tile * 256 * 256


def test_on_a_mesh_each_device_multiplies_its_own_rows():
    mesh = mesh_for("v5e", {"data": 2, "tensor": 2})
    by_rows, by_width = PartitionSpec("data"), PartitionSpec(None, None, "tensor")

    def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        local: Callable[..., jax.Array] = jax.shard_map(
            lambda x, w, sizes: grouped_matmul(x, w, sizes, implementation="mosaic_tpu"),
            mesh=mesh,
            in_specs=(by_rows, by_width, by_rows),
            out_specs=PartitionSpec("data", "tensor"),
        )
        return jnp.sum(local(x, w, sizes).astype(jnp.float32))

    def placed(array: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    x, w = placed(shape(ROWS, INNER), by_rows), placed(shape(GROUPS, INNER, WIDTH), by_width)
    sizes = placed(shape(2 * GROUPS, dtype=jnp.int32), by_rows)
    report = compile_for("v5e", jax.value_and_grad(product, (0, 1)), x, w, sizes, mesh=mesh)
    assert_fits(report, PASSES)
    summed_over = {collective.axes for collective in report.collectives if collective.kind != "all-to-all"}
    assert {("data",), ("tensor",)} <= summed_over


@EVERY_GPU
def test_what_jax_offers_compiles_for_gpus(chip):
    shapes = shape(ROWS, INNER), shape(GROUPS, INNER, WIDTH), shape(ROWS, WIDTH), shape(GROUPS, dtype=jnp.int32)
    report = compile_for(chip, functools.partial(forward_and_backward, implementation="xla"), *shapes)
    assert report.flops == 3 * 2 * ROWS * INNER * WIDTH
    assert report.fits and report.kernels == () and report.argument_bytes > 2 * GROUPS * INNER * WIDTH
