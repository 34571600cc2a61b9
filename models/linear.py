"""A linear map as one plain matrix multiplication.

Tokens are flattened first: XLA on CPU runs the weight gradient of a product over two batch axes three times slower than
that of the flattened product (measured in experiments/LOG.md).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def linear(
    x: Float[Array, "..."], kernel: Float[Array, "..."], *, inputs: int = 1, dtype: DTypeLike | None = None
) -> Float[Array, "..."]:
    """Sum the last `inputs` axes of x against the first `inputs` axes of the kernel, cast to the dtype of x.

    Args:
        x: [*batch, *in].
        kernel: [*in, *out].
        inputs: how many axes *in is.
        dtype: of the sums and the result; None: the dtype of x.

    Returns:
        [*batch, *out].
    """
    batch, into, out = x.shape[: x.ndim - inputs], kernel.shape[:inputs], kernel.shape[inputs:]
    tokens = x.reshape(math.prod(batch), math.prod(into))
    weight = kernel.astype(x.dtype).reshape(math.prod(into), math.prod(out))
    return jax.lax.dot(tokens, weight, preferred_element_type=dtype).reshape(*batch, *out)


def added(x: Float[Array, "*batch"], bias: nnx.Param | None) -> Float[Array, "*batch"]:
    """x with a bias, in the dtype of x, on its last axes; None: x."""
    return x if bias is None else x + jnp.broadcast_to(bias[...].astype(x.dtype), x.shape)
