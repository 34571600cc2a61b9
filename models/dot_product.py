"""Softmax attention over keys and values, with what published models vary in it.

Letters: B batch, S queries, N keys, H query heads, G key-value heads, P head width, W value width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .precision import wide


def dot_product_attention(
    query: Float[Array, "B S H P"],
    keys: Float[Array, "B N G P"],
    values: Float[Array, "B N G W"],
    mask: Bool[Array, "B S N"],
    *,
    scale: float | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H W"]:
    """Let each query see the keys where `mask` is True: scores and softmax in float32, the result in query's dtype.

    `jax.nn.dot_product_attention` mixes dtypes in bfloat16, which strict promotion refuses, and knows no sinks.

    Args:
        query: H is a multiple of G; neighbouring query heads share a key-value head.
        scale: factor on the scores; None: 1 / sqrt(P).
        sinks: a score for each head that takes its share of the softmax and adds no value: attention to nothing.
            Xiao et al. 2023, https://arxiv.org/abs/2309.17453; learned as in gpt-oss, https://arxiv.org/abs/2508.10925.

    Returns:
        A query that sees nothing gets the mean of all values: it belongs to padding, and stays finite.
    """
    batch, length, heads, width = query.shape
    groups = keys.shape[2]
    grouped = query.reshape(batch, length, groups, heads // groups, width)
    factor = width**-0.5 if scale is None else scale
    scores = factor * jnp.einsum("bsgrp,bngp->bgrsn", grouped, keys, preferred_element_type=wide(query))
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        column = sinks.astype(scores.dtype).reshape(1, groups, heads // groups, 1, 1)
        column = jnp.broadcast_to(column, (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    mixed = jnp.einsum("bgrsn,bngw->bsgrw", weights.astype(values.dtype), values, preferred_element_type=wide(query))
    return mixed.astype(query.dtype).reshape(batch, length, heads, values.shape[-1])
