"""Null experts: a token may spend some of its k choices on experts that do nothing and cost nothing.

Zeng et al. 2024, "AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models",
https://arxiv.org/abs/2406.13233. Letters: T tokens, D width, E experts (the real ones), K choices per token.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..losses import check_coefficient, importance, token_mean
from ..routing import Router, Routing, RoutingContext, assignment_counts
from ..scores import normalized
from .gate import Gate


@dataclass(frozen=True, kw_only=True)
class NullExperts(Router):
    """Top-k over the experts and n null experts; a choice of a null expert goes to nobody.

    The weights of a token's real experts are its probabilities divided by their sum, over the real ones alone, as in
    AdaMoE; a token that chose null experts alone gets nothing from the layer. `logits` and `probs` of the routing are
    those of the E real experts; the probabilities of all E + n sum to 1, so what is missing is the null experts'. In
    the statistics importance sums to what the real experts have, and the entropy is of their part alone.

    How many real experts a token takes on average, the balance loss decides. The router adds it itself, so
    `MoE(losses=())`: `BalanceLoss` knows only the real experts and would leave the null ones alone. When it is
    balanced, a token takes k * E / (E + n) real experts. `CapacityDispatcher` counts its places by the k choices.
    """

    k: int = 4
    """Choices per token, among E + n."""
    null_experts: int = 8
    """Number n of null experts."""
    experts_per_token: float = 2.0
    """How many real experts a token takes on average: your estimate, for the count of active parameters and FLOPs
    alone. k * E / (E + n) where the loss has balanced the router: 2 for the defaults and 8 experts."""
    coefficient: float = 0.01
    """Of the balance loss."""

    def __post_init__(self):
        if self.k < 2:
            raise ValueError(
                f"NullExperts.k is {self.k}; it must be at least 2: with one choice every weight would be 1 and the "
                "task would teach the router nothing"
            )
        if self.null_experts < 1:
            raise ValueError(f"NullExperts.null_experts is {self.null_experts}; it must be at least 1")
        if not 0 < self.experts_per_token <= self.k:
            raise ValueError(
                f"NullExperts.experts_per_token is {self.experts_per_token}; it must be above 0 and at most k, {self.k}"
            )

        check_coefficient(self)

    def build(self, *, width: int, experts: int, key: jax.Array) -> "NullExpertsRouter":
        choices = experts + self.null_experts
        if self.k > choices:
            raise ValueError(
                f"NullExperts.k is {self.k}; with {experts} experts and {self.null_experts} null experts it must be at "
                f"most {choices}"
            )
        return NullExpertsRouter(self, width=width, experts=experts, key=key)


class NullExpertsRouter(nnx.Module):
    """A linear map to E + n logits, a softmax and a top-k."""

    def __init__(self, config: NullExperts, *, width: int, experts: int, key: jax.Array):
        self.config = config
        self.experts = experts
        self.gate = Gate(width=width, experts=experts + config.null_experts, key=key)

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, None]:
        logits, experts = self.gate(x), self.experts
        probs = jax.nn.softmax(logits, axis=-1)
        weight, expert = jax.lax.top_k(probs, self.config.k)
        chosen = expert < experts
        if context.mask is not None:
            chosen = chosen & context.mask[:, None]
        weight, expert = normalized(jnp.where(chosen, weight, 0.0)), jnp.where(chosen, expert, experts)
        routing = Routing(expert.reshape(-1), weight.reshape(-1), None, logits[:, :experts], probs[:, :experts])
        balance = null_balance(routing, context, self.config.null_experts)
        return routing._replace(loss=self.config.coefficient * balance), None


def null_balance(routing: Routing, context: RoutingContext, null_experts: int) -> Float[Array, ""]:
    """The load-balancing loss over E real and n null experts, (E + n) * sum_i f_i P_i, in which every null expert has
    the null experts' mean share of the assignments as its f: null experts are alike, so that only their sum matters.

    f and P are as in `BalanceLoss`; the loss is 1 when all are uniform.
    """
    tokens, experts = routing.probs.shape
    real = tokens if context.mask is None else context.mask.sum(dtype=jnp.int32)
    # Token-major: every real token has A / T choices, and what no real expert got the null experts did.
    choices = jnp.maximum(real * (routing.expert.shape[0] // tokens), 1)
    share = assignment_counts(routing).astype(jnp.float32) / choices.astype(jnp.float32)
    null_share, null_prob = 1.0 - share.sum(), token_mean(1.0 - routing.probs.sum(axis=1), context.mask)
    of_real = (share * importance(routing, context.mask)).sum()
    return (experts + null_experts) * (of_real + null_share / null_experts * null_prob)
