"""Dense dispatch: every expert runs on every token.

It costs E / K times the matmuls that the routing asks for, drops nothing, and is the oracle that every other
dispatcher must equal.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..routing import NO_CONTEXT, Routing, RoutingContext, tokens_of
from .dispatcher import Dispatcher


class DensePlan(NamedTuple):
    """Combine weights; 0 where a token does not go to an expert."""

    weight: Float[Array, "T E"]
    dropped: Float[Array, ""]
    group_sizes: None = None


@dataclass(frozen=True, kw_only=True)
class DenseDispatcher(Dispatcher):
    """Every expert on every token, combined by the routing's weights."""

    def plan(self, routing: Routing, context: RoutingContext = NO_CONTEXT) -> DensePlan:
        weight = jnp.zeros(routing.logits.shape, routing.weight.dtype)
        weight = weight.at[tokens_of(routing), routing.expert].add(routing.weight, mode="drop")
        return DensePlan(weight, dropped=jnp.zeros((), jnp.float32))

    def dispatch(self, x: Float[Array, "T D"], plan: DensePlan) -> Float[Array, "1 T D"]:
        return x[None]

    def combine(self, rows: Float[Array, "E T D"], plan: DensePlan) -> Float[Array, "T D"]:
        tokens, experts = plan.weight.shape
        if rows.shape[:2] != (experts, tokens):
            # An einsum would broadcast the one batch that all experts share, had they returned it as it came.
            raise ValueError(f"rows of the experts have shape {rows.shape}; they must begin with {(experts, tokens)}")
        return jnp.einsum("etd,te->td", rows, plan.weight.astype(rows.dtype))
