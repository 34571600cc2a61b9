"""Top-k selection without weights: every selected expert counts once.

Zhang et al. 2021, "MoEfication", https://arxiv.org/abs/2110.01786, sums the experts that a token is sent to, for each
is a part of one dense network. As no weight depends on the router, the task's loss has no gradient for it: it learns
from auxiliary losses, or keeps the weights that it was given.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..routing import Router, Routing, RoutingContext, check_choices, padding_to_nobody
from .gate import Gate


@dataclass(frozen=True, kw_only=True)
class EqualWeights(Router):
    """Each token goes to the k experts with the highest logits, and their outputs are summed."""

    k: int = 2
    """Experts per token."""

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"EqualWeights.k is {self.k}; it must be at least 1 expert per token")

    @property
    def experts_per_token(self) -> float:
        return float(self.k)

    @property
    def weight_sum(self) -> float | None:
        return float(self.k)

    def build(self, *, width: int, experts: int, key: jax.Array) -> "EqualWeightsRouter":
        check_choices(self, experts, "k")
        return EqualWeightsRouter(self, width=width, experts=experts, key=key)


class EqualWeightsRouter(nnx.Module):
    """A linear map to expert logits and a top-k. The probabilities, for losses and statistics, are their softmax."""

    def __init__(self, config: EqualWeights, *, width: int, experts: int, key: jax.Array):
        self.config = config
        self.gate = Gate(width=width, experts=experts, key=key)

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, None]:
        logits = self.gate(x)
        _, expert = jax.lax.top_k(logits, self.config.k)
        weight = jnp.ones(expert.shape, jnp.float32)
        expert, weight = padding_to_nobody(expert, weight, context.mask, logits.shape[1])
        return Routing(expert.reshape(-1), weight.reshape(-1), None, logits, jax.nn.softmax(logits, axis=-1)), None
