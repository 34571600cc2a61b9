"""Root-mean-square normalisation. Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .precision import wide


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, computed in float32 or wider, returned in the dtype of x."""

    def __init__(self, width: int, *, epsilon: float, axis: str | None = "embed"):
        """`axis` is the logical axis of the normalised width."""
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width, jnp.float32), axes=(axis,))

    def __call__(self, x: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
        full = x.astype(wide(x))
        inverse = jax.lax.rsqrt(jnp.square(full).mean(axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.broadcast_to(self.scale[...].astype(full.dtype), x.shape)
        return (full * inverse * scale).astype(x.dtype)
