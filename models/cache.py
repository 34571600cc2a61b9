"""The key-value cache of decoding: static shapes, validity per layer and slot.

A token at position p of its row lives in slot p. A layer that did not run for a token leaves its slot invalid there.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LayerCache(NamedTuple):
    """One layer's keys and values. Letters: B rows, G key-value heads, P head width."""

    keys: Float[Array, "B slots G P"]
    values: Float[Array, "B slots G P"]
    valid: Bool[Array, "B slots"]

    def write(
        self,
        keys: Float[Array, "B S G P"],
        values: Float[Array, "B S G P"],
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


class Cache(NamedTuple):
    """All layers' caches, and how many tokens each row holds."""

    layers: tuple[LayerCache, ...]
    length: Int[Array, " B"]

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.layers[0].valid.shape[1]


def empty_cache(*, layers: int, batch: int, slots: int, kv_heads: int, head_width: int, dtype: jnp.dtype) -> Cache:
    """A cache without tokens; each leaf is a buffer of its own, so that all of it can be donated."""

    def layer() -> LayerCache:
        shape = (batch, slots, kv_heads, head_width)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, slots), bool))

    return Cache(tuple(layer() for _ in range(layers)), jnp.zeros(batch, jnp.int32))
