"""Which rows a tile of a product takes: the plan that the kernel for y and dx walks, computed on the device.

A tile starts where its group does, but for at most 7 rows: Mosaic copies rows to swizzled memory in eights. So a group
is visited for each tile of the eights that it has rows in. The last visit of a group that has a tile of them is moved
back to end with the group: it computes some rows again, and writes to them the very numbers that are there. Rows of
nobody are visited last, to become zero.

Letters: M rows, E groups, V visits. At most (row tiles + E - 1) visits multiply.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from ..groups import group_bounds

ALIGNMENT = 8
"""Rows at a multiple of which a tile may start."""


class RowVisits(NamedTuple):
    """The plan. Every visit that counts has at least one row."""

    group: Int[Array, " V"]
    first: Int[Array, " V"]
    """The row where the tile starts, counted over all rows: a multiple of 8."""
    start: Int[Array, " V"]
    """The first row of the tile that is the visit's, counted from the tile's start."""
    end: Int[Array, " V"]
    """The row after the last, likewise."""
    counts: Int[Array, "2"]
    """So many visits multiply; so many there are, with those of rows of nobody after them. The others are left over."""


def visits_from_group_starts(group_sizes: Int[Array, " E"], rows: int, tile: int) -> RowVisits:
    """Visit the rows of each group, in order, then those of nobody.

    Args:
        rows: a multiple of 8.
        tile: likewise.
    """
    start, end = group_bounds(group_sizes, rows)
    # Rows of nobody are one more segment.
    start, end = jnp.append(start, end[-1:]), jnp.append(end, jnp.full((1,), rows, end.dtype))
    first, last = start // ALIGNMENT * ALIGNMENT, -(-end // ALIGNMENT) * ALIGNMENT
    tiles = jnp.where(end > start, -(-(last - first) // tile), 0)
    until = jnp.cumsum(tiles, dtype=jnp.int32)
    length = min(-(-rows // tile) + group_sizes.shape[0], rows)
    visit = jnp.minimum(jnp.arange(length, dtype=jnp.int32), until[-1] - 1)
    segment = jnp.sum(visit[:, None] >= until[None, :], axis=1, dtype=jnp.int32)
    of_visit = first[segment] + (visit - (until - tiles)[segment]) * tile
    of_visit = jnp.maximum(jnp.minimum(of_visit, last[segment] - tile), first[segment])
    return RowVisits(
        group=jnp.minimum(segment, group_sizes.shape[0] - 1),
        first=of_visit,
        start=jnp.maximum(start[segment] - of_visit, 0),
        end=jnp.minimum(end[segment] - of_visit, tile),
        counts=jnp.minimum(until[-2:], length),
    )
