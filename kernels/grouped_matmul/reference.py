"""The plainest correct grouped matmul: every group's matrix on every row, and each row keeps its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..quantized import Quantized, QuantizedRows, dequantize


def grouped_matmul_reference(
    x: Float[Array, "M D"] | QuantizedRows, w: Float[Array, "E D F"] | Quantized, group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """See `grouped_matmul`. JAX derives the gradient."""
    if isinstance(x, QuantizedRows):
        assert isinstance(w, Quantized)  # the caller checked
        sums = _multiply(x.codes, w.codes, group_sizes, jnp.int32)
        columns = _multiply(jnp.ones_like(x.scales), w.scales, group_sizes, jnp.float32)  # each row's group's scales
        owned = jnp.arange(sums.shape[0])[:, None] < jnp.sum(group_sizes)
        return jnp.where(owned, sums.astype(jnp.float32) * x.scales * columns, 0.0)
    matrices = dequantize(w) if isinstance(w, Quantized) else w
    return _multiply(x, matrices, group_sizes, jnp.float32).astype(x.dtype)


def _multiply(x: jax.Array, w: jax.Array, group_sizes: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    row = jnp.arange(x.shape[0])[:, None]
    ends = jnp.cumsum(group_sizes)
    zero = jnp.zeros((), dtype)

    def add_group(y, group):
        start, end, weight = group
        mine = (start <= row) & (row < end)
        # Selected before the product and after it: a row of somebody else may hold NaN, and 0 * NaN is NaN.
        own = jnp.where(mine, x.astype(dtype), zero)
        product = jnp.matmul(own, weight.astype(dtype), precision="highest")
        return jnp.where(mine, product, y), None

    # Zeros that vary over the same mesh axes as the arguments: under shard_map a scan's carry keeps its type.
    zeros = jnp.zeros((x.shape[0], w.shape[2]), dtype) + (0 * ends[-1]).astype(dtype)
    return jax.lax.scan(add_group, zeros, (ends - group_sizes, ends, w))[0]
