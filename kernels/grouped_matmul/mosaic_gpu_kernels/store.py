"""Write a tile of sums to some rows of an array: all rows of the tile, or some.

A copy by TMA has a size that is known when the kernel is compiled. A whole part of 64 rows is one copy, from shared
memory that is swizzled against bank conflicts. Fewer rows are a ladder of copies of 32, 16, ... rows, one for each bit
of their number; they may start at any row, which a swizzled tile does not allow, so they have their own buffer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .target import put_transposed, swizzled
from .visits import ALIGNMENT

PART = 64
"""Rows and at most so many columns are stored at a time."""


def store_buffers(warpgroups: int, width: int, dtype: Any) -> dict[str, Any]:
    """Shared memory that `store_rows` needs, for warpgroups that store so many columns each."""
    width = min(width, PART)
    return {
        "whole": plgpu.SMEM((warpgroups, PART, width), dtype, transforms=swizzled(width, dtype)),
        "some": plgpu.SMEM((warpgroups, PART, width), dtype),
    }


def store_rows(
    sums: jax.Array,
    y: Any,
    first: jax.Array,
    start: jax.Array,
    end: jax.Array,
    column: Any,
    buffers: Any,
    *,
    transposed: bool = False,
) -> None:
    """Write rows `start` to `end` of the sums to y, where row `first`, a multiple of 8, is the row 0 of the sums.

    Args:
        column: of y, where the column 0 of the sums belongs.
        buffers: this warpgroup's, for whole parts and for some rows of one.
        transposed: the sums are the transpose of what is to be written.
    """
    width = buffers[0].shape[1]
    rows, columns = sums.shape[::-1] if transposed else sums.shape
    for top in range(0, rows, PART):
        own_start, own_end = jnp.clip(start - top, 0, PART), jnp.clip(end - top, 0, PART)
        for left in range(0, columns, width):
            across, down = slice(left, left + width), slice(top, top + PART)
            part = (sums[across, down] if transposed else sums[down, across]).astype(y.dtype)
            put = functools.partial(_put, part, transposed)
            _store_part(put, y, first + top, own_start, own_end, pl.ds(column + left, width), *buffers)


def store_tile(sums: jax.Array, y: Any, row: Any, column: Any, whole: Any) -> None:
    """Write all of the sums to y, from its row `row` and its column `column` on."""
    width = whole.shape[1]
    for top in range(0, sums.shape[0], PART):
        for left in range(0, sums.shape[1], width):
            part = sums[top : top + PART, left : left + width].astype(y.dtype)
            put = functools.partial(_put, part, False)
            _store_whole(put, y.at[pl.ds(row + top, PART), pl.ds(column + left, width)], whole)


def _put(part, transposed, buffer):
    if transposed:
        put_transposed(buffer, part)
    else:
        buffer[...] = part
    plgpu.commit_smem()


def _store_whole(put, target, whole):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the part before
    put(whole)
    plgpu.copy_smem_to_gmem(whole, target)


def _store_part(put, y, first, start, end, columns, whole, some):
    rows = end - start

    @pl.when(rows == PART)
    def store_whole():
        _store_whole(put, y.at[pl.ds(pl.multiple_of(first, ALIGNMENT), PART), columns], whole)

    @pl.when((rows > 0) & (rows < PART))
    def store_some():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        put(whole)
        some[...] = whole[...]
        plgpu.commit_smem()
        for step in (32, 16, 8, 4, 2, 1):
            if step > y.shape[0]:
                continue

            @pl.when((rows & step) != 0)
            def store_step(step=step):
                row = start + (rows & (PART - 2 * step))  # after the larger steps
                plgpu.copy_smem_to_gmem(some.at[pl.ds(row, step)], y.at[pl.ds(first + row, step), columns])
