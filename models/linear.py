"""A linear map as one plain matrix multiplication.

Tokens are flattened first: XLA on CPU runs the weight gradient of a product over two batch axes three times slower than
that of the flattened product (measured in experiments/LOG.md).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .packed import PackedKernel, PackedTable, packed_linear, packed_look_up


def linear(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."] | PackedKernel,
    *,
    inputs: int = 1,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Sum the last `inputs` axes of x against the first `inputs` axes of the kernel, cast to the dtype of x.

    Args:
        x: [*batch, *in].
        kernel: [*in, *out]; or packed, with no gradient.
        inputs: how many axes *in is.
        dtype: of the sums and the result; None: the dtype of x.

    Returns:
        [*batch, *out].
    """
    if isinstance(kernel, PackedKernel):
        return packed_linear(x, kernel, inputs=inputs, dtype=dtype)
    batch, into, out = x.shape[: x.ndim - inputs], kernel.shape[:inputs], kernel.shape[inputs:]
    tokens = x.reshape(math.prod(batch), math.prod(into))
    weight = kernel.astype(x.dtype).reshape(math.prod(into), math.prod(out))
    return jax.lax.dot(tokens, weight, preferred_element_type=dtype).reshape(*batch, *out)


def added(x: Float[Array, "*batch"], bias: nnx.Param | None) -> Float[Array, "*batch"]:
    """x with a bias, in the dtype of x, on its last axes; None: x."""
    return x if bias is None else x + jnp.broadcast_to(bias[...].astype(x.dtype), x.shape)


def look_up(table: Float[Array, "V D"] | PackedTable, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """The rows of an embedding. A token outside the vocabulary gives NaN, so that it shows."""
    if isinstance(table, PackedTable):
        return packed_look_up(table, tokens)
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
