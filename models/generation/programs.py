"""The two functions that generation compiles: read a chunk of prompts, and draw a token in every row.

All that they carry from call to call stays on the devices and is donated, so that the cache is written in place.
Letters: B rows, R rows that read, C tokens of a chunk, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, UInt32

from ..cache import Cache
from ..decoder import DecoderLM
from ..sharding import Layout
from .samplers import Sampler


class Rows(NamedTuple):
    """What the rows hold."""

    cache: Cache
    token: Int[Array, " B"]
    """The last one drawn, not in the cache yet."""
    drawn: Int[Array, " B"]
    """How many were drawn."""
    key: UInt32[Array, "B N"]
    """The randomness of each row's request."""
    seen: Bool[Array, "B V"] | None
    """The tokens of each row; None where the sampler does not ask."""


class Chunk(NamedTuple):
    """The next part of some prompts."""

    tokens: Int[Array, "R C"]
    start: Int[Array, " R"]
    """Where in its prompt it begins."""
    count: Int[Array, " R"]
    """How many tokens of it are real; 0 where a row reads nothing."""
    key: UInt32[Array, "R N"]
    row: Int[Array, ""] | None
    """The row that reads, R = 1; None: R = B, all may read."""


class Programs(NamedTuple):
    """Compiled when first called with a shape."""

    read: Callable[[list[jax.Array], Rows, Chunk], tuple[Rows, jax.Array]]
    """Read a chunk, and draw what would follow it in each of the R rows: [R], the first token where a prompt ends."""
    draw: Callable[[list[jax.Array], Rows, Bool[np.ndarray, " B"]], tuple[Rows, jax.Array]]
    """Draw one token in the active rows: [B]."""


def empty_rows(model: DecoderLM, *, rows: int, slots: int, sampler: Sampler, layout: Layout | None) -> Rows:
    """Rows without tokens, on a mesh split by batch and key-value heads.

    Raises:
        ValueError: the rows or the heads do not divide over the mesh.
    """
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    held = Rows(
        model.empty_cache(batch=rows, slots=slots),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros((rows, *key.shape), key.dtype),
        jnp.zeros((rows, model.config.vocab), bool) if sampler.needs_seen else None,
    )
    return held if layout is None else jax.device_put(held, shardings_of(held, layout))


def shardings_of(held: Rows, layout: Layout) -> Any:
    """The sharding of every array, or shape, that the rows hold: the cache split by batch and key-value heads.

    Raises:
        ValueError: the rows or the heads do not divide over the mesh.
    """

    def of(array: Any) -> NamedSharding:
        axes = ("batch", "kv_heads", None, None) if array.ndim == 4 else ("batch", None)
        return NamedSharding(layout.mesh, layout.spec(axes, array.shape, "the key-value cache"))

    whole = NamedSharding(layout.mesh, PartitionSpec())
    layers = tuple(jax.tree.map(of, layer) for layer in held.cache.layers)
    rest: Any = jax.tree.map(lambda _: whole, held)
    return rest._replace(cache=rest.cache._replace(layers=layers))


@functools.lru_cache(maxsize=16)
def programs(
    graph: nnx.GraphDef, structure: Any, sampler: Sampler, limit: int, layout: Layout | None, rows: Any
) -> Programs:
    """Kept, so that a second engine of the same shapes compiles nothing.

    Args:
        graph: of the model, unstacked.
        structure: of its state's leaves.
        sampler: how tokens are chosen.
        limit: ids from here on are never drawn.
        layout: of the mesh; None: one device.
        rows: structure and shapes of `Rows`, see `shapes_of`.
    """

    def model_of(leaves: list[jax.Array]) -> DecoderLM:
        return nnx.merge(graph, jax.tree.unflatten(structure, leaves))

    def choose(logits: jax.Array, seen: jax.Array | None, key: jax.Array, drawn: jax.Array) -> jax.Array:
        allowed = jnp.arange(logits.shape[-1]) < limit
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key), drawn)
        return sampler(jnp.where(allowed[None], logits, -jnp.inf), seen, keys)

    def read(leaves: list[jax.Array], held: Rows, chunk: Chunk) -> tuple[Rows, jax.Array]:
        model, tokens = model_of(leaves), chunk.tokens
        mask = jnp.arange(tokens.shape[1])[None] < chunk.count[:, None]
        reading = chunk.count > 0
        length = chunk.start if chunk.row is not None else jnp.where(reading, chunk.start, held.cache.length)
        x, cache = model.extend(tokens, held.cache.of_row(chunk.row, length), mask, layout=layout)
        end = jnp.maximum(chunk.count - 1, 0)
        logits = model.head(jnp.take_along_axis(x, end[:, None, None], axis=1))[:, 0]
        seen = None
        if held.seen is not None:
            seen = jnp.where((length == 0)[:, None], False, _of_row(held.seen, chunk.row))
            seen = seen.at[jnp.arange(len(tokens))[:, None], jnp.where(mask, tokens, seen.shape[1])].set(
                True, mode="drop"
            )
        first = jnp.zeros_like(chunk.count)
        token = choose(logits, seen, chunk.key, first)
        put = functools.partial(_put_row, row=chunk.row, reading=reading)
        return (
            Rows(
                cache.of_all(put(held.cache.length, cache.length)),
                put(held.token, token),
                put(held.drawn, first + 1),
                put(held.key, chunk.key),
                None if held.seen is None or seen is None else put(held.seen, seen),
            ),
            token,
        )

    def draw(leaves: list[jax.Array], held: Rows, active: jax.Array) -> tuple[Rows, jax.Array]:
        model, seen = model_of(leaves), held.seen
        x, cache = model.extend(held.token[:, None], held.cache, active[:, None], layout=layout)
        if seen is not None:
            seen = seen.at[jnp.arange(len(active)), jnp.where(active, held.token, seen.shape[1])].set(True, mode="drop")
        token = choose(model.head(x)[:, 0], seen, held.key, held.drawn)
        token = jnp.where(active, token, held.token)
        return Rows(cache, token, held.drawn + active.astype(jnp.int32), held.key, seen), token

    if layout is None:
        return Programs(jax.jit(read, donate_argnums=1), jax.jit(draw, donate_argnums=1))
    whole = NamedSharding(layout.mesh, PartitionSpec())
    shardings = (shardings_of(jax.tree.unflatten(*rows), layout), whole)
    compiled = functools.partial(jax.jit, donate_argnums=1, out_shardings=shardings)
    return Programs(compiled(read), compiled(draw))


def shapes_of(held: Rows) -> Any:
    """What `programs` is kept by."""
    leaves, structure = jax.tree.flatten(held)
    return structure, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)


def _of_row(array: jax.Array, row: jax.Array | None) -> jax.Array:
    return array if row is None else jax.lax.dynamic_slice_in_dim(array, row, 1)


def _put_row(array: jax.Array, new: jax.Array, *, row: jax.Array | None, reading: jax.Array) -> jax.Array:
    if row is not None:
        return jax.lax.dynamic_update_slice_in_dim(array, new.astype(array.dtype), row, 0)
    return jnp.where(reading.reshape(-1, *[1] * (array.ndim - 1)), new.astype(array.dtype), array)
