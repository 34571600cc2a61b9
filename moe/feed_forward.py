"""The slot of a transformer block that a dense network or a mixture of experts fills."""

import abc
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from .placement import Placement
from .routing import NO_CONTEXT, Routing, RoutingContext
from .telemetry import MoEStats

Tap = Callable[[str, Float[Array, "..."], Routing | None], Any]
"""`tap(path, activations, routing)` looks at what enters a module; what it returns, the forward pass hands back."""


def no_tap(path: str, activations: Float[Array, "..."], routing: Routing | None) -> None:
    """The tap of everyday: it looks at nothing."""


@runtime_checkable
class FeedForwardModule(Protocol):
    """A built feed-forward network: an `nnx.Module` from width to width."""

    def __call__(
        self, x: Float[Array, "*batch D"], context: RoutingContext = NO_CONTEXT, tap: Tap = no_tap
    ) -> tuple[Float[Array, "*batch D"], MoEStats | None]:
        """The output and the layer's statistics; None where there is nothing to route.

        Calls `tap("ffn", x, routing)` once. Routing sees the tokens flattened, T = the product of the batch axes.
        """
        ...


@runtime_checkable
class LayerPattern(Protocol):
    """Chooses the feed-forward network of each layer of a model. A `FeedForward` chooses itself."""

    def at(self, layer: int) -> "FeedForward":
        """The network of layer `layer`, counted from 0."""
        ...


class FeedForward(abc.ABC):
    """Configuration of a feed-forward network."""

    def at(self, layer: int) -> "FeedForward":
        """The network of every layer, as a `LayerPattern`: this one."""
        return self

    @property
    def active_fraction(self) -> float:
        """Share of the parameters with the logical axis "expert" that runs for one token."""
        return 1.0

    def flops_fraction(self, sequence_length: int) -> float:
        """FLOPs of those parameters per token of a sequence, over what they would be if all ran once for each token."""
        return self.active_fraction

    def mixing_flops(self, width: int) -> float:
        """FLOPs per token of matrix products without parameters, which mix tokens of `width`."""
        return 0.0

    @property
    def vocabulary(self) -> int | None:
        """How many token ids it knows, where it looks at them; None: it does not."""
        return None

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's output depends on later tokens."""
        return False

    def batch_dependence(self, placement: Placement | None) -> str | None:
        """What makes a token's output outside of training depend on the other tokens of the call, by name; None:
        nothing does. Generation refuses it."""
        return None

    @abc.abstractmethod
    def build(self, *, width: int, key: jax.Array) -> FeedForwardModule:
        """Build the network for tokens of `width`."""
