"""ReLU routing: an expert runs where its logit is above zero, and an adaptive L1 loss holds how often that is.

Wang et al. 2024, "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
https://arxiv.org/abs/2412.14711. The number of experts varies from token to token, and nothing jumps where an expert
comes or goes, for its weight is then zero.

Letters: T tokens, D width, E experts, K experts kept per token at most, A = T * K assignments.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..losses import token_mean
from ..routing import Router, RouterState, Routing, RoutingContext, check_choices
from ..scores import normalized
from .gate import Gate

# Far on either side of what training needs. Without them a layer that stays too sparse, or cannot become sparser, would
# bring the coefficient to 0, from where no factor leads back, or to infinity.
_LEAST, _MOST = 1e-12, 1e6


@dataclass(frozen=True, kw_only=True)
class ReLURouting(Router):
    """A token goes to every expert with a positive logit, which is also its weight: k experts on average, once trained.

    The router adds to the loss coefficient * mean over tokens of sum_e f_e relu(logit_e), with f_e = E / k times the
    share of tokens that expert e gets: busy experts are pressed harder, which balances the load, so a balance loss is
    not needed: `MoE(losses=())`. After each training batch (each micro-batch of an accumulated step) the coefficient is
    multiplied by `adaptation` where the layer is less sparse than 1 - k / E, and divided by it where it is sparser.

    Unlike in the paper, whose one coefficient looks at the mean sparsity of all layers, each layer has its own: a layer
    knows no other, and each then costs what it is said to cost. It stays from 1e-12 to 1e6.

    Nobody's places take memory: a dispatcher has rows for all T * most assignments, and a capacity factor is over their
    share, not over that of k.
    """

    k: int = 2
    """Experts per token that training aims at, on average."""
    most: int | None = None
    """The most experts of one token, those with the largest weights; None: all. It bounds memory, at T * most rows for
    the experts, and what it cuts off counts as dropped in the statistics. Early in training about half of all experts
    are positive, so a small bound cuts much at first."""
    initial_coefficient: float = 1e-8
    """Coefficient of the first step; the paper's."""
    adaptation: float = 1.2
    """Factor by which a step changes the coefficient; the paper's."""

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"ReLURouting.k is {self.k}; it must be at least 1 expert per token")
        if self.most is not None and self.most < self.k:
            raise ValueError(f"ReLURouting.most is {self.most}; with k={self.k} it must be at least {self.k}, or None")
        initial = self.initial_coefficient
        if not _LEAST <= initial <= _MOST:
            raise ValueError(f"ReLURouting.initial_coefficient is {initial}; it must be from {_LEAST:g} to {_MOST:g}")
        if not 1 < self.adaptation < math.inf:
            raise ValueError(f"ReLURouting.adaptation is {self.adaptation}; it must be above 1 and finite")

    @property
    def experts_per_token(self) -> float:
        return float(self.k)

    def build(self, *, width: int, experts: int, key: jax.Array) -> "ReLURouter":
        check_choices(self, experts, "k", "most")
        return ReLURouter(self, width=width, experts=experts, key=key)


class ReLURouter(nnx.Module):
    """A linear map to expert logits, a ReLU, and the coefficient of its loss."""

    def __init__(self, config: ReLURouting, *, width: int, experts: int, key: jax.Array):
        self.config = config
        self.gate = Gate(width=width, experts=experts, key=key)
        self.coefficient = RouterState(jnp.float32(config.initial_coefficient))

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, dict[str, jax.Array] | None]:
        logits = self.gate(x)
        experts = logits.shape[1]
        weights = jax.nn.relu(logits)
        if context.mask is not None:
            weights = jnp.where(context.mask[:, None], weights, 0.0)
        active = weights > 0
        share = token_mean(active.astype(jnp.float32), context.mask)  # of the tokens, for each expert
        penalty = (token_mean(weights, context.mask) * share).sum() * (experts / self.config.k)

        kept, expert = jax.lax.top_k(weights, self.config.most or experts)
        expert = jnp.where(kept > 0, expert, experts)
        routing = Routing(
            expert.reshape(-1),
            kept.reshape(-1),
            None,
            logits,
            normalized(weights),
            loss=self.coefficient[...] * penalty,
            cut_off=active.sum(dtype=jnp.int32) - (kept > 0).sum(dtype=jnp.int32),
        )
        if not context.training:
            return routing, None
        # All padding: nothing was seen, and the coefficient stays.
        seen = 1.0 if context.mask is None else context.mask.any().astype(jnp.float32)
        excess = jnp.sign(share.mean() - self.config.k / experts) * seen
        coefficient = self.coefficient[...] * jnp.float32(self.config.adaptation) ** excess
        return routing, {"coefficient": jnp.clip(coefficient, _LEAST, _MOST)}
