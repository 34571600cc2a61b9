"""A linear map as one plain matrix multiplication.

Tokens are flattened first: XLA on CPU runs the weight gradient of a product over two batch axes three times slower than
that of the flattened product (measured in experiments/LOG.md).
"""

import math

from jaxtyping import Array, Float


def linear(x: Float[Array, "..."], kernel: Float[Array, "..."], *, inputs: int = 1) -> Float[Array, "..."]:
    """Sum the last `inputs` axes of x against the first `inputs` axes of the kernel, in the dtype of x.

    Args:
        x: [*batch, *in].
        kernel: [*in, *out].
        inputs: how many axes *in is.

    Returns:
        [*batch, *out].
    """
    batch, into, out = x.shape[: x.ndim - inputs], kernel.shape[:inputs], kernel.shape[inputs:]
    flat = x.reshape(-1, math.prod(into)) @ kernel.astype(x.dtype).reshape(math.prod(into), -1)
    return flat.reshape(*batch, *out)
