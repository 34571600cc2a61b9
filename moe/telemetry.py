"""Statistics of one mixture-of-experts layer: those that it returns, and counts of its routing that a tap can take."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .dispatchers import Carried
from .losses import RouterLoss, assignment_share, entropy, importance, token_mean
from .routing import Routing, RoutingContext, assignment_counts, tokens_of

ROUTERS_OWN = "RouterOwnLoss"
"""Name of the loss that a router brings along, `Routing.loss`."""


class MoEStats(NamedTuple):
    """Means over the global batch, padding left out; zero where all is padding. With gradient accumulation: over each
    micro-batch."""

    load: Float[Array, " E"]
    """Share of the assignments that the router gave to each expert, dropped ones included; sums to 1."""
    importance: Float[Array, " E"]
    """Mean router probability of each expert; sums to 1."""
    entropy: Float[Array, ""]
    """Mean entropy of a token's router probabilities, in nats: log E when the router has no opinion."""
    max_violation: Float[Array, ""]
    """MaxVio: the busiest expert's load over the mean load, minus 1. Wang et al. 2024, https://arxiv.org/abs/2408.15664."""
    dropped: Float[Array, ""]
    """Share of the assignments that found no place, with the dispatcher or within the router's static bound; 0 where
    nothing is dropped."""
    overflow: Float[Array, ""]
    """Share that was lost because a device had no room to receive it: part of `dropped`."""
    losses: dict[str, Float[Array, ""]]
    """Each auxiliary loss by its name, before its coefficient; under `ROUTERS_OWN`, with its coefficient, what the
    router itself adds."""
    loss: Float[Array, ""]
    """What to add to the task's loss: the losses times their coefficients, and what the router itself adds."""
    router_state: Mapping[str, jax.Array]
    """New values of the router's `RouterState`s, to be stored after the step; empty where nothing is new."""


def moe_stats(
    routing: Routing,
    context: RoutingContext,
    losses: tuple[RouterLoss, ...],
    carried: Carried,
    router_state: Mapping[str, jax.Array],
) -> MoEStats:
    """Measure a routing. `losses` are of different classes."""
    load, experts = assignment_share(routing), routing.probs.shape[1]
    values = {type(loss).__name__: loss(routing, context) for loss in losses}
    weighted = [loss.coefficient * value for loss, value in zip(losses, values.values(), strict=True)]
    if routing.loss is not None:
        values[ROUTERS_OWN] = routing.loss
        weighted.append(routing.loss)
    return MoEStats(
        load=load,
        importance=importance(routing, context.mask),
        entropy=token_mean(entropy(routing.probs), context.mask),
        max_violation=jnp.maximum(load.max() * experts - 1.0, 0.0),
        dropped=_with_cut_off(carried.dropped, routing),
        overflow=carried.overflow,
        losses=values,
        loss=sum(weighted, start=jnp.zeros((), jnp.float32)),
        router_state=jax.lax.stop_gradient(dict(router_state)),
    )


def chosen_experts(routing: Routing) -> Bool[Array, "T E"]:
    """Whether the router sent a token to an expert, whatever the routing's form; assignments to nobody are left out."""
    return jnp.zeros(routing.probs.shape, bool).at[tokens_of(routing), routing.expert].set(True, mode="drop")


def coactivation_counts(routing: Routing) -> Int[Array, "E E"]:
    """How many tokens the router sent to both of two experts; on the diagonal, how many it sent to one.

    N_ij and N_i of expert co-activation, N_ij / N_i: Muennighoff et al. 2024 (OLMoE), https://arxiv.org/abs/2409.02060,
    section 5.2. Every pair of a token's experts counts, as their text says; their published script counts those that
    are neighbours in the order of the scores.
    """
    chosen = chosen_experts(routing).astype(jnp.float32)  # sums of ones are exact up to 2**24 tokens
    return (chosen.T @ chosen).astype(jnp.int32)


def _with_cut_off(dropped: Float[Array, ""], routing: Routing) -> Float[Array, ""]:
    """Share of the assignments that were lost: those that the router cut off, and of the rest what was dropped."""
    if routing.cut_off is None:
        return dropped
    cut, rest = (count.astype(jnp.float32) for count in (routing.cut_off, assignment_counts(routing).sum()))
    return (cut + dropped * rest) / jnp.maximum(cut + rest, 1.0)
