"""Capacity all-to-all: every device sends every expert an equal batch, full or not.

Lepikhin et al. 2020 (GShard), https://arxiv.org/abs/2006.16668. Static shapes and equal batches, at the price of
dropped assignments and of places that travel empty. Per device and direction it moves E * G * C * D numbers of which
(N - 1) / N leave the device. Letters: T tokens of the device, D width, E experts, N devices that share them, G
routing groups of the device, C places per expert and group.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...experts import ExpertsModule
from ...routing import Routing, RoutingContext
from ..capacity import CapacityDispatcher
from ..on_mesh import Local
from .exchange import Exchange, ExpertAxes


@dataclass(frozen=True, kw_only=True)
class AllToAll(Exchange):
    """Equal batches for every expert, from every device."""

    capacity: CapacityDispatcher = CapacityDispatcher()
    """Who gets a place. Its routing group may be None, which here means one sequence, or must divide a device's tokens:
    drops then do not depend on the mesh."""

    def local(self, context: RoutingContext) -> CapacityDispatcher:
        return replace(self.capacity, routing_group=self.capacity.routing_group or context.sequence_length)

    def check(self, tokens: int, context: RoutingContext) -> None:
        local = self.local(context)
        if not local.splits(tokens):
            raise ValueError(
                f"AllToAll.capacity has routing groups of {local.routing_group} tokens; it must divide the {tokens} "
                "tokens of a device, or what is dropped would depend on the mesh"
            )

    def run(
        self,
        experts: ExpertsModule,
        x: Float[Array, "T D"],
        routing: Routing,
        context: RoutingContext,
        axes: ExpertAxes,
    ) -> Local:
        capacity = self.local(context)
        plan = capacity.plan(routing, context)
        batches = capacity.dispatch(x, plan)  # [E, G * C, D]
        received = jax.lax.all_to_all(batches, axes.names, 0, 1, tiled=True)  # [E / N, N * G * C, D]
        returned = jax.lax.all_to_all(experts(received, None), axes.names, 1, 0, tiled=True)
        return Local(capacity.combine(returned, plan), plan.dropped, jnp.zeros((), jnp.float32))
