"""Top-k softmax routing.

Shazeer et al. 2017, "Outrageously Large Neural Networks", https://arxiv.org/abs/1701.06538, without the noise;
k = 1 is the router of Switch Transformer, https://arxiv.org/abs/2101.03961; k = 2 renormalised is Mixtral's.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..routing import Router, Routing, RoutingContext


@dataclass(frozen=True, kw_only=True)
class TopK(Router):
    """Each token goes to the k experts that score highest under a softmax over all experts, in float32."""

    k: int = 2
    """Experts per token."""
    renormalize: bool = True
    """Divide the k weights by their sum (Mixtral, Qwen3-MoE). With k = 1 the weight would be a constant 1 and the
    router would learn from the balance loss alone, so k = 1 wants False (Switch)."""

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"TopK.k is {self.k}; it must be at least 1 expert per token")

    @property
    def experts_per_token(self) -> float:
        return float(self.k)

    def build(self, *, width: int, experts: int, key: jax.Array) -> "TopKRouter":
        if self.k > experts:
            raise ValueError(f"TopK.k is {self.k}; with {experts} experts it must be at most {experts}")
        return TopKRouter(self, width=width, experts=experts, key=key)


class TopKRouter(nnx.Module):
    """A linear map to expert logits, a softmax and a top-k."""

    def __init__(self, config: TopK, *, width: int, experts: int, key: jax.Array):
        self.config = config
        initial = jax.nn.initializers.lecun_normal()(key, (width, experts), jnp.float32)
        self.kernel = nnx.Param(initial, axes=("embed", None))

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, None]:
        experts = self.kernel.shape[1]
        logits = x.astype(jnp.float32) @ self.kernel[...].astype(jnp.float32)
        probs = jax.nn.softmax(logits, axis=-1)
        weight, expert = jax.lax.top_k(probs, self.config.k)
        if self.config.renormalize:
            weight = weight / weight.sum(axis=-1, keepdims=True)
        if context.mask is not None:
            real = context.mask[:, None]
            weight, expert = jnp.where(real, weight, 0.0), jnp.where(real, expert, experts)
        return Routing(expert.reshape(-1), weight.reshape(-1), None, logits, probs), None
