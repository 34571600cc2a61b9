"""The router z-loss."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..routing import Routing, RoutingContext
from .loss import RouterLoss, token_mean


@dataclass(frozen=True, kw_only=True)
class ZLoss(RouterLoss):
    """Mean squared logsumexp of the router's logits, which keeps them small. Zoph et al. 2022 (ST-MoE),
    https://arxiv.org/abs/2202.08906, eq. 5."""

    coefficient: float = 1e-3

    def __call__(self, routing: Routing, context: RoutingContext) -> Float[Array, ""]:
        return token_mean(jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)), context.mask)
