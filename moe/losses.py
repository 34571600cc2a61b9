"""Auxiliary losses of routers: means over the global batch, padding left out."""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .routing import Routing, RoutingContext, assignment_counts


class RouterLoss(abc.ABC):
    """A scalar that a router is trained on beside the task's loss. Its name in metrics is the class's name."""

    coefficient: float

    @abc.abstractmethod
    def __call__(self, routing: Routing, context: RoutingContext) -> Float[Array, ""]:
        """The loss before the coefficient. `context` is what the router was given; its mask is False at padding."""


@dataclass(frozen=True, kw_only=True)
class BalanceLoss(RouterLoss):
    """Switch load-balancing loss, E * sum_e f_e P_e. Fedus et al. 2021, https://arxiv.org/abs/2101.03961, eq. 4-6.

    f is each expert's share of the *assignments* (transformers takes the share of tokens, which is K times larger),
    P its mean probability: the loss is 1 when both are uniform, for every K.
    """

    coefficient: float = 0.01

    def __call__(self, routing: Routing, context: RoutingContext) -> Float[Array, ""]:
        experts = routing.probs.shape[1]
        return experts * (assignment_share(routing) * importance(routing, context.mask)).sum()


@dataclass(frozen=True, kw_only=True)
class ZLoss(RouterLoss):
    """Mean squared logsumexp of the router's logits, which keeps them small. Zoph et al. 2022 (ST-MoE),
    https://arxiv.org/abs/2202.08906, eq. 5."""

    coefficient: float = 1e-3

    def __call__(self, routing: Routing, context: RoutingContext) -> Float[Array, ""]:
        return token_mean(jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)), context.mask)


def assignment_share(routing: Routing) -> Float[Array, " E"]:
    """Each expert's share of the assignments: sums to 1; no gradient."""
    count = assignment_counts(routing).astype(jnp.float32)
    return count / jnp.maximum(count.sum(), 1.0)


def importance(routing: Routing, mask: Bool[Array, " T"] | None) -> Float[Array, " E"]:
    """Each expert's mean probability over the real tokens."""
    return token_mean(routing.probs, mask)


def token_mean(values: Float[Array, "T *rest"], mask: Bool[Array, " T"] | None) -> Float[Array, "*rest"]:
    """Mean over the real tokens."""
    if mask is None:
        return values.mean(axis=0)
    real = mask.astype(values.dtype)
    return jnp.tensordot(real, values, axes=1) / jnp.maximum(real.sum(), 1.0)
