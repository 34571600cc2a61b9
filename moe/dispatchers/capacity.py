"""Capacity dispatch: every expert has a fixed number of places per routing group; what finds none is dropped.

Lepikhin et al. 2020 (GShard), https://arxiv.org/abs/2006.16668; Fedus et al. 2021 (Switch Transformer),
https://arxiv.org/abs/2101.03961. Static shapes and equal batches on every device, at the price of dropped assignments
and of places that stay empty.

By default places are given in the order of the assignments: token by token, a token's best expert first. So no token
loses its place to a later one, and a causal model stays causal. Other orders are in order.py (GShard's gives all first
choices a place before any second). Rows of a batch that share a routing group compete all the same: with a routing
group of one sequence's length they do not.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ...kernels import Permutation, fixed_groups, permute, unpermute
from ..placement import Placement
from ..routing import NO_CONTEXT, Routing, RoutingContext, tokens_of
from ..routing_groups import check_routing_group
from .dispatcher import Dispatcher
from .order import Order, TokenOrder, in_order


class CapacityPlan(NamedTuple):
    """M = E * groups * C rows: expert by expert, and within an expert group by group."""

    routing: Routing
    places: Permutation
    dropped: Float[Array, ""]
    group_sizes: None = None


@dataclass(frozen=True, kw_only=True)
class CapacityDispatcher(Dispatcher):
    """Static buffers of C places per expert and routing group."""

    capacity_factor: float = 1.25
    """Places per expert, as a multiple of an even share of the group's assignments."""
    evaluation_capacity_factor: float | None = None
    """The same where `context.training` is False (ST-MoE: 1.25 in training, 2.0 here); None: as in training."""
    routing_group: int | None = None
    """Tokens that compete for the same places, so that drops do not depend on the mesh; None: the whole batch."""
    order: Order = TokenOrder()
    """Who gets a place first."""

    def __post_init__(self):
        for name in ("capacity_factor", "evaluation_capacity_factor"):
            factor = getattr(self, name)
            if factor is not None and not 0 < factor < math.inf:
                raise ValueError(f"CapacityDispatcher.{name} is {factor}; it must be above 0 and finite")
        check_routing_group(self, self.routing_group)

    @property
    def looks_ahead(self) -> bool:
        return self.order.looks_ahead

    def depends_on_batch(self, placement: Placement | None) -> bool:
        return self.routing_group != 1  # a token alone sends one assignment to an expert, which has a place at least

    def splits(self, tokens: int) -> bool:
        return self.routing_group is not None and tokens % self.routing_group == 0

    def capacity(self, *, tokens: int, assignments: int, experts: int, training: bool = True) -> int:
        """C, places per expert and group, for a batch of T tokens with A assignments, padding included; never more than
        a group's assignments."""
        evaluation = self.evaluation_capacity_factor
        factor = self.capacity_factor if training or evaluation is None else evaluation
        group = tokens if self.routing_group is None else min(self.routing_group, tokens)
        sent = -(-assignments * group // tokens)
        wanted = math.ceil(round(min(factor, experts) * sent / experts, 6))  # 1.1 * 10 is a bit above 11
        return min(max(1, wanted), sent)

    def plan(self, routing: Routing, context: RoutingContext = NO_CONTEXT) -> CapacityPlan:
        (tokens, experts), assignments = routing.logits.shape, routing.expert.shape[0]
        capacity = self.capacity(tokens=tokens, assignments=assignments, experts=experts, training=context.training)
        group_of = tokens_of(routing) // (self.routing_group or tokens)
        groups = -(-tokens // (self.routing_group or tokens))
        queues = experts * groups
        # Assignments queue for their expert within their group; nobody's queue is the last.
        queue = jnp.where(routing.expert < experts, routing.expert * groups + group_of, queues)
        queued = in_order(queue, queues, self.order(routing))
        length = queued.group_sizes
        dropped = jnp.maximum(length - capacity, 0).sum().astype(jnp.float32)
        share = dropped / jnp.maximum(length.sum(), 1).astype(jnp.float32)
        return CapacityPlan(routing, fixed_groups(queued, capacity), share)

    def dispatch(self, x: Float[Array, "T D"], plan: CapacityPlan) -> Float[Array, "E C D"]:
        experts = plan.routing.logits.shape[1]
        return permute(x, plan.places, plan.routing.token).reshape(experts, -1, x.shape[1])

    def combine(self, rows: Float[Array, "E C D"], plan: CapacityPlan) -> Float[Array, "T D"]:
        routing, rows = plan.routing, rows.reshape(-1, rows.shape[2])
        return unpermute(rows, routing.weight, plan.places, routing.token, tokens=routing.logits.shape[0])
