"""The interface of an auxiliary loss, and means over the real tokens. Letters: T tokens, E experts."""

import abc
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..routing import Router, Routing, RoutingContext, assignment_counts


class RouterLoss(abc.ABC):
    """A scalar that a router is trained on beside the task's loss. Its name in metrics is the class's name."""

    coefficient: float

    def check(self, router: Router) -> None:  # noqa: B027
        """Raise ValueError where the loss cannot be had of this router. `MoE` calls it, before anything is built."""

    @abc.abstractmethod
    def __call__(self, routing: Routing, context: RoutingContext) -> Float[Array, ""]:
        """The loss before the coefficient. `context` is what the router was given; its mask is False at padding."""


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
    # Chosen and added, for a product would round to bfloat16 on a TPU, and NaN * 0 is NaN.
    real = mask.reshape(-1, *[1] * (values.ndim - 1))
    return jnp.where(real, values, 0.0).sum(axis=0) / jnp.maximum(mask.sum().astype(values.dtype), 1.0)


def check_coefficient(config: Any) -> None:
    """Refuse a coefficient that is not a finite number."""
    if not math.isfinite(config.coefficient):
        raise ValueError(f"{type(config).__name__}.coefficient is {config.coefficient}; it must be finite")
