"""Dropless dispatch: sort the assignments by expert and multiply each group by its expert's matrices.

Gale et al. 2022, "MegaBlocks", https://arxiv.org/abs/2211.15841. No capacity, no padding, nothing dropped; the cost is
that of the assignments, whatever their balance. On several devices XLA gathers the tokens of all to sort them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..routing import Routing, assignment_counts
from .dispatcher import Dispatcher
from .rows import Places, combine_rows, gather_rows, stable_order


class DroplessPlan(NamedTuple):
    """M = A rows, sorted by expert; those of nobody stand last."""

    routing: Routing
    places: Places
    group_sizes: Int[Array, " E"]
    dropped: Float[Array, ""]


@dataclass(frozen=True, kw_only=True)
class DroplessDispatcher(Dispatcher):
    """Assignments sorted by expert, for grouped matrix multiplications."""

    def plan(self, routing: Routing) -> DroplessPlan:
        assignments, experts = routing.expert.shape[0], routing.logits.shape[1]
        order = stable_order(routing.expert, experts)
        row = jnp.zeros_like(order).at[order].set(jnp.arange(assignments), unique_indices=True)
        group_sizes = assignment_counts(routing)
        taken = jnp.arange(assignments) < group_sizes.sum()
        places = Places(
            row=jnp.where(routing.expert < experts, row, assignments),
            assignment=jnp.where(taken, order, assignments),
        )
        return DroplessPlan(routing, places, group_sizes, dropped=jnp.zeros((), jnp.float32))

    def dispatch(self, x: Float[Array, "T D"], plan: DroplessPlan) -> Float[Array, "M D"]:
        return gather_rows(x, plan.routing, plan.places)

    def combine(self, rows: Float[Array, "M D"], plan: DroplessPlan) -> Float[Array, "T D"]:
        return combine_rows(rows, plan.routing, plan.places)
