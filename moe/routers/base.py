"""BASE: tokens are shared out evenly among the experts, as well as possible for all of them together.

Lewis et al. 2021, "BASE Layers: Simplifying Training of Large, Sparse Models", https://arxiv.org/abs/2103.16716. The
assignment is found as in the paper, by the auction algorithm of Bertsekas 1992; here the tokens bid, and an expert's
places are equal objects that go to the highest bids.

Letters: T tokens, D width, E experts, G routing groups, N tokens of a group.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..routing import Router, Routing, RoutingContext, padding_to_nobody
from ..routing_groups import check_routing_group, in_groups, real_in_groups
from ..scores import Sigmoid
from .gate import Gate


@dataclass(frozen=True, kw_only=True)
class BASE(Router):
    """In training every expert gets N / E tokens of a routing group, and the sum of the logits is the largest possible;
    else a token goes to its largest logit.

    The weight is the sigmoid of the chosen expert's logit, through which the router learns. Where E does not divide
    the number of real tokens N, no expert gets more than N / E rounded up. A balance loss is not needed:
    `MoE(losses=())`.

    In training a token's expert depends on later tokens; at inference it does not, and nothing balances the load.
    `looks_ahead` is True for the sake of training. The paper shuffles tokens between workers before it assigns; here a
    routing group is of neighbours.
    """

    tolerance: float = 0.01
    """The least raise of a bid, over the spread of the logits. The mean logit of the assignment is at most this share
    of the spread below the best one's, and a smaller tolerance takes more iterations."""
    iterations: int = 1000
    """The most rounds of bids. Tokens without an expert by then, few if any, fill the places that are left in order."""
    routing_group: int | None = None
    """Neighbouring tokens that are shared out among the experts; None: the whole batch, of all devices."""

    def __post_init__(self):
        if not 1e-5 <= self.tolerance <= 1:
            # Below, a raise would be lost in the rounding of float32.
            raise ValueError(f"BASE.tolerance is {self.tolerance}; it must be from 1e-5 to 1")
        if self.iterations < 1:
            raise ValueError(f"BASE.iterations is {self.iterations}; it must be at least 1")
        check_routing_group(self, self.routing_group)

    @property
    def experts_per_token(self) -> float:
        return 1.0

    @property
    def looks_ahead(self) -> bool:
        return True

    def build(self, *, width: int, experts: int, key: jax.Array) -> "BASERouter":
        return BASERouter(self, width=width, experts=experts, key=key)


class BASERouter(nnx.Module):
    """A linear map to expert logits, and an auction in training."""

    def __init__(self, config: BASE, *, width: int, experts: int, key: jax.Array):
        self.config = config
        self.gate = Gate(width=width, experts=experts, key=key)

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, None]:
        logits = self.gate(x)
        scores, probs = Sigmoid()(logits)
        tokens, experts = logits.shape
        expert = self._shared_out(logits, context) if context.training else jnp.argmax(logits, axis=1)
        weight = jnp.take_along_axis(scores, expert[:, None], axis=1)[:, 0]
        expert, weight = padding_to_nobody(expert, weight, context.mask, experts)
        return Routing(expert, weight, None, logits, probs), None

    def _shared_out(self, logits: Float[Array, "T E"], context: RoutingContext) -> Int[Array, " T"]:
        tokens, group = logits.shape[0], self.config.routing_group
        values, real = in_groups(jax.lax.stop_gradient(logits), group), real_in_groups(context, tokens, group)
        limits = {"tolerance": self.config.tolerance, "iterations": self.config.iterations}
        expert = jax.vmap(functools.partial(balanced_assignment, **limits))(values, real)
        return expert.reshape(-1)[:tokens]


class Auction(NamedTuple):
    """How the auction stands."""

    expert: Int[Array, " N"]
    """Whose place the token holds; E: nobody's."""
    bid: Float[Array, " N"]
    """What it offered for the place."""
    price: Float[Array, " E"]
    """The lowest offer that holds a place, 0 while places are free."""
    rounds: Int[Array, ""]


# Compiled as one, so that a call outside of jit does not compile its loop anew.
@functools.partial(jax.jit, static_argnames=("tolerance", "iterations"))
def balanced_assignment(
    values: Float[Array, "N E"], real: Bool[Array, " N"], *, tolerance: float, iterations: int
) -> Int[Array, " N"]:
    """Give each real token an expert, no expert more than its even share rounded up, and a sum of values near the most.

    In each round every token without a place bids for the expert that is worth most to it at the present prices: as
    much as leaves it with what the second best is worth, and a little more. An expert keeps the highest bids that it
    has places for. Prices only rise, so a token never regrets its place by more than the little; in sum that bounds the
    distance to the optimum (Bertsekas 1992).

    Args:
        values: of each expert to each token.
        real: False at padding, which gets no place.
        tolerance: the little, as a share of the spread of the values.
        iterations: the most rounds.

    Returns:
        The expert of each token, 0 to E - 1 (arbitrary at padding).
    """
    tokens, experts = values.shape
    if experts == 1:
        return jnp.zeros(tokens, jnp.int32)
    places = -(-real.sum(dtype=jnp.int32) // experts)
    # What is the same for all of a token's experts plays no part; without it, less is lost to rounding.
    values = values - values.max(axis=1, keepdims=True)
    spread = -jnp.where(real[:, None], values, 0.0).min()
    raise_by = jnp.maximum(tolerance * spread, jnp.finfo(jnp.float32).tiny)

    def bidding(auction: Auction) -> Bool[Array, ""]:
        return (real & (auction.expert == experts)).any() & (auction.rounds < iterations)

    def bid(auction: Auction) -> Auction:
        (best, second), choice = (a.T for a in jax.lax.top_k(values - auction.price[None], 2))
        offer = auction.price[choice[0]] + (best - second) + raise_by
        bids = real & (auction.expert == experts)
        expert = jnp.where(bids, choice[0], auction.expert)
        offer = jnp.where(bids, offer, auction.bid)
        # Sorted by expert and falling offer, so that an expert's first places are taken by whom it keeps.
        queue, falling, token = jax.lax.sort((expert, -offer, jnp.arange(tokens, dtype=jnp.int32)), num_keys=2)
        start, end = (jnp.searchsorted(queue, jnp.arange(experts), side=side) for side in ("left", "right"))
        position = jnp.arange(tokens) - start.at[queue].get(mode="fill", fill_value=0)
        kept = jnp.where(position < places, queue, experts)
        price = jnp.where(end - start >= places, -falling[jnp.minimum(start + places - 1, tokens - 1)], 0.0)
        expert = jnp.zeros_like(expert).at[token].set(kept, unique_indices=True)
        return Auction(expert, offer, price, auction.rounds + 1)

    opening = Auction(
        jnp.full(tokens, experts, jnp.int32), jnp.zeros(tokens), jnp.zeros(experts), jnp.zeros((), jnp.int32)
    )
    return _fill(jax.lax.while_loop(bidding, bid, opening).expert, real, places, experts)


def _fill(expert: Int[Array, " N"], real: Bool[Array, " N"], places: Int[Array, ""], experts: int) -> Int[Array, " N"]:
    """Give the tokens that are still without a place the free ones, in order."""
    held = (expert[:, None] == jnp.arange(experts)[None]).sum(axis=0, dtype=jnp.int32)
    waiting = real & (expert == experts)
    turn = jnp.cumsum(waiting, dtype=jnp.int32) - 1
    free = jnp.searchsorted(jnp.cumsum(places - held), turn, side="right").astype(jnp.int32)
    return jnp.minimum(jnp.where(waiting, free, expert), experts - 1)
