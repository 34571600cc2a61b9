"""The entropy loss: a router that is sure of each token and fair over all of them."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..routing import Routing, RoutingContext
from .loss import RouterLoss
from .scope import GlobalBatch, Scope


@dataclass(frozen=True, kw_only=True)
class EntropyLoss(RouterLoss):
    """token * mean_t H(p_t) - marginal * H(mean_t p_t), in nats: p_t are the router's probabilities of token t.

    With both weights 1 it is the negative mutual information of tokens and experts, which ModuleFormer minimizes: Shen
    et al. 2023, https://arxiv.org/abs/2306.04640, after Mod-Squad, which has tasks in the place of tokens: Chen et al.
    2022, https://arxiv.org/abs/2212.08066. It lies between -log E, every token sure of one expert and the experts even,
    and 0. With `marginal=0` and with `token=0` it is LIMoE's local and global loss, Mustafa et al. 2022,
    https://arxiv.org/abs/2206.02770, without modalities and without the threshold of the latter. A negative `token`
    keeps a router undecided instead.
    """

    coefficient: float = 1e-3
    token: float = 1.0
    """Weight of the entropy of each token's probabilities, which is to fall."""
    marginal: float = 1.0
    """Weight of the entropy of the mean probabilities, which is to rise."""
    scope: Scope = GlobalBatch()
    """The tokens that the mean probabilities are taken over."""

    def __post_init__(self):
        for name in ("token", "marginal"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"EntropyLoss.{name} is {getattr(self, name)}; it must be finite")

    def __call__(self, routing: Routing, context: RoutingContext) -> Float[Array, ""]:
        parts = self.scope.parts(routing, context)
        of_tokens = parts.mean(entropy(routing.probs)[:, None])[:, 0]
        return parts.join(self.token * of_tokens - self.marginal * entropy(parts.mean(routing.probs)))


def entropy(probs: Float[Array, "rows E"]) -> Float[Array, " rows"]:
    """In nats; an expert without probability adds nothing, and its gradient stays finite."""
    return -(probs * jnp.log(jnp.maximum(probs, jnp.finfo(probs.dtype).tiny))).sum(axis=1)
