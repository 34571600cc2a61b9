"""The key-value cache of decoding: static shapes, validity per layer and slot.

A token at position p of its row lives in slot p. A layer that did not run for a token leaves its slot invalid there.
Whoever carries a cache from call to call donates it: it is then written in place and never copied.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_ROWS_ONE_BY_ONE = 32
"""Up to so many rows are written one by one on CPU, where XLA's scatter is a slow loop; each is compiled by itself."""


class LayerCache(NamedTuple):
    """One layer's keys and values. Letters: B rows, G key-value heads, P head width, W value width.

    Slots stand next to the width: a head's keys are then one matrix, which its products read as it lies.
    """

    keys: Float[Array, "rows G slots P"]
    values: Float[Array, "rows G slots W"]
    valid: Bool[Array, "rows slots"]
    row: Int[Array, ""] | Int[Array, " B"] | None = None
    """Stand for this row alone, B = 1, or for these B rows: their tokens are read and written where they lie. None: for
    all rows."""

    def write(
        self,
        keys: Float[Array, "B S G P"],
        values: Float[Array, "B S G W"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
    ) -> "LayerCache":
        """Write tokens at their positions, one after the other in each row, as invalid where `mask` is False. Positions
        past the end are dropped."""
        start, slots = positions[:, 0], self.valid.shape[1]
        keys, values, mask = (array[:, :slots] for array in (keys, values, mask))
        keys, values = (array.swapaxes(1, 2) for array in (keys, values))
        return self._replace(
            keys=self._written(self.keys, keys.astype(self.keys.dtype), start),
            values=self._written(self.values, values.astype(self.values.dtype), start),
            valid=self._written(self.valid[:, None, :, None], mask[:, None, :, None], start)[:, 0, :, 0],
        )

    def block(self, start: Int[Array, ""] | int, size: int) -> "LayerCache":
        """The `size` slots from `start` on, as a cache of B rows."""

        def cut(array: jax.Array) -> jax.Array:
            if self.row is None:
                return jax.lax.dynamic_slice_in_dim(array, start, size, axis=2)
            shape = (1, array.shape[1], size, array.shape[3])
            if self.row.size == 1:
                return jax.lax.dynamic_slice(array, _indices(self.row.reshape(()), 0, start, 0), shape)
            return jax.vmap(lambda row: jax.lax.dynamic_slice(array, _indices(row, 0, start, 0), shape)[0])(self.row)

        return LayerCache(cut(self.keys), cut(self.values), cut(self.valid[:, None, :, None])[:, 0, :, 0])

    def visible(self, positions: Int[Array, "B S"]) -> Bool[Array, "B S slots"]:
        """The valid slots up to each position."""
        slot = jnp.arange(self.valid.shape[1])
        return self.valid[:, None, :] & (slot[None, None, :] <= positions[:, :, None])

    def forget(self, rows: Bool[Array, " B"]) -> "LayerCache":
        """Make all slots of these rows invalid."""
        kept = self.block(0, self.valid.shape[1]).valid & ~rows[:, None]
        return self._replace(valid=kept if self.row is None else self.valid.at[self.row.reshape(-1)].set(kept))

    def _written(self, array: jax.Array, new: jax.Array, start: Int[Array, " B"]) -> jax.Array:
        if self.row is not None:
            for number, row in enumerate(self.row.reshape(-1)):
                array = _put_within(array, new[number : number + 1], row, start[number])
            return array

        def one_by_one(array: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            for row in range(array.shape[0]):
                array = _put_within(array, new[row : row + 1], row, start[row])
            return array

        def at_once(array: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            slots = start[:, None] + jnp.arange(new.shape[2])[None]
            row = jnp.arange(array.shape[0])[:, None]
            return array.at[row, :, slots].set(new.swapaxes(1, 2), mode="drop")

        if array.shape[0] > _ROWS_ONE_BY_ONE:
            return at_once(array, new, start)
        return jax.lax.platform_dependent(array, new, start, cpu=one_by_one, default=at_once)


class Cache(NamedTuple):
    """All layers' caches, and how many tokens each row holds."""

    layers: tuple[LayerCache, ...]
    length: Int[Array, " B"]

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.layers[0].valid.shape[1]

    def of_row(self, row: Int[Array, ""] | None, length: Int[Array, " B"]) -> "Cache":
        """The cache of one row, or with None of all, which hold so many tokens: what later slots hold is forgotten
        where that is none."""
        layers = [layer._replace(row=row).forget(length == 0) for layer in self.layers]
        return Cache(tuple(layers), length)

    def of_all(self, length: Int[Array, " B"]) -> "Cache":
        """The cache of all rows again."""
        return Cache(tuple(layer._replace(row=None) for layer in self.layers), length)


def empty_cache(*, layers: int, batch: int, slots: int, kv_heads: int, head_width: int, dtype: jnp.dtype) -> Cache:
    """A cache without tokens, the same for every layer; each leaf is a buffer of its own, so that all of it can be
    donated."""
    layer = functools.partial(empty_layer, batch=batch, slots=slots, dtype=dtype)
    return Cache(tuple(layer(kv_heads, head_width, head_width) for _ in range(layers)), jnp.zeros(batch, jnp.int32))


def empty_layer(
    heads: int, key_width: int, value_width: int, *, batch: int, slots: int, dtype: jnp.dtype
) -> LayerCache:
    """One layer's cache without tokens."""
    keys, values = (jnp.zeros((batch, heads, slots, width), dtype) for width in (key_width, value_width))
    return LayerCache(keys, values, jnp.zeros((batch, slots), bool))


def _put_within(array: jax.Array, new: jax.Array, row: jax.Array | int, start: jax.Array) -> jax.Array:
    """Write [1, G, S, P] from slot `start` of a row on. What would stand past the last slot is dropped: the update then
    begins earlier, and repeats what is there."""
    size = new.shape[2]
    first = jnp.minimum(start, array.shape[2] - size)
    shift = start - first
    place = _indices(row, 0, first, 0)
    there = jax.lax.dynamic_slice(array, place, new.shape)
    if size > 1:
        double = jnp.concatenate([new, new], axis=2)
        new = jax.lax.dynamic_slice_in_dim(double, size - jnp.minimum(shift, size), size, axis=2)
    late = (jnp.arange(size) >= shift)[None, None, :, None]
    return jax.lax.dynamic_update_slice(array, jnp.where(late, new, there), place)


def _indices(*numbers: jax.Array | int) -> tuple[jax.Array, ...]:
    """Of a slice, in one type: plain numbers would be of 64 bits where those are on."""
    return tuple(jnp.asarray(number, jnp.int32) for number in numbers)
