"""What JAX itself offers, `jax.lax.ragged_all_to_all`: only the rows that are there travel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..implementations import platform
from ..manual_axes import vary_alike
from .slices import Slices


def ragged_all_to_all_xla(
    rows: Float[Array, "M D"], slices: Slices, room: int, axis: str | tuple[str, ...]
) -> Float[Array, "R D"]:
    """See `ragged_all_to_all`."""
    if platform() == "cpu":
        raise NotImplementedError("XLA has no ragged all-to-all for CPU; allowed there are 'padded' and 'reference'")
    empty, rows = vary_alike(jnp.zeros((room, rows.shape[1]), rows.dtype), rows)
    return jax.lax.ragged_all_to_all(
        rows, empty, slices.send_from, slices.send, slices.write_to, slices.receive, axis_name=axis
    )
