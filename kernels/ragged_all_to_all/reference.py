"""The plainest exchange: everyone gets everything and picks what is its own. Letters: N devices, M rows, R rows of
room.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .slices import Slices


def ragged_all_to_all_reference(
    rows: Float[Array, "M D"], slices: Slices, room: int, axis: str | tuple[str, ...]
) -> Float[Array, "R D"]:
    """See `ragged_all_to_all`."""
    me = jax.lax.axis_index(axis)
    all_rows = jax.lax.all_gather(rows, axis)  # [N, M, D]
    first, count, target = (
        jax.lax.all_gather(entries, axis)[:, me] for entries in (slices.send_from, slices.send, slices.write_to)
    )
    y = jnp.zeros((room, rows.shape[1]), rows.dtype)
    for device in range(all_rows.shape[0]):
        offset = jnp.arange(room, dtype=jnp.int32) - target[device]
        mine = (offset >= 0) & (offset < count[device])
        picked = (
            all_rows[device].at[jnp.where(mine, first[device] + offset, rows.shape[0])].get(mode="fill", fill_value=0)
        )
        y = jnp.where(mine[:, None], picked, y)
    return y
