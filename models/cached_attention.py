"""Attention of new tokens to a cache, block by block of slots: it costs what the longest row holds, whatever the cache
could hold.

A softmax over blocks, with a running maximum and sum: Milakov and Gimelshein 2018, "Online normalizer calculation for
softmax", https://arxiv.org/abs/1805.02867, as in FlashAttention, Dao et al. 2022, https://arxiv.org/abs/2205.14135.
A block that a row does not see changes nothing in it, to the bit: so a row does not depend on how long others are.

Letters: B rows, S new tokens, H query heads, G key-value heads, Q = H / G * S, P head width, W value width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from .cache import LayerCache
from .precision import wide

BLOCK = 128
"""Slots that are read at a time."""
TILE = 128
"""Queries that visit the same blocks."""


class _Running(NamedTuple):
    """Over the blocks so far, in float32 or wider."""

    sums: Float[Array, "B G Q W"]
    maximum: Float[Array, "B G Q"]
    total: Float[Array, "B G Q"]


def cached_attention(
    query: Float[Array, "B S H P"],
    cache: LayerCache,
    positions: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H W"]:
    """Let each query see the valid slots up to its position, which holds its own token already.

    Args:
        query: rotated.
        cache: of the B rows.
        positions: of the queries, not past the last slot where `mask` is True.
        mask: False at padding, which sees nothing and gives zeros.
        scale: of the scores; None: 1 / sqrt(P).
        window: how many slots a token sees, its own among them; None: all.
        sinks: a score of each head that takes part in the softmax and brings nothing; None: none.

    Returns:
        In the dtype of the query; scores, softmax and sums are float32.
    """
    slots, length = cache.valid.shape[1], query.shape[1]
    last = jnp.where(mask, jnp.minimum(positions, slots - 1), -1)  # padding sees no slot
    factor = query.shape[3] ** -0.5 if scale is None else scale
    attend = functools.partial(_attend, cache=cache, scale=factor, window=window, sinks=sinks)
    if length <= TILE or length % TILE:
        return attend(query, last)
    # Early queries of a long chunk need not visit the blocks of late ones.
    tiles = (array.reshape(array.shape[0], -1, TILE, *array.shape[2:]).swapaxes(0, 1) for array in (query, last))
    mixed = jax.lax.map(lambda tile: attend(*tile), tuple(tiles))
    return mixed.swapaxes(0, 1).reshape(*query.shape[:3], -1)


def _attend(
    query: Float[Array, "B S H P"],
    last: Int[Array, "B S"],
    *,
    cache: LayerCache,
    scale: float,
    window: int | None,
    sinks: Float[Array, " H"] | None,
) -> Float[Array, "B S H W"]:
    """`cached_attention` of queries that see slots up to `last`."""
    (rows, length, heads, width), groups = query.shape, cache.keys.shape[1]
    slots, per_group = cache.valid.shape[1], heads // groups
    size = min(BLOCK, slots)
    queries = query.reshape(rows, length, groups, per_group, width).transpose(0, 2, 3, 1, 4)
    queries = queries.reshape(rows, groups, per_group * length, width)

    def visit(number: Int[Array, ""] | int, running: _Running) -> _Running:
        first = jnp.minimum(number * size, slots - size)
        block = cache.block(first, size)
        slot = first + jnp.arange(size)
        # The last block may begin before the one before it ends: a slot is seen once.
        seen = (block.valid & (slot >= number * size)[None])[:, None] & (slot[None, None] <= last[:, :, None])
        if window is not None:
            seen = seen & (slot[None, None] > last[:, :, None] - window)
        return _with_block(running, queries, block, seen, scale)

    running = _nothing_seen((rows, groups, per_group * length, cache.values.shape[3]), sinks, wide(query))
    if slots == size:
        running = visit(0, running)
    else:
        begin = 0 if window is None else jnp.maximum(jnp.where(last < 0, slots, last).min() - window + 1, 0) // size
        running = jax.lax.fori_loop(begin, last.max() // size + 1, visit, running)
    mixed = running.sums / jnp.where(running.total > 0, running.total, 1.0)[..., None]
    mixed = mixed.reshape(rows, groups, per_group, length, -1).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(rows, length, heads, -1).astype(query.dtype)


_LOWEST = -1e30
"""Below every score; finite, so that a difference of two is none of two infinities."""


def _nothing_seen(shape: tuple[int, int, int, int], sinks: Float[Array, " H"] | None, dtype: DTypeLike) -> _Running:
    """Before the first block: a sink alone takes part, with weight 1 of its own score."""
    sums = jnp.zeros(shape, dtype)
    if sinks is None:
        return _Running(sums, jnp.full(shape[:3], _LOWEST, dtype), jnp.zeros(shape[:3], dtype))
    length = shape[2] * shape[1] // sinks.shape[0]
    scores = jnp.repeat(sinks.astype(dtype).reshape(shape[1], -1), length, axis=1)
    return _Running(sums, jnp.broadcast_to(scores[None], shape[:3]), jnp.ones(shape[:3], dtype))


def _with_block(
    running: _Running, queries: Float[Array, "B G Q P"], block: LayerCache, seen: Bool[Array, "B S N"], scale: float
) -> _Running:
    keys, values = block.keys.astype(queries.dtype), block.values.astype(queries.dtype)
    rows, groups, count, _ = queries.shape
    scores = scale * jnp.einsum("bgqp,bgnp->bgqn", queries, keys, preferred_element_type=wide(queries))
    seen = jnp.broadcast_to(seen[:, None, None], (rows, groups, count // seen.shape[1], *seen.shape[1:]))
    seen = seen.reshape(scores.shape)
    scores = jnp.where(seen, scores, _LOWEST)
    maximum = jnp.maximum(running.maximum, scores.max(axis=-1))
    # Masked again: where a query has seen nothing yet, the maximum is the lowest too and their difference 0.
    weights = jnp.where(seen, jnp.exp(scores - maximum[..., None]), 0.0)
    kept = jnp.exp(running.maximum - maximum)
    new = jnp.einsum("bgqn,bgnw->bgqw", weights.astype(values.dtype), values, preferred_element_type=wide(queries))
    return _Running(running.sums * kept[..., None] + new, maximum, running.total * kept + weights.sum(axis=-1))
