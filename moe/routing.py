"""What a router is asked and what it answers: the one flat form that every routing technique fills.

Letters: T tokens (batch and sequence flattened), D width, E experts, K experts per token,
A assignments (token-expert pairs).
"""

import abc
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from .placement import Placement


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
    chance: Float[Array, "T E"] | None = None
    """How probable it is, over the router's noise, that the token goes to each expert: a smooth stand-in for the load.
    None where the router adds no noise of known spread."""
    loss: Float[Array, ""] | None = None
    """What the router itself adds to the task's loss, its coefficient applied; None: nothing."""
    cut_off: Int[Array, ""] | None = None
    """How many assignments the router left out to stay within its static bound A; None: it has to leave out none."""
    group: int | None = None
    """Where `token` is given: the assignments stand in groups, each of so many neighbouring tokens; None: in one."""


class RoutingContext(NamedTuple):
    """What a router may know beyond the activations. A field is None where the caller has nothing to say.

    `mask` is True at real tokens and False at padding; None means that all are real.
    `key` feeds routers that draw random numbers; each layer gets its own.
    `sequence_length` is how many neighbours among the T tokens are one sequence; the layer fills it in.
    `placement` says how tokens and weights lie on a mesh; None: on one device, or as XLA sees fit.
    """

    mask: Bool[Array, " T"] | None = None
    token_ids: Int[Array, " T"] | None = None
    key: jax.Array | None = None
    training: bool = False
    sequence_length: int | None = None
    placement: Placement | None = None


NO_CONTEXT = RoutingContext()
"""All tokens are real, nothing else is known."""


class RouterState(nnx.Variable):
    """What a router remembers besides parameters: a balance bias, an adaptive coefficient, a table.

    Checkpointed with the parameters and never seen by the optimizer. A call does not change it: the router returns the
    new value, computed from the load of the whole global batch, and the owner of the model stores it after the step,
    `layer.update_router_state(stats.router_state)` or `model.update_router_states(output.stats)`.
    """


@runtime_checkable
class RouterModule(Protocol):
    """A built router: an `nnx.Module` that maps tokens to assignments."""

    def __call__(
        self, x: Float[Array, "T D"], context: RoutingContext
    ) -> tuple[Routing, Mapping[str, jax.Array] | None]:
        """Return the routing, and new values of the router's `RouterState`s; None: nothing is new.

        The values go by attribute name; those of a module that the router holds by its path, "balancing.bias".
        """
        ...


class Router(abc.ABC):
    """Configuration of a router. A router of your own subclasses this in your own file; nothing is registered."""

    @property
    @abc.abstractmethod
    def experts_per_token(self) -> float:
        """How many experts run for a token, on average: the share of the experts' parameters that is active."""

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's experts depend on later tokens. A causal decoder refuses that unless told otherwise."""
        return False

    @property
    def depends_on_batch(self) -> bool:
        """Whether outside of training a token's experts or weights depend on the other tokens of the call, or on its
        place among them. Generation refuses that: a request would depend on its neighbours."""
        return False

    @property
    def has_chance(self) -> bool:
        """Whether its routings hold `chance`, which the load loss needs."""
        return False

    @property
    def vocabulary(self) -> int | None:
        """How many token ids it knows, where it looks at them; None: it does not."""
        return None

    @property
    def weight_sum(self) -> float | None:
        """The sum of a token's weights, where it is the same for every token, up to rounding; None where it is not."""
        return None

    @abc.abstractmethod
    def build(self, *, width: int, experts: int, key: jax.Array) -> RouterModule:
        """Build the router for tokens of `width` and `experts` experts. Raises ValueError where the two do not fit."""


def check_choices(config: Router, experts: int, *fields: str) -> None:
    """Refuse a router that sends a token to more experts than there are; the fields say to how many, None to all."""
    for field in fields:
        choices = getattr(config, field)
        if choices is not None and choices > experts:
            raise ValueError(
                f"{type(config).__name__}.{field} is {choices}; with {experts} experts it must be at most {experts}"
            )


def padding_to_nobody(
    expert: Int[Array, "T *K"], weight: Float[Array, "T *K"], mask: Bool[Array, " T"] | None, experts: int
) -> tuple[Int[Array, "T *K"], Float[Array, "T *K"]]:
    """Send what belongs to padding to nobody, expert E, with weight 0."""
    if mask is None:
        return expert, weight
    real = mask.reshape(-1, *[1] * (expert.ndim - 1))
    return jnp.where(real, expert, experts), jnp.where(real, weight, 0.0)


def tokens_of(routing: Routing) -> Int[Array, " A"]:
    """The token of each assignment, also where the routing is token-major and does not spell it out."""
    if routing.token is not None:
        return routing.token
    tokens, assignments = routing.logits.shape[0], routing.expert.shape[0]
    return jnp.arange(assignments) // (assignments // tokens)


def assignment_counts(routing: Routing) -> Int[Array, " E"]:
    """How many assignments each expert got, before any dispatcher drops some."""
    experts = jnp.arange(routing.logits.shape[1], dtype=routing.expert.dtype)
    return (routing.expert[:, None] == experts[None]).sum(axis=0, dtype=jnp.int32)
