"""The kernel of y where the matrices are packed integers of 8 or 4 bits: they are unpacked in registers.

`wgmma` takes its first factor from registers, so it multiplies transposed: y^T = w^T x^T. A warpgroup reads its columns
of a tile of codes, scales them and multiplies them with the rows as they lie in shared memory. A byte holds the codes
of neighbouring rows of D: in x, too, the numbers for the first place of a step's bytes come first, then those for the
second, and each part is multiplied with what stands at its place. Nothing has to be put side by side again.

Letters: M rows, D inner width, F output width, E groups.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...quantized import INT4, INT8, Quantized
from .store import store_buffers, store_rows
from .target import Operand, along_rows, as_factor, multiply, stage_for, swizzled
from .visits import RowVisits, visits_from_group_starts
from .walk import Input, Tile, persistent, rows_of_visit, walk_rows, widest, with_stages

FORMATS = (INT8, INT4)
"""Of int2 registers were spilled, and products waited for one another."""
DEPTHS = (64, 32, 16)
"""Bytes along D of a step: a group with one scale has a multiple of them."""


def times_packed(x, w: Quantized, group_sizes, *, tile: Tile | None, multiprocessors: int) -> jax.Array:
    """Multiply each group's rows with its packed matrix: [M, F].

    Args:
        x: rows [M, D]; M is a multiple of 8.

    Raises:
        NotImplementedError: the format is not of integers, or its groups are too small.
    """
    check_format(w)
    rows, columns, per_byte = x.shape[0], w.shape[2], w.format.per_byte
    if tile is None:
        tile = _choose_tile(x, w)
    visits = visits_from_group_starts(group_sizes, rows, tile.rows)
    x = x.reshape(rows, -1, tile.depth, per_byte).swapaxes(2, 3).reshape(x.shape)
    codes, details = stored(w)
    numbers = jax.ShapeDtypeStruct((tile.width, tile.depth), x.dtype)
    transposed = jax.ShapeDtypeStruct((tile.depth, tile.rows), x.dtype)
    kernel = persistent(
        functools.partial(_kernel, tile=tile, bits=w.format.bits, group_bytes=w.group_size // per_byte),
        tile,
        multiprocessors,
        "grouped_matmul_packed",
        out_type=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        scratch_types={
            "drained": plgpu.Barrier(num_arrivals=tile.warpgroups),
            "stages": stage_for(numbers, transposed, warpgroups=tile.warpgroups),
            **store_buffers(tile.warpgroups, tile.width, x.dtype),
        },
    )
    return kernel(*visits, x, codes, details)


def stored(w: Quantized) -> tuple[jax.Array, jax.Array]:
    """The codes as int8; the scales, each with its zero points in the row below where there are any, as float32."""
    codes = w.codes if w.codes.dtype == jnp.int8 else jax.lax.bitcast_convert_type(w.codes, jnp.int8)
    if w.zero_points is None:
        return codes, w.scales
    details = jnp.stack([w.scales, w.zero_points.astype(jnp.float32)], 2)
    return codes, details.reshape(len(w.scales), -1, w.scales.shape[2])


def check_format(w: Quantized) -> None:
    """Refuse what cannot be unpacked in registers.

    Raises:
        NotImplementedError: see `times_packed`.
    """
    least = DEPTHS[-1] * w.format.per_byte
    if w.format not in FORMATS or w.group_size % least:
        raise NotImplementedError(
            f"w is packed as {w.format.name} in groups of {w.group_size} rows; mosaic_gpu takes int8 and int4, in "
            f"groups of a multiple of {least} rows"
        )


def _choose_tile(x, w: Quantized) -> Tile:
    per_byte, bytes_each = w.format.per_byte, x.dtype.itemsize
    depth = next(size for size in DEPTHS if w.group_size % (size * per_byte) == 0)
    large, columns = x.shape[0] > 64 * w.shape[0], widest(w.shape[2])
    # With 64 rows and 256 columns registers were spilled.
    tile = Tile(128, depth, columns, 1) if large else Tile(64, depth, min(columns, 128), 1)
    details = 4 if w.zero_points is None else 8
    return with_stages(tile, depth * (per_byte * tile.rows * bytes_each + tile.columns) + details * tile.columns)


def _kernel(*references, drained, stages, whole, some, tile: Tile, bits: int, group_bytes: int):
    visits, (x, codes, details, y) = RowVisits(*references[:5]), references[5:]
    per_byte = 8 // bits
    # With zero points a group has two rows.
    detail_rows = details.shape[1] * group_bytes // codes.shape[1]
    warpgroup = jax.lax.axis_index("warpgroup")

    def inputs(visit, column_tile):
        group = visits.group[visit]

        def of_depth(step):
            return 0, step

        def of_codes(step):
            return step, column_tile

        def of_scales(step):
            return step * tile.depth // group_bytes, column_tile

        rows = rows_of_visit(x, visits, visit, tile)
        return [
            Input(rows, (tile.rows, per_byte * tile.depth), of_depth, swizzled(tile.depth, x.dtype)),
            Input(codes.at[group], (tile.depth, tile.columns), of_codes, swizzled(tile.width, codes.dtype)),
            Input(details.at[group], (detail_rows, tile.columns), of_scales),
        ]

    def multiply_step(tiles, sums):
        x_tile, code_tile, detail_tile = tiles
        column, shape = warpgroup * tile.width, (tile.width, tile.depth)
        packed = Operand(code_tile, 1, column, tile.width, transposed=True).numbers()
        scale, *zero = (along_rows(detail_tile, row, column, shape) for row in range(detail_rows))
        for slot in range(per_byte):
            numbers = unpack(packed, bits, slot, y.dtype)
            if zero:
                numbers -= zero[0].astype(y.dtype)
            numbers = (numbers.astype(jnp.float32) * scale).astype(y.dtype)
            part = Operand(x_tile, 1, slot * tile.depth, tile.depth, transposed=True)
            multiply(sums[0], numbers, part, stages, warpgroup)
        # They read registers that the next step writes.
        plgpu.wgmma_wait(0)

    def store(totals: list[Any], visit, column_tile):
        column = column_tile * tile.columns + warpgroup * tile.width
        buffers = whole.at[warpgroup], some.at[warpgroup]
        rows = visits.first[visit], visits.start[visit], visits.end[visit]
        store_rows(totals[0], y, *rows, column, buffers, transposed=True)

    walk_rows(
        visits,
        tile,
        codes.shape[1] // tile.depth,
        y.shape[1] // tile.columns,
        drained,
        sums=((tile.width, tile.rows),),
        inputs=inputs,
        multiply_step=multiply_step,
        store=store,
        running=0,
    )


def unpack(packed: jax.Array, bits: int, slot: int, dtype: Any) -> jax.Array:
    """The codes at one place of each byte, as floats, which hold them exactly, laid out for a product.

    Mosaic has no shifts of bytes, so the bits stay where they are: there they are the code times a power of two, in the
    byte's highest bits with its sign, and below, with the sign's bit flipped, too large by half of the codes' range.
    """
    if bits == 8:
        return as_factor(packed.astype(dtype))
    low = bits * slot
    mask = (2**bits - 1) << low
    if low + bits == 8:
        return as_factor((packed & jnp.int8(mask - 256)).astype(dtype)) * jnp.asarray(2.0**-low, dtype)
    half = 2 ** (bits - 1)
    flipped = (packed & jnp.int8(mask)) ^ jnp.int8(half << low)
    return as_factor(flipped.astype(dtype)) * jnp.asarray(2.0**-low, dtype) - jnp.asarray(half, dtype)
