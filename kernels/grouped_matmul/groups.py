"""Where groups lie among the rows. Letters: M rows, E groups."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def group_bounds(group_sizes: Int[Array, " E"], rows: int) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    """Each group's first row and the row after its last.

    Clipped to the M rows: sizes that break their bounds, which the caller reports, must not lead outside the arrays.
    """
    end = jnp.minimum(jnp.cumsum(jnp.clip(group_sizes, 0, rows), dtype=jnp.int32), rows)
    return jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]]), end
