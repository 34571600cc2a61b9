"""Top-p routing: as many experts as it takes to be sure.

Huang et al. 2024, "Harder Task Needs More Experts: Dynamic Routing in MoE Models", https://arxiv.org/abs/2403.07652:
a token takes its most probable experts until their probabilities together reach p, each weighted by its probability.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..losses import RouterLoss, token_mean
from ..routing import Router, Routing, RoutingContext
from .gate import Gate


@dataclass(frozen=True, kw_only=True)
class TopP(Router):
    """Each token goes to the smallest set of experts whose probability reaches p; at most to `most` of them.

    Weights are the probabilities, not divided by their sum, as in the paper. The paper has no bound: static shapes need
    one, and what a token would take beyond it goes to nobody. Memory and the longest step follow `most`, not the mean.
    Alone, the router tends to spread its probability over all experts; the paper trains it with `BalanceLoss` and
    `EntropyLoss`.
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
        if self.most > experts:
            raise ValueError(f"TopP.most is {self.most}; with {experts} experts it must be at most {experts}")
        return TopPRouter(self, width=width, experts=experts, key=key)


class TopPRouter(nnx.Module):
    """A linear map to expert logits, a softmax and a cumulative sum over the most probable."""

    def __init__(self, config: TopP, *, width: int, experts: int, key: jax.Array):
        self.config = config
        self.gate = Gate(width=width, experts=experts, key=key)

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, None]:
        logits = self.gate(x)
        probs = jax.nn.softmax(logits, axis=-1)
        weight, expert = jax.lax.top_k(probs, self.config.most)
        # An expert is needed where those before it do not reach p; the first always is.
        reached = jax.lax.stop_gradient(jnp.cumsum(weight, axis=1) - weight)
        needed = reached < self.config.p
        if context.mask is not None:
            needed = needed & context.mask[:, None]
        weight, expert = jnp.where(needed, weight, 0.0), jnp.where(needed, expert, probs.shape[1])
        return Routing(expert.reshape(-1), weight.reshape(-1), None, logits, probs), None


@dataclass(frozen=True, kw_only=True)
class EntropyLoss(RouterLoss):
    """Mean entropy of a token's probabilities, in nats, so that few experts suffice: the paper's dynamic loss."""

    coefficient: float = 1e-4

    def __call__(self, routing: Routing, context: RoutingContext) -> Float[Array, ""]:
        log_probs = jax.nn.log_softmax(routing.logits, axis=-1)
        return token_mean(-(jnp.exp(log_probs) * log_probs).sum(axis=-1), context.mask)
