"""Dropless dispatch: sort the assignments by expert and multiply each group by its expert's matrices.

Gale et al. 2022, "MegaBlocks", https://arxiv.org/abs/2211.15841. No capacity, no padding, nothing dropped; the cost is
that of the assignments, whatever their balance. On a mesh each device sorts its own tokens and gathers the weights of
all experts for them; where experts are many or large, let `ExpertParallel` bring the tokens to them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...kernels import Permutation, permute, sort_by_expert, unpermute
from ..routing import NO_CONTEXT, Routing, RoutingContext
from .dispatcher import Dispatcher


class DroplessPlan(NamedTuple):
    """M = A rows, sorted by expert; those of nobody stand last."""

    routing: Routing
    places: Permutation
    dropped: Float[Array, ""]

    @property
    def group_sizes(self) -> Int[Array, " E"]:
        return self.places.group_sizes


@dataclass(frozen=True, kw_only=True)
class DroplessDispatcher(Dispatcher):
    """Assignments sorted by expert, for grouped matrix multiplications."""

    def splits(self, tokens: int) -> bool:
        return True

    def plan(self, routing: Routing, context: RoutingContext = NO_CONTEXT) -> DroplessPlan:
        places = sort_by_expert(routing.expert, routing.logits.shape[1])
        return DroplessPlan(routing, places, dropped=jnp.zeros((), jnp.float32))

    def dispatch(self, x: Float[Array, "T D"], plan: DroplessPlan) -> Float[Array, "M D"]:
        return permute(x, plan.places, plan.routing.token)

    def combine(self, rows: Float[Array, "M D"], plan: DroplessPlan) -> Float[Array, "T D"]:
        routing = plan.routing
        return unpermute(rows, routing.weight, plan.places, routing.token, tokens=routing.logits.shape[0])
