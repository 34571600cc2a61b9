"""The key-value cache of decoding: static shapes, validity per layer and slot.

A token at position p of its row lives in slot p. A layer that did not run for a token leaves its slot invalid there.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LayerCache(NamedTuple):
    """One layer's keys and values. Letters: B rows, G key-value heads, P head width, W value width."""

    keys: Float[Array, "B slots G P"]
    values: Float[Array, "B slots G W"]
    valid: Bool[Array, "B slots"]

    def write(
        self,
        keys: Float[Array, "B S G P"],
        values: Float[Array, "B S G W"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
    ) -> "LayerCache":
        """Write tokens at their positions, as invalid where `mask` is False. Positions past the end are dropped."""
        row = jnp.arange(keys.shape[0])[:, None]
        return LayerCache(
            self.keys.at[row, positions].set(keys.astype(self.keys.dtype), mode="drop"),
            self.values.at[row, positions].set(values.astype(self.values.dtype), mode="drop"),
            self.valid.at[row, positions].set(mask, mode="drop"),
        )

    def visible(self, positions: Int[Array, "B S"]) -> Bool[Array, "B S slots"]:
        """The valid slots up to each position."""
        slot = jnp.arange(self.valid.shape[1])
        return self.valid[:, None, :] & (slot[None, None, :] <= positions[:, :, None])


class Cache(NamedTuple):
    """All layers' caches, and how many tokens each row holds."""

    layers: tuple[LayerCache, ...]
    length: Int[Array, " B"]

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.layers[0].valid.shape[1]


def empty_cache(*, layers: int, batch: int, slots: int, kv_heads: int, head_width: int, dtype: jnp.dtype) -> Cache:
    """A cache without tokens, the same for every layer; each leaf is a buffer of its own, so that all of it can be
    donated."""
    layer = functools.partial(empty_layer, batch=batch, slots=slots, dtype=dtype)
    return Cache(tuple(layer(kv_heads, head_width, head_width) for _ in range(layers)), jnp.zeros(batch, jnp.int32))


def empty_layer(
    heads: int, key_width: int, value_width: int, *, batch: int, slots: int, dtype: jnp.dtype
) -> LayerCache:
    """One layer's cache without tokens."""
    keys, values = (jnp.zeros((batch, slots, heads, width), dtype) for width in (key_width, value_width))
    return LayerCache(keys, values, jnp.zeros((batch, slots), bool))
