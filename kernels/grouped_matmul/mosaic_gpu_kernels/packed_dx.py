"""The kernel of dx where the matrices are packed integers: dx^T = w dy^T, unpacked in registers.

Here a tile of codes is a first factor as it lies: a byte holds codes of neighbouring rows of w, which are neighbouring
columns of dx. A warpgroup sums each place of the bytes by itself, and what belongs to one place is stored together:
XLA puts the columns in their order afterwards.

Letters: M rows, D inner width, F output width, E groups.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...quantized import Quantized
from .packed import check_format, stored, unpack
from .store import store_buffers, store_rows
from .target import Operand, multiply, repeated, stage_for, swizzled
from .visits import RowVisits, visits_from_group_starts
from .walk import Input, Tile, persistent, rows_of_visit, walk_rows, with_stages

DEPTH = 64
"""Of F, in a step."""


def times_packed_transposed(dy, w: Quantized, group_sizes, *, tile: Tile | None, multiprocessors: int) -> jax.Array:
    """Multiply each group's rows with the transpose of its packed matrix: [M, D].

    Args:
        dy: rows [M, F]; M is a multiple of 8.
        tile: its columns are bytes along D.

    Raises:
        NotImplementedError: the format is not of integers, or its groups are smaller than a tile.
    """
    check_format(w)
    (rows, _), (inner_bytes, per_byte) = dy.shape, (w.codes.shape[1], w.format.per_byte)
    group_bytes = w.group_size // per_byte
    if tile is None:
        tile = _choose_tile(dy, group_bytes, w.zero_points is not None)
    if inner_bytes % tile.columns or group_bytes % tile.columns:
        raise NotImplementedError(
            f"w is packed as {w.format.name} with D = {w.shape[1]} in groups of {w.group_size} rows; the gradient of x "
            f"takes multiples of {per_byte * tile.columns} for both"
        )
    visits = visits_from_group_starts(group_sizes, rows, tile.rows)
    numbers = jax.ShapeDtypeStruct((tile.width, tile.depth), dy.dtype)
    transposed = jax.ShapeDtypeStruct((tile.depth, tile.rows), dy.dtype)
    kernel = persistent(
        functools.partial(_kernel, tile=tile, bits=w.format.bits, group_bytes=group_bytes),
        tile,
        multiprocessors,
        "grouped_matmul_packed_dx",
        out_type=jax.ShapeDtypeStruct((rows, w.shape[1]), dy.dtype),
        scratch_types={
            "drained": plgpu.Barrier(num_arrivals=tile.warpgroups),
            "stages": stage_for(numbers, transposed, warpgroups=tile.warpgroups),
            **store_buffers(tile.warpgroups, tile.width, dy.dtype),
        },
    )
    by_place = kernel(*visits, dy, *stored(w))
    return by_place.reshape(rows, per_byte, inner_bytes).swapaxes(1, 2).reshape(rows, -1)


def _choose_tile(dy, group_bytes: int, zero_points: bool) -> Tile:
    # With 128 rows registers were spilled: the sums of all places of a byte are in them. With zero points also by two
    # warpgroups, which have fewer than one.
    tile = Tile(64, DEPTH, 128 if group_bytes % 128 == 0 and not zero_points else 64, 1)
    return with_stages(tile, DEPTH * (tile.rows * dy.dtype.itemsize + tile.columns + 8))


def _kernel(*references, drained, stages, whole, some, tile: Tile, bits: int, group_bytes: int):
    visits, (dy, codes, details, y) = RowVisits(*references[:5]), references[5:]
    inner_bytes, per_byte = codes.shape[1], 8 // bits
    detail_rows = details.shape[1] * group_bytes // inner_bytes
    warpgroup = jax.lax.axis_index("warpgroup")

    def inputs(visit, column_tile):
        group = visits.group[visit]

        def of_depth(step):
            return 0, step

        def of_codes(step):
            return column_tile, step

        def of_scales(step):
            return column_tile * tile.columns // group_bytes, step

        rows = rows_of_visit(dy, visits, visit, tile)
        return [
            Input(rows, (tile.rows, tile.depth), of_depth, swizzled(tile.depth, dy.dtype)),
            Input(codes.at[group], (tile.columns, tile.depth), of_codes, swizzled(tile.depth, codes.dtype)),
            Input(details.at[group], (detail_rows, tile.depth), of_scales),
        ]

    def multiply_step(tiles, sums):
        dy_tile, code_tile, detail_tile = tiles
        packed = Operand(code_tile, 0, warpgroup * tile.width, tile.width).numbers()
        scale, *zero = (repeated(detail_tile.at[row], 1, (tile.width, tile.depth)) for row in range(detail_rows))
        for slot in range(per_byte):
            numbers = unpack(packed, bits, slot, y.dtype)
            if zero:
                numbers -= zero[0].astype(y.dtype)
            numbers = (numbers.astype(jnp.float32) * scale).astype(y.dtype)
            multiply(sums[slot], numbers, Operand(dy_tile, transposed=True), stages, warpgroup)
        # They read registers that the next step writes.
        plgpu.wgmma_wait(0)

    def store(totals: list[Any], visit, column_tile):
        column = column_tile * tile.columns + warpgroup * tile.width
        buffers = whole.at[warpgroup], some.at[warpgroup]
        rows = visits.first[visit], visits.start[visit], visits.end[visit]
        for slot in range(per_byte):
            store_rows(totals[slot], y, *rows, column + slot * inner_bytes, buffers, transposed=True)

    walk_rows(
        visits,
        tile,
        dy.shape[1] // tile.depth,
        inner_bytes // tile.columns,
        drained,
        sums=((tile.width, tile.rows),) * per_byte,
        inputs=inputs,
        multiply_step=multiply_step,
        store=store,
        running=0,
    )
