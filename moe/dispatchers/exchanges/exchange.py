"""The interface of an exchange: what `ExpertParallel` calls on every device, inside `jax.shard_map`."""

import abc
from typing import NamedTuple

from jaxtyping import Array, Float

from ...experts import ExpertsModule
from ...routing import Routing, RoutingContext
from ..dispatcher import Dispatcher
from ..on_mesh import Local


class ExpertAxes(NamedTuple):
    """The mesh axes that experts are split over, taken as one: device i of N holds the i-th E / N of the experts."""

    names: tuple[str, ...]
    devices: int


class Exchange(abc.ABC):
    """Carries tokens to the devices of their experts and back. A configuration without parameters."""

    @abc.abstractmethod
    def local(self, context: RoutingContext) -> Dispatcher:
        """What it comes to where all experts are on one device."""

    @abc.abstractmethod
    def check(self, tokens: int, context: RoutingContext) -> None:
        """Refuse a device's batch of so many tokens, with a ValueError, where the mesh would change the result."""

    def may_overflow(self, devices: int) -> bool:
        """Whether one of so many devices that share the experts may have no room for what the others send it."""
        return False

    @abc.abstractmethod
    def run(
        self,
        experts: ExpertsModule,
        x: Float[Array, "T D"],
        routing: Routing,
        context: RoutingContext,
        axes: ExpertAxes,
    ) -> Local:
        """Carry this device's T tokens.

        Args:
            experts: the E / N experts that this device holds.
            x: its tokens.
            routing: its assignments, to any of the E experts.
            context: the length of the sequences and `training`.
            axes: where the other experts are.
        """
