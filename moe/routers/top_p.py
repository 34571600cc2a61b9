"""Top-p routing: as many experts as it takes to be sure.

Huang et al. 2024, "Harder Task Needs More Experts: Dynamic Routing in MoE Models", https://arxiv.org/abs/2403.07652:
a token takes its most probable experts until their probabilities together reach p, each weighted by its probability.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..routing import Router, Routing, RoutingContext, check_choices
from .gate import Gate


@dataclass(frozen=True, kw_only=True)
class TopP(Router):
    """Each token goes to the smallest set of experts whose probability reaches p; at most to `most` of them.

    Weights are the probabilities, not divided by their sum, as in the paper. The paper has no bound: static shapes need
    one, and what a token would take beyond it counts as dropped in the statistics. Memory and the longest step follow
    `most`, not the mean, and so do the places of a `CapacityDispatcher`. Alone, the router tends to spread its
    probability over all experts; the paper trains it with `BalanceLoss` and its dynamic loss,
    `EntropyLoss(coefficient=1e-4, marginal=0.0)`.
    """

    p: float = 0.4
    """Probability that a token's experts must reach together."""
    most: int = 4
    """The most experts that a token may take."""
    experts_per_token: float = 2.0
    """How many experts a token takes on average: your estimate, for the count of active parameters and FLOPs alone. The
    truth depends on the data and the training; measure it (the paper's models settle below 2 at p = 0.4)."""

    def __post_init__(self):
        if not 0 < self.p <= 1:
            raise ValueError(f"TopP.p is {self.p}; it must be above 0 and at most 1")
        if self.most < 1:
            raise ValueError(f"TopP.most is {self.most}; it must be at least 1 expert per token")
        if not 1 <= self.experts_per_token <= self.most:
            raise ValueError(
                f"TopP.experts_per_token is {self.experts_per_token}; with most={self.most} it must lie between 1 and "
                f"{self.most}"
            )

    def build(self, *, width: int, experts: int, key: jax.Array) -> "TopPRouter":
        check_choices(self, experts, "most")
        return TopPRouter(self, width=width, experts=experts, key=key)


class TopPRouter(nnx.Module):
    """A linear map to expert logits, a softmax and a cumulative sum over the experts by their probability."""

    def __init__(self, config: TopP, *, width: int, experts: int, key: jax.Array):
        self.config = config
        self.gate = Gate(width=width, experts=experts, key=key)

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, None]:
        logits = self.gate(x)
        probs = jax.nn.softmax(logits, axis=-1)
        most, experts = self.config.most, probs.shape[1]
        weight, expert = jax.lax.top_k(probs, experts)
        # An expert is needed where those before it do not reach p; the first always is.
        reached = jax.lax.stop_gradient(jnp.cumsum(weight, axis=1) - weight)
        needed = reached < self.config.p
        if context.mask is not None:
            needed = needed & context.mask[:, None]
        cut_off = needed[:, most:].sum(dtype=jnp.int32)
        weight = jnp.where(needed, weight, 0.0)[:, :most].reshape(-1)
        expert = jnp.where(needed, expert, experts)[:, :most].reshape(-1)
        return Routing(expert, weight, None, logits, probs, cut_off=cut_off), None
