"""The interface of a dispatcher: carry tokens to experts and back.

plan = dispatcher.plan(routing, context)
y = dispatcher.combine(experts(dispatcher.dispatch(x, plan), plan.group_sizes), plan)
"""

import abc
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from ..routing import NO_CONTEXT, Routing, RoutingContext


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


class Dispatcher(abc.ABC):
    """A stateless configuration that is also the algorithm: it has no parameters."""

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's place depends on later tokens."""
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
