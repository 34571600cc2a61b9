"""Who is served first where places are few: the order in which assignments queue for a place with their expert.

Letters: T tokens, A assignments.
"""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...kernels import Permutation, sort_by_expert
from ..routing import Routing, tokens_of


class Order(abc.ABC):
    """The order in which a capacity gives its places. It applies within each routing group and expert."""

    @property
    def looks_ahead(self) -> bool:
        """Whether a later token can take an earlier one's place."""
        return True

    @abc.abstractmethod
    def __call__(self, routing: Routing) -> Int[Array, " A"] | None:
        """All assignments, the first to be served first; None: as they stand."""


@dataclass(frozen=True, kw_only=True)
class TokenOrder(Order):
    """Token by token, a token's best expert first: no token loses its place to a later one, and nothing is sorted."""

    @property
    def looks_ahead(self) -> bool:
        return False

    def __call__(self, routing: Routing) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class FirstChoicesFirst(Order):
    """All first choices before any second, and so on; among equal choices by token. Lepikhin et al. 2020 (GShard),
    https://arxiv.org/abs/2006.16668, algorithm 1."""

    def __call__(self, routing: Routing) -> Int[Array, " A"]:
        return _sorted_by(choices(routing))


@dataclass(frozen=True, kw_only=True)
class BatchPriority(Order):
    """All first choices before any second, and so on; among equal choices the tokens of the largest probability first.

    Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts", https://arxiv.org/abs/2106.05974, algorithm 2
    with the score max_e g(x)_e: what a small capacity drops are the tokens of which the router expects the least. g are
    the router's probabilities, not its weights, which renormalised are no measure between tokens.
    """

    def __call__(self, routing: Routing) -> Int[Array, " A"]:
        largest = jax.lax.stop_gradient(routing.probs).max(axis=1)
        return _sorted_by(choices(routing), -largest[tokens_of(routing)])


def in_order(queue: Int[Array, " A"], queues: int, order: Int[Array, " A"] | None) -> Permutation:
    """Sort the assignments by the queue that they stand in, and within one by `order`; None: as they stand."""
    if order is None:
        return sort_by_expert(queue, queues)
    ordered, assignments = sort_by_expert(queue[order], queues), queue.shape[0]
    row = jnp.zeros_like(ordered.row).at[order].set(ordered.row, unique_indices=True)
    return ordered._replace(row=row, assignment=order.at[ordered.assignment].get(mode="fill", fill_value=assignments))


def choices(routing: Routing) -> Int[Array, " A"]:
    """Whether an assignment is its token's first, 0, its second, 1, and so on, as they stand in the routing.

    Routers whose tokens choose put a token's best expert first.
    """
    assignments, tokens = routing.expert.shape[0], routing.logits.shape[0]
    if routing.token is None:
        return jnp.arange(assignments, dtype=jnp.int32) % (assignments // tokens)
    by_token = sort_by_expert(routing.token, tokens)
    first = jnp.cumsum(by_token.group_sizes) - by_token.group_sizes
    return by_token.row - first[routing.token]


def _sorted_by(*keys: Int[Array, " A"] | Float[Array, " A"]) -> Int[Array, " A"]:
    """The assignments by rising keys, the first key first, and as they stand where all are equal."""
    place = jnp.arange(keys[0].shape[0], dtype=jnp.int32)
    return jax.lax.sort((*keys, place), num_keys=len(keys))[-1]
