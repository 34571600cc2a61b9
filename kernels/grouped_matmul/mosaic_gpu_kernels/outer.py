"""The kernel of dw: for each group, the sum of the products of its rows of x with those of dy.

Persistent like `rows.py`, over groups times tiles of [D, F]; a group takes as many steps as it has rows for,
none if it is empty, and is then written as zero. A group's first and last rows share a tile with rows of others, which
may hold NaN: those are replaced by zeros in shared memory, in x and in dy, before the tile is multiplied.

Letters: M rows, D inner width, F output width, E groups.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..groups import group_bounds
from .store import store_buffers, store_tile
from .target import Operand, multiply, stage_for, swizzled
from .visits import ALIGNMENT
from .walk import STRIP, Input, Tile, persistent, pipeline


def outer_products(x, dy, group_sizes, *, tile: Tile, multiprocessors: int) -> jax.Array:
    """Sum, for each group, the products of its rows of x with those of dy: [E, D, F].

    Args:
        tile: `rows` and `columns` of dw, `depth` rows of x and dy.
    """
    (rows, inner), columns, groups = x.shape, dy.shape[1], group_sizes.shape[0]
    kernel = persistent(
        functools.partial(_kernel, tile=tile),
        tile,
        multiprocessors,
        "grouped_matmul_dw",
        out_type=jax.ShapeDtypeStruct((groups, inner, columns), x.dtype),
        scratch_types={
            "drained": plgpu.Barrier(num_arrivals=tile.warpgroups),
            "selected": plgpu.Barrier(num_arrivals=tile.warpgroups),
            "stages": stage_for(jax.ShapeDtypeStruct((tile.rows, tile.depth), x.dtype), warpgroups=tile.warpgroups),
            "whole": store_buffers(tile.warpgroups, tile.width, x.dtype)["whole"],
        },
    )
    return kernel(*group_bounds(group_sizes, rows), x, dy)


def _kernel(starts, ends, x, dy, dw, *, drained, selected, stages, whole, tile: Tile):
    groups, inner, columns = dw.shape
    tiles = inner // tile.rows, columns // tile.columns
    warpgroup = jax.lax.axis_index("warpgroup")

    def inputs(rows, i, j):
        return [
            Input(
                array.at[rows, :],
                (tile.depth, width),
                lambda step, index=index: (step, index),
                swizzled(width, x.dtype),
            )
            for array, width, index in ((x, tile.rows, i), (dy, tile.columns, j))
        ]

    example = inputs(slice(None), 0, 0)

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(tile, tile.stages, example).get_allocations(*(one.array for one in example)),
        collective_axes="warpgroup",
    )
    def walk(allocations):
        @plgpu.nd_loop((groups, tiles[0] * tiles[1]), collective_axes="multiprocessor")
        def product(loop):
            group = loop.index[0]
            i, j = plgpu.planar_snake(loop.index[1], tiles, 1, STRIP)
            start, end = starts[group], ends[group]
            first = start // ALIGNMENT * ALIGNMENT
            steps = jnp.where(end > start, (end - first + tile.depth - 1) // tile.depth, 0)
            steps = steps.astype(int)  # with 64-bit integers on, the pipeline counts in those

            def around(run):
                @functools.partial(pl.run_scoped, sums=plgpu.WGMMAAccumulatorRef((tile.rows, tile.width)))
                def with_sums(sums):
                    run(sums)
                    totals = sums[...]

                    @pl.when(steps > 0)
                    def say_that_products_are_done():
                        # Only where the warpgroup that copies waits before its next step: two arrivals are not one.
                        plgpu.barrier_arrive(drained)

                    column = j * tile.columns + warpgroup * tile.width
                    store_tile(totals, dw.at[group], i * tile.rows, column, whole.at[warpgroup])

            def multiply_step(indices, x_tile, dy_tile, sums):
                top = first + indices[0] * tile.depth

                @pl.when((top < start) | (top + tile.depth > end))
                def select():
                    _select_rows(x_tile, start - top, end - top, tile.warpgroups, warpgroup)
                    _select_rows(dy_tile, start - top, end - top, tile.warpgroups, warpgroup)
                    plgpu.commit_smem()
                    # A warpgroup multiplies what the other has selected, too.
                    plgpu.barrier_arrive(selected)
                    plgpu.barrier_wait(selected)

                mine = Operand(dy_tile, 1, warpgroup * tile.width, tile.width)
                multiply(sums, Operand(x_tile, transposed=True), mine, stages, warpgroup)
                plgpu.wgmma_wait(1)
                return sums

            # The end may lie past that of the array: no step goes there.
            of_group = inputs(pl.ds(pl.multiple_of(first, ALIGNMENT), x.shape[0]), i, j)
            pipeline(tile, steps, of_group, multiply_step, around)(
                *(one.array for one in of_group), allocations=allocations
            )

            @pl.when((warpgroup == tile.warpgroups) & (steps > 0))
            def wait_for_the_last_product():
                # The pipeline does not: it never says when the tiles of its last step may be overwritten.
                plgpu.barrier_wait(drained)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _select_rows(tile, start, end, warpgroups: int, warpgroup):
    """Put zeros into the rows before `start` and from `end` on: each warpgroup into its share of the columns.

    What is swizzled together cannot be shared: of a tile of so few columns the first warpgroup does all.
    """
    shares = min(warpgroups, tile.shape[1] // swizzled(tile.shape[1], tile.dtype)[0].tiling[1])
    width = tile.shape[1] // shares
    for index in range(shares):

        @pl.when(warpgroup == index)
        def select(index=index):
            part = tile.at[:, index * width : (index + 1) * width]
            row = jax.lax.broadcasted_iota(jnp.int32, part.shape, 0)
            part[...] = jnp.where((row >= start) & (row < end), part[...], jnp.zeros((), part.dtype))
