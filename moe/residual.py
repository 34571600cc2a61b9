"""Residual mixture of experts: a dense network, and the mixture as a correction of it.

Rajbhandari et al. 2022 (DeepSpeed-MoE), https://arxiv.org/abs/2201.05596: every token passes a dense
network and one routed expert. The paper adds the two, which is a shared expert: `MoE(router=TopK(k=1,
renormalize=False), shared=...)`. DeepSpeed's code mixes them instead, by two coefficients per token, a softmax of a
linear map with a bias; that is what stands here. Letters: T tokens, D width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .experts import Experts, SwiGLU


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A dense network beside the mixture, and learned coefficients of the two."""

    dense: Experts = SwiGLU()
    """The network that every token passes."""

    def build(self, *, width: int, key: jax.Array) -> "ResidualNetwork":
        """Build the network for tokens of `width`."""
        return ResidualNetwork(self, width=width, key=key)


class ResidualNetwork(nnx.Module):
    """The dense network, and the map to two logits: kernel [D, 2] and bias [2], the mixture's first."""

    def __init__(self, config: Residual, *, width: int, key: jax.Array):
        dense, coefficients = jax.random.split(key)
        self.config = config
        self.dense = config.dense.build(experts=1, width=width, key=dense)
        self.kernel = nnx.Param(jax.nn.initializers.lecun_normal()(coefficients, (width, 2)), axes=("embed", None))
        self.bias = nnx.Param(jnp.zeros(2), axes=(None,))

    def __call__(self, x: Float[Array, "T D"], mixture: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Mix the output of the mixture with that of the dense network on the same tokens x."""
        logits = x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)[None]
        coefficients = jax.nn.softmax(logits.astype(jnp.float32), axis=1).astype(x.dtype)
        return coefficients[:, :1] * mixture + coefficients[:, 1:] * self.dense(x[None], None)[0]
