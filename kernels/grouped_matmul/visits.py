"""Which row tile meets which group: the plan that a tiled grouped matmul walks, computed on the device.

Rows are cut into tiles of one size. A visit is one tile with one group that owns rows in it, so a tile that several
groups share is visited once by each, one after the other. For any group sizes there are at most
(row tiles + E - 1) visits, which is the static length of the plan; visits that are left over repeat the last one and
own no rows, so that a grid step for one of them moves nothing and multiplies nothing.

Letters: M rows, E groups, V visits. The idea of one plan in scalar memory is megablox' (Gale et al. 2022,
https://arxiv.org/abs/2211.15841, and `jax.experimental.pallas.ops.tpu.megablox`).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from .groups import group_bounds


class Visits(NamedTuple):
    """The plan. A visit without own rows (`start == end`) still opens its tile or group, which is to be zero."""

    group: Int[Array, " V"]
    source: Int[Array, " V"]
    """The row tile to read; that of the visit before, where the visit owns no rows."""
    target: Int[Array, " V"]
    """The row tile to write."""
    start: Int[Array, " V"]
    """The first row of the group, counted over all rows; 0 where the visit owns no rows."""
    end: Int[Array, " V"]
    """The row after the group's last."""
    count: Int[Array, ""]
    """So many visits are not left over."""


def visits_by_tile(group_sizes: Int[Array, " E"], rows: int, tile: int) -> Visits:
    """Visit every row tile, in order: those of rows of nobody once, so that they become zero."""
    start, end = group_bounds(group_sizes, rows)
    total, row_tiles = end[-1:], -(-rows // tile)
    first = _floor(start, tile)
    tiles = jnp.where(end > start, _ceil(end, tile) - first, 0)
    first_empty = _ceil(total, tile)
    visits = _visits(
        jnp.concatenate([first, first_empty]),
        jnp.concatenate([tiles, row_tiles - first_empty]),
        jnp.concatenate([start, total]),
        jnp.concatenate([end, total]),
        min(row_tiles + group_sizes.shape[0] - 1, rows),
    )
    # Tiles of nobody repeat the matrix and the rows of the visit before them: nothing is read for them.
    last_group = jnp.max(jnp.where(end > start, jnp.arange(len(start), dtype=jnp.int32), 0))
    return visits._replace(
        group=jnp.minimum(visits.group, last_group), source=jnp.minimum(visits.source, jnp.maximum(first_empty - 1, 0))
    )


def visits_by_group(group_sizes: Int[Array, " E"], rows: int, tile: int) -> Visits:
    """Visit every group, in order: an empty one once, so that it becomes zero."""
    start, end = group_bounds(group_sizes, rows)
    owns = end > start
    first = jnp.where(owns, _floor(start, tile), jnp.maximum(_ceil(start, tile) - 1, 0))
    tiles = jnp.where(owns, _ceil(end, tile) - first, 1)
    return _visits(first, tiles, start, end, -(-rows // tile) + group_sizes.shape[0] - 1)


def _visits(first, tiles, start, end, length: int) -> Visits:
    """Lay out `tiles[s]` visits of the tiles from `first[s]` for each segment s of rows `start[s]` to `end[s]`."""
    until = jnp.cumsum(tiles, dtype=jnp.int32)
    count = until[-1]
    step = jnp.arange(length, dtype=jnp.int32)
    visit = jnp.minimum(step, count - 1)
    segment = jnp.sum(visit[:, None] >= until[None, :], axis=1, dtype=jnp.int32)
    tile = first[segment] + visit - (until - tiles)[segment]
    owns = (step < count) & (end > start)[segment]
    return Visits(
        group=segment,
        source=tile,
        target=tile,
        start=jnp.where(owns, start[segment], 0),
        end=jnp.where(owns, end[segment], 0),
        count=count,
    )


def _floor(row, tile: int):
    return row // jnp.full((), tile, row.dtype)


def _ceil(row, tile: int):
    return -(-row // jnp.full((), tile, row.dtype))
