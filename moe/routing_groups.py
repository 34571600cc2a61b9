"""Routing groups: the tokens that compete with each other, so that a result does not depend on the mesh.

Letters: T tokens, G groups, N tokens of a group.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from .routing import RoutingContext


def check_routing_group(config: object, routing_group: int | None) -> None:
    """Refuse a routing group without tokens."""
    if routing_group is not None and routing_group < 1:
        raise ValueError(
            f"{type(config).__name__}.routing_group is {routing_group}; it must be at least 1 token, or None"
        )


def in_groups(values: Shaped[Array, "T *rest"], routing_group: int | None) -> Shaped[Array, "G N *rest"]:
    """Cut the tokens into groups of neighbours; None: all are one. The last group is filled up with zeros."""
    tokens = values.shape[0]
    size = min(routing_group or tokens, tokens)
    padding = -tokens % size
    padded = jnp.pad(values, [(0, padding)] + [(0, 0)] * (values.ndim - 1)) if padding else values
    return padded.reshape(-1, size, *values.shape[1:])


def real_in_groups(context: RoutingContext, tokens: int, routing_group: int | None) -> Bool[Array, "G N"]:
    """Which places of the groups hold a real token: neither padding nor the filling of the last group."""
    mask = jnp.ones(tokens, bool) if context.mask is None else context.mask
    return in_groups(mask, routing_group)
