"""Statistics of one mixture-of-experts layer, returned by it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .losses import RouterLoss, assignment_share, importance, token_mean
from .routing import Routing


class MoEStats(NamedTuple):
    """Means over the global batch, padding left out. With gradient accumulation: over each micro-batch."""

    load: Float[Array, " E"]
    """Share of the assignments that each expert received; sums to 1."""
    importance: Float[Array, " E"]
    """Mean router probability of each expert; sums to 1."""
    entropy: Float[Array, ""]
    """Mean entropy of a token's router probabilities, in nats: log E when the router has no opinion."""
    max_violation: Float[Array, ""]
    """MaxVio: the busiest expert's load over the mean load, minus 1. Wang et al. 2024, https://arxiv.org/abs/2408.15664."""
    losses: dict[str, Float[Array, ""]]
    """Each auxiliary loss by its name, before its coefficient."""
    loss: Float[Array, ""]
    """What to add to the task's loss: the losses times their coefficients."""


def moe_stats(routing: Routing, mask: Bool[Array, " T"] | None, losses: tuple[RouterLoss, ...]) -> MoEStats:
    """Measure a routing. `losses` are of different classes."""
    load, experts = assignment_share(routing), routing.probs.shape[1]
    values = {type(loss).__name__: loss(routing, mask) for loss in losses}
    weighted = [loss.coefficient * value for loss, value in zip(losses, values.values(), strict=True)]
    log_probs = jnp.log(jnp.maximum(routing.probs, jnp.finfo(jnp.float32).tiny))
    return MoEStats(
        load=load,
        importance=importance(routing, mask),
        entropy=token_mean(-(routing.probs * log_probs).sum(axis=-1), mask),
        max_violation=load.max() * experts - 1.0,
        losses=values,
        loss=sum(weighted, start=jnp.zeros((), jnp.float32)),
    )
