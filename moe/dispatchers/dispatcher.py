"""The interface of a dispatcher: carry tokens to experts and back.

plan = dispatcher.plan(routing, context)
y = dispatcher.combine(experts(dispatcher.dispatch(x, plan), plan.group_sizes), plan)

`run` is these two lines, on one device or on each device of a mesh.
"""

import abc
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..experts import ExpertsModule
from ..placement import Placement
from ..routing import NO_CONTEXT, Routing, RoutingContext
from .on_mesh import Local, assignments_divide, local_tokens, run_on_mesh


@runtime_checkable
class Plan(Protocol):
    """What a dispatcher derives from a routing: arrays that `dispatch` and `combine` share."""

    @property
    def group_sizes(self) -> Int[Array, " E"] | None:
        """Rows of each expert where they are sorted by expert [M, D]; None for equal batches [E, C, D]."""
        ...

    @property
    def dropped(self) -> Float[Array, ""]:
        """Share of the assignments that found no place with their expert."""
        ...


class Carried(NamedTuple):
    """Tokens that were with their experts."""

    y: Float[Array, "T D"]
    dropped: Float[Array, ""]
    """Share of the assignments, of all devices, that found no place."""
    overflow: Float[Array, ""]
    """Share that found none because a device had no room to receive it: part of `dropped`."""


class Dispatcher(abc.ABC):
    """A stateless configuration that is also the algorithm: it has no parameters."""

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's place depends on later tokens."""
        return False

    def depends_on_batch(self, placement: Placement | None) -> bool:
        """Whether outside of training other tokens of the call can take a token's place. Generation refuses that."""
        return False

    def splits(self, tokens: int) -> bool:
        """Whether each `tokens` neighbours can be carried by themselves, with the same result as in one batch."""
        return False

    @abc.abstractmethod
    def plan(self, routing: Routing, context: RoutingContext = NO_CONTEXT) -> Any:
        """Derive the `Plan` of a routing; `context` is what the router was given."""

    @abc.abstractmethod
    def dispatch(self, x: Float[Array, "T D"], plan: Any) -> Float[Array, "..."]:
        """Rows for the experts: [E, C, D] or, shared by all, [1, C, D]; or [M, D] sorted by expert."""

    @abc.abstractmethod
    def combine(self, rows: Float[Array, "..."], plan: Any) -> Float[Array, "T D"]:
        """Sum the experts' rows per token, weighted by the routing. A token without an expert becomes zero."""

    def run(
        self, experts: ExpertsModule, x: Float[Array, "T D"], routing: Routing, context: RoutingContext = NO_CONTEXT
    ) -> Carried:
        """Carry the tokens to the experts and back.

        On a mesh, `context.placement`, each device does so with its own tokens and the whole of the experts' weights,
        gathered for use, where the result allows that (`splits`); else XLA splits the work over all devices.
        """
        placement = context.placement
        if placement is not None and placement.mesh.size > 1:
            local = local_tokens(x.shape[0], placement)
            if self.splits(local) and assignments_divide(routing, local):
                return Carried(*run_on_mesh(self._run_here, experts, x, routing, context, keep=()))
        return Carried(*self._run_here(experts, x, routing, context))

    def _run_here(
        self, experts: ExpertsModule, x: Float[Array, "T D"], routing: Routing, context: RoutingContext
    ) -> Local:
        plan = self.plan(routing, context)
        rows = experts(self.dispatch(x, plan), plan.group_sizes)
        return Local(self.combine(rows, plan), plan.dropped, jnp.zeros((), jnp.float32))
