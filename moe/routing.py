"""What a router is asked and what it answers: the one flat form that every routing technique fills.

Letters: T tokens (batch and sequence flattened), D width, E experts, K experts per token,
A assignments (token-expert pairs).
"""

import abc
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int


class Routing(NamedTuple):
    """Assignments of tokens to experts.

    `expert` is E where an assignment goes to nobody (padding, dropped, null); its `weight` is then 0.
    `token` is None for token-major assignments with A = T*K: assignment a belongs to token a // K.
    `logits` and `probs` are float32, whatever the dtype of the activations.
    """

    expert: Int[Array, " A"]
    weight: Float[Array, " A"]
    token: Int[Array, " A"] | None
    logits: Float[Array, "T E"]
    probs: Float[Array, "T E"]


class RoutingContext(NamedTuple):
    """What a router may know beyond the activations. A field is None where the caller has nothing to say.

    `mask` is True at real tokens and False at padding; None means that all are real.
    `key` feeds routers that draw random numbers; each layer gets its own.
    """

    mask: Bool[Array, " T"] | None = None
    token_ids: Int[Array, " T"] | None = None
    key: jax.Array | None = None
    training: bool = False


NO_CONTEXT = RoutingContext()
"""All tokens are real, nothing else is known."""


@runtime_checkable
class RouterModule(Protocol):
    """A built router: an `nnx.Module` that maps tokens to assignments."""

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, Any]:
        """Return the routing, and the new state of a router that remembers more than parameters; None: it does not."""
        ...


class Router(abc.ABC):
    """Configuration of a router. A router of your own subclasses this in your own file; nothing is registered."""

    @property
    @abc.abstractmethod
    def experts_per_token(self) -> float:
        """How many experts run for a token, on average: the share of the experts' parameters that is active."""

    @abc.abstractmethod
    def build(self, *, width: int, experts: int, key: jax.Array) -> RouterModule:
        """Build the router for tokens of `width` and `experts` experts. Raises ValueError where the two do not fit."""


def tokens_of(routing: Routing) -> Int[Array, " A"]:
    """The token of each assignment, also where the routing is token-major and does not spell it out."""
    if routing.token is not None:
        return routing.token
    tokens, assignments = routing.logits.shape[0], routing.expert.shape[0]
    return jax.numpy.arange(assignments) // (assignments // tokens)
