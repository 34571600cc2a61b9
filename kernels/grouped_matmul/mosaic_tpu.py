"""A grouped matmul for TPU in Pallas: one kernel for y and for dx, which reads the matrices transposed, one for dw.

The grid walks a plan of visits (`visits.py`), so no step belongs to an empty group and a row tile that groups share is
visited once by each: at most (row tiles + E - 1) x column tiles x depth tiles steps, whatever the group sizes, which
are data and not shape. A visit's row tile, matrix tile and output tile are found through scalars in SMEM.

Rows of nobody come out as zero without being multiplied, and what lies in them or past the arrays' edges (NaN, say) is
never summed: a row of `x @ w` mixes with no other row, dw selects its own rows of both factors, and a depth that the
tiles do not divide is cut off in both.

Letters: M rows, D inner width, F output width, E groups. A pass contracts over its depth: D forward, F for dx, and M
for dw. Not yet run on a TPU: interpreted on CPU and compiled ahead of time, so it is no platform's default.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax._src import config as jax_config
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..quantized import Quantized, QuantizedRows
from .matrix_tiles import inner_unit, load_matrix, matrix_bits, matrix_spec
from .tiles import Pass, Tiles, chip, choose_tiles, vmem_limit
from .visits import visits_by_group, visits_by_tile

EXACT_DEPTH = 1024
"""Products of two int8 are at most 2**14, and sums below 2**24 are exact in float32."""


def grouped_matmul_mosaic_tpu(
    x: Float[Array, "M D"] | QuantizedRows,
    w: Float[Array, "E D F"] | Quantized,
    group_sizes: Int[Array, " E"],
    tiles: Tiles | None = None,
) -> Float[Array, "M F"]:
    """See `grouped_matmul`. Under vmap, one after the other.

    Args:
        tiles: the rows, and the parts of D and F, of a tile of every pass; None: each pass chooses from its shapes and
            the chip.

    Raises:
        NotImplementedError: this is not traced for a TPU, nor inside `pltpu.force_tpu_interpret_mode()`; or x is of
            float16, or w is packed in groups whose size is no multiple of 8.
    """
    if not interpreted() and not pltpu.is_tpu_device():
        raise NotImplementedError(
            f"mosaic_tpu is for TPU; the platform is {jax.default_backend()}. Allowed besides are a compile for a TPU "
            "that is not present (dynamoe.kernels.aot) and pltpu.force_tpu_interpret_mode()"
        )
    if not isinstance(x, QuantizedRows) and x.dtype == jnp.float16:
        raise NotImplementedError(f"x has dtype {x.dtype}; mosaic_tpu takes float32 and bfloat16, as TPUs do")
    return _grouped_matmul(tiles, x, w, group_sizes)


def interpreted() -> bool:
    """Whether Pallas interprets TPU kernels here; JAX has a public context manager for it and no public question."""
    value = jax_config.pallas_tpu_interpret_mode_context_manager.value
    return value is not None and type(value).__name__ != "InterpretGPUParams"  # one setting serves both interpreters


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(tiles, x, w, group_sizes):
    return _times_matrices(x, w, group_sizes, tiles=tiles, transposed=False)


def _differentiated(tiles, x, w, group_sizes):
    return _grouped_matmul(tiles, x, w, group_sizes), (x, w, group_sizes)


def _gradient(tiles, residuals, dy):
    x, w, group_sizes = residuals
    dx = _times_matrices(dy, w, group_sizes, tiles=tiles, transposed=True)
    dw = None if isinstance(w, Quantized) else _outer_products(x, dy, group_sizes, tiles=tiles)
    return dx, dw, None


_grouped_matmul.defvjp(_differentiated, _gradient)


def _times_matrices(x, w, group_sizes, *, tiles: Tiles | None, transposed: bool):
    """Multiply each group's rows with its matrix, or with its transpose: [M, columns]."""
    codes = x.codes if isinstance(x, QuantizedRows) else x
    dtype = jnp.dtype(jnp.float32) if isinstance(x, QuantizedRows) else x.dtype
    (rows, depth), columns = codes.shape, w.shape[1 if transposed else 2]
    if tiles is None:
        tiles = choose_tiles(_product_pass(codes, w, columns, transposed))
    elif transposed:
        tiles = Tiles(tiles.rows, depth=tiles.columns, columns=tiles.depth)
    tiles = tiles.clipped(rows, depth, columns)
    depth_tiles = pl.cdiv(depth, tiles.depth)

    def depth_tile(visit, step, start, end):
        # A visit without rows stays where the one before it ended: nothing is moved.
        return jnp.where(end[visit] > start[visit], step, depth_tiles - 1)

    def x_tile(column, visit, step, group, source, target, start, end):
        return source[visit], depth_tile(visit, step, start, end)

    def x_scale(column, visit, step, group, source, target, start, end):
        return source[visit], 0

    def w_tile(column, visit, step, group, source, target, start, end):
        deep = depth_tile(visit, step, start, end)
        return (group[visit], column, deep) if transposed else (group[visit], deep, column)

    def y_tile(column, visit, step, group, source, target, start, end):
        return target[visit], column

    x_spec: Any = pl.BlockSpec((tiles.rows, tiles.depth), x_tile)
    if isinstance(x, QuantizedRows):
        x_spec = x._replace(codes=x_spec, scales=pl.BlockSpec((tiles.rows, 1), x_scale))
    w_block = (tiles.columns, tiles.depth) if transposed else (tiles.depth, tiles.columns)
    sums = jnp.int32 if isinstance(x, QuantizedRows) else jnp.float32

    @sequential_vmap
    def call(x, w, group_sizes):
        visits = visits_by_tile(group_sizes, rows, tiles.rows)
        return pl.pallas_call(
            functools.partial(_product_kernel, depth=depth, transposed=transposed),
            out_shape=_shape((rows, columns), dtype, codes),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=5,
                grid=(pl.cdiv(columns, tiles.columns), len(visits.group), depth_tiles),
                in_specs=[x_spec, matrix_spec(w, *w_block, w_tile)],
                out_specs=pl.BlockSpec((tiles.rows, tiles.columns), y_tile),
                scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.columns), sums)],
            ),
            compiler_params=_compiler_params("parallel", "arbitrary", "arbitrary"),
            name="grouped_matmul_dx" if transposed else "grouped_matmul",
        )(*visits[:5], x, w)

    return call(x, w, group_sizes)


def _product_pass(x, w, columns: int, transposed: bool) -> Pass:
    unit = inner_unit(w)
    return Pass(
        rows=x.shape[0],
        depth=x.shape[1],
        columns=columns,
        groups=w.shape[0],
        bits=8 * x.dtype.itemsize,
        matrix_bits=matrix_bits(w),
        depth_unit=1 if transposed else unit,
        column_unit=unit if transposed else 1,
        deepest=None if x.dtype != jnp.int8 or _multiplies_integers() else EXACT_DEPTH,
    )


def _product_kernel(group, source, target, start, end, x, w, y, total, *, depth: int, transposed: bool):
    visit, step = pl.program_id(1), pl.program_id(2)
    first_row = target[visit] * y.shape[0]
    last_step = pl.num_programs(2) - 1

    @pl.when((step == 0) & _opens(target, visit))
    def open_tile():
        y[...] = jnp.zeros_like(y)

    @pl.when(end[visit] > start[visit])
    def multiply():
        of_integers = isinstance(x, QuantizedRows)
        a, b = (x.codes[...], w.codes[...]) if of_integers else (x[...], load_matrix(w))
        if depth % a.shape[1]:
            left = depth - step * a.shape[1]
            a, b = _first(a, left, axis=1), _first(b, left, axis=int(transposed))
        product = _dot(a, b, contract=(1, int(transposed)))

        @pl.when(step == 0)
        def begin():
            total[...] = product

        @pl.when(step > 0)
        def add():
            total[...] += product

        @pl.when(step == last_step)
        def write():
            sums = total[...]
            if of_integers:
                sums = sums.astype(jnp.float32) * x.scales[...] * w.scales[...]
            mine = _own(y.shape, first_row, start[visit], end[visit])
            y[...] = jnp.where(mine, sums, y[...].astype(jnp.float32)).astype(y.dtype)


def _outer_products(x, dy, group_sizes, *, tiles: Tiles | None):
    """Sum, for each group, the products of its rows of x with those of dy: [E, D, F]."""
    (rows, inner), columns, groups = x.shape, dy.shape[1], group_sizes.shape[0]
    if tiles is None:
        bits = 8 * x.dtype.itemsize
        tiles = choose_tiles(
            Pass(rows=rows, depth=inner, columns=columns, groups=groups, bits=bits, matrix_bits=bits, outer=True)
        )
    tiles = tiles.clipped(rows, inner, columns)

    def x_tile(i, j, visit, group, source, target, start, end):
        return source[visit], i

    def dy_tile(i, j, visit, group, source, target, start, end):
        return source[visit], j

    def dw_tile(i, j, visit, group, source, target, start, end):
        return group[visit], i, j

    @sequential_vmap
    def call(x, dy, group_sizes):
        visits = visits_by_group(group_sizes, rows, tiles.rows)
        return pl.pallas_call(
            _outer_kernel,
            out_shape=_shape((groups, inner, columns), x.dtype, x),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=5,
                grid=(pl.cdiv(inner, tiles.depth), pl.cdiv(columns, tiles.columns), len(visits.group)),
                in_specs=[
                    pl.BlockSpec((tiles.rows, tiles.depth), x_tile),
                    pl.BlockSpec((tiles.rows, tiles.columns), dy_tile),
                ],
                out_specs=pl.BlockSpec((None, tiles.depth, tiles.columns), dw_tile),
                scratch_shapes=[pltpu.VMEM((tiles.depth, tiles.columns), jnp.float32)],
            ),
            compiler_params=_compiler_params("parallel", "parallel", "arbitrary"),
            name="grouped_matmul_dw",
        )(*visits[:5], x, dy)

    return call(x, dy, group_sizes)


def _outer_kernel(group, source, target, start, end, x, dy, dw, total):
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    first_row = source[visit] * x.shape[0]

    @pl.when(_opens(group, visit))
    def open_group():
        total[...] = jnp.zeros_like(total)

    @pl.when(end[visit] > start[visit])
    def multiply():
        # Both, for other rows may hold NaN, and 0 * NaN is NaN.
        a, b = (
            jnp.where(_own(v.shape, first_row, start[visit], end[visit]), v[...], jnp.zeros((), v.dtype))
            for v in (x, dy)
        )
        total[...] += _dot(a, b, contract=(0, 0))

    @pl.when((visit == last) | (group[jnp.minimum(visit + 1, last)] != group[visit]))
    def close_group():
        dw[...] = total[...].astype(dw.dtype)


def _opens(ids, visit):
    """Whether the visit is the first of its tile or group."""
    return (visit == 0) | (ids[jnp.maximum(visit - 1, 0)] != ids[visit])


def _own(shape, first_row, start, end):
    """Which elements of a row tile lie in rows from `start` to `end`."""
    row = first_row + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (start <= row) & (row < end)


def _first(tile, count, *, axis: int):
    """Zeros past the first `count` along an axis: what the edge of the array left there may be NaN."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis) < count, tile, jnp.zeros((), tile.dtype))


def _dot(a, b, *, contract: tuple[int, int]):
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    if a.dtype == jnp.int8 and _multiplies_integers():
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.int32)
    if a.dtype == jnp.int8:
        return _dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), contract=contract).astype(jnp.int32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _multiplies_integers() -> bool:
    """Whether the chip's matrix unit takes int8; where not, EXACT_DEPTH of them are exact as floats."""
    return chip().is_matmul_supported(jnp.int8, jnp.int8)


def _shape(shape: tuple[int, ...], dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes that `like` varies over, for shard_map."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def _compiler_params(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem_limit())
