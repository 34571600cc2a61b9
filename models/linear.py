"""A linear map as one plain matrix multiplication.

Tokens are flattened first: XLA on CPU runs the weight gradient of a product over two batch axes three times slower than
that of the flattened product. A few rows, as in decoding and in verifying drafts, go through the C++ of the grouped
matmul on CPU: XLA's product of 2 to 8 rows takes up to twice as long (both measured in experiments/LOG.md).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..kernels.grouped_matmul import grouped_matmul
from ..kernels.implementations import platform
from .packed import PackedKernel, PackedTable, packed_linear, packed_look_up

FEW = range(2, 9)
"""Rows of a product that XLA on CPU is slow for: one it reads the weights as fast as memory gives them, for more it
packs them."""
FEW_TYPES = (jnp.float32, jnp.bfloat16)
"""That the C++ multiplies."""


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
    product = None
    if len(tokens) in FEW and x.dtype in FEW_TYPES and kernel.dtype == x.dtype and dtype in (None, x.dtype):
        product = _few_rows(tokens, weight) if platform() == "cpu" else None
    if product is None:
        product = jax.lax.dot(tokens, weight, preferred_element_type=dtype)
    return product.reshape(*batch, *out)


def _few_rows(x: Float[Array, "M D"], weight: Float[Array, "D F"]) -> Float[Array, "M F"] | None:
    """The product in C++; None where that cannot run, which its first use says."""
    try:
        return grouped_matmul(x, weight[None], jnp.array([len(x)], jnp.int32), implementation="native")
    except NotImplementedError:
        return None


def added(x: Float[Array, "*batch"], bias: nnx.Param | None) -> Float[Array, "*batch"]:
    """x with a bias, in the dtype of x, on its last axes; None: x."""
    return x if bias is None else x + jnp.broadcast_to(bias[...].astype(x.dtype), x.shape)


def look_up(table: Float[Array, "V D"] | PackedTable, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """The rows of an embedding. A token outside the vocabulary gives NaN, so that it shows."""
    if isinstance(table, PackedTable):
        return packed_look_up(table, tokens)
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
