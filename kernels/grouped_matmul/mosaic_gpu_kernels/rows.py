"""The kernel of y and of dx: each group's rows times its matrix, or times its transpose.

Letters: M rows, D inner width, F output width, E groups. The depth is D forward, F for dx.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .store import store_buffers, store_rows
from .target import Operand, multiply, repeated, stage_for, swizzled
from .visits import ALIGNMENT, RowVisits, visits_from_group_starts
from .walk import Input, Tile, persistent, rows_of_visit, walk_rows


def times_matrices(
    x, w, group_sizes, *, tile: Tile, transposed: bool, multiprocessors: int, scales: tuple[Any, Any] | None = None
) -> jax.Array:
    """Multiply each group's rows with its matrix, or with its transpose: [M, columns].

    Args:
        x: rows [M, depth]; M is a multiple of 8.
        w: [E, depth, columns], or transposed [E, columns, depth].
        scales: of the rows [M] and of the columns [E, columns], float32, which the sums are multiplied with.

    Returns:
        In the dtype of x; with scales in bfloat16.
    """
    rows, columns = x.shape[0], w.shape[1 if transposed else 2]
    visits = visits_from_group_starts(group_sizes, rows, tile.rows)
    dtype = x.dtype if scales is None else jnp.bfloat16
    staged = jax.ShapeDtypeStruct((tile.depth, tile.width), w.dtype) if transposed else None
    scratch = {
        "drained": plgpu.Barrier(num_arrivals=tile.warpgroups),
        "stages": stage_for(staged, warpgroups=tile.warpgroups),
        **store_buffers(tile.warpgroups, tile.width, dtype),
    }
    if scales is not None:
        scratch["lines"] = (
            plgpu.SMEM((tile.warpgroups, tile.rows), jnp.float32),
            plgpu.SMEM((tile.warpgroups, tile.width), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=tile.warpgroups),
        )
    kernel = persistent(
        functools.partial(_kernel, tile=tile, transposed=transposed),
        tile,
        multiprocessors,
        "grouped_matmul" if scales is not None or not transposed else "grouped_matmul_dx",
        out_type=jax.ShapeDtypeStruct((rows, columns), dtype),
        scratch_types=scratch,
    )
    return kernel(*visits, x, w, *(scales or ()))


def _kernel(*references, drained, stages, whole, some, lines=None, tile: Tile, transposed: bool):
    visits, (x, w, *scales, y) = RowVisits(*references[:5]), references[5:]
    warpgroup = jax.lax.axis_index("warpgroup")

    def inputs(visit, column_tile):
        block = (tile.columns, tile.depth) if transposed else (tile.depth, tile.columns)

        def index(step):
            return (column_tile, step) if transposed else (step, column_tile)

        rows = rows_of_visit(x, visits, visit, tile)
        return [
            Input(rows, (tile.rows, tile.depth), lambda step: (0, step), swizzled(tile.depth, x.dtype)),
            Input(w.at[visits.group[visit]], block, index, swizzled(block[1], w.dtype)),
        ]

    def multiply_step(tiles, sums):
        mine = Operand(tiles[1], 0 if transposed else 1, warpgroup * tile.width, tile.width, transposed)
        multiply(sums[0], Operand(tiles[0]), mine, stages, warpgroup)
        plgpu.wgmma_wait(1)

    def column_of(column_tile):
        return column_tile * tile.columns + warpgroup * tile.width

    def scaled(totals: list[Any], visit, column_tile):
        if lines is None:
            return totals
        of_rows, of_columns, arrived = lines[0].at[warpgroup], lines[1].at[warpgroup], lines[2].at[warpgroup]
        first = pl.multiple_of(visits.first[visit], ALIGNMENT)
        plgpu.copy_gmem_to_smem(scales[0].at[pl.ds(first, tile.rows)], of_rows, arrived)
        column = pl.ds(column_of(column_tile), tile.width)
        plgpu.copy_gmem_to_smem(scales[1].at[visits.group[visit], column], of_columns, arrived)
        plgpu.barrier_wait(arrived)
        shape = totals[0].shape
        return [totals[0] * repeated(of_rows, 0, shape) * repeated(of_columns, 1, shape)]

    def store(totals: list[Any], visit, column_tile):
        buffers = whole.at[warpgroup], some.at[warpgroup]
        rows = visits.first[visit], visits.start[visit], visits.end[visit]
        store_rows(totals[0], y, *rows, column_of(column_tile), buffers)

    walk_rows(
        visits,
        tile,
        x.shape[1] // tile.depth,
        y.shape[1] // tile.columns,
        drained,
        sums=((tile.rows, tile.width),),
        inputs=inputs,
        multiply_step=multiply_step,
        finish=scaled,
        store=store,
    )
