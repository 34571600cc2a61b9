"""What JAX itself offers: `jax.lax.ragged_dot`. Its cost grows with E on CPU; on TPU v5p it is a grouped kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..quantized import Quantized, QuantizedRows, dequantize


def grouped_matmul_xla(
    x: Float[Array, "M D"] | QuantizedRows, w: Float[Array, "E D F"] | Quantized, group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """See `grouped_matmul`. JAX derives the gradient, and refuses vmap over x where w is not mapped."""
    row = jnp.arange(jax.tree.leaves(x)[0].shape[0])
    owned = (row < jnp.sum(group_sizes))[:, None]
    if isinstance(x, QuantizedRows):
        assert isinstance(w, Quantized)  # the caller checked
        sums = jax.lax.ragged_dot(x.codes, w.codes, group_sizes, preferred_element_type=jnp.int32)
        group = jnp.searchsorted(jnp.cumsum(group_sizes), row, side="right")
        columns = jnp.take(w.scales[:, 0], jnp.minimum(group, len(group_sizes) - 1), axis=0)
        return jnp.where(owned, sums.astype(jnp.float32) * x.scales * columns, 0.0)
    if isinstance(w, Quantized):
        w = dequantize(w)
    # XLA on CPU multiplies rows past the sum by zero, which leaves a NaN a NaN; and so does the gradient of w.
    x = jnp.where(owned, x, jnp.zeros((), x.dtype))
    y = jax.lax.ragged_dot(x, w, group_sizes)
    return jnp.where(owned, y, jnp.zeros((), y.dtype))
