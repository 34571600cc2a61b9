"""A ragged exchange out of an equal one: every slice is filled up to the longest that could be, and cut after.

Letters: N devices, P rows of a filled-up slice, M rows held, R rows of room.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .slices import Slices


def ragged_all_to_all_padded(
    rows: Float[Array, "M D"], slices: Slices, room: int, axis: str | tuple[str, ...]
) -> Float[Array, "R D"]:
    """See `ragged_all_to_all`."""
    held, width = rows.shape
    place = jnp.arange(min(held, room), dtype=jnp.int32)[None]
    source = jnp.where(place < slices.send[:, None], slices.send_from[:, None] + place, held)
    filled = rows.at[source].get(mode="fill", fill_value=0)  # [N, P, D]
    received = jax.lax.all_to_all(filled, axis, 0, 0, tiled=True)
    first = jax.lax.all_to_all(slices.write_to, axis, 0, 0, tiled=True)
    target = jnp.where(place < slices.receive[:, None], first[:, None] + place, room)
    empty = jnp.zeros((room, width), rows.dtype)
    return empty.at[target.reshape(-1)].set(received.reshape(-1, width), mode="drop")
