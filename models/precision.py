"""In what dtype sums, norms and softmax run: float32, and float64 where the activations have it."""

import jax
import jax.numpy as jnp
import numpy as np


def wide(x: jax.Array) -> np.dtype:
    """The dtype of sums over activations x: at least float32."""
    return np.dtype(x.dtype if jnp.finfo(x.dtype).bits > 32 else np.float32)
