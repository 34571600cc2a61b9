"""Which assignment has which row: all that a kernel needs which gathers on load or scatters on store.

Letters: T tokens, D width, A assignments (token-expert pairs), M rows, E groups, C rows per group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Tokens = Int[Array, " A"] | None
"""The token of each assignment; None: token-major, assignment a is of token a // K."""


class Permutation(NamedTuple):
    """A one-to-one map between assignments and rows; either side may have members without a partner.

    Rows stand group by group. Each side knows its partner, so that both directions are gathers, and so are their
    gradients.
    """

    row: Int[Array, " A"]
    """Row of each assignment; M: it has none."""
    assignment: Int[Array, " M"]
    """Assignment of each row; A: the row is empty."""
    group_sizes: Int[Array, " E"]
    """Rows of each group, with those that are kept empty for it. Rows past the sum belong to no group."""


def fixed_groups(permutation: Permutation, capacity: int) -> Permutation:
    """Give every group `capacity` rows: M = E * C. What stands later in its group loses its row; the rest is empty.

    Args:
        permutation: groups without empty rows inside, as `sort_by_expert` makes them.
        capacity: C, at least 1.

    Raises:
        ValueError: the capacity is below 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}; it must be at least 1 row")
    sizes, assignments = permutation.group_sizes, permutation.row.shape[0]
    position = jnp.arange(capacity, dtype=jnp.int32)[None]
    old_row = (jnp.cumsum(sizes) - sizes)[:, None] + position
    old_row = jnp.where(position < sizes[:, None], old_row, permutation.assignment.shape[0]).reshape(-1)
    assignment = permutation.assignment.at[old_row].get(mode="fill", fill_value=assignments)
    return Permutation(invert(assignment, assignments), assignment, jnp.full(sizes.shape, capacity, sizes.dtype))


def invert(partner: Int[Array, " N"], others: int) -> Int[Array, " others"]:
    """The other side of a one-to-one map: who has each of the `others` as partner; N where nobody has."""
    count = partner.shape[0]
    place = jnp.arange(count, dtype=jnp.int32)
    # Who has no partner writes past the end, each to a place of its own: unique places need no atomic writes on GPU.
    place_of_partner = jnp.where(partner < others, partner, others + place)
    return jnp.full(others, count, jnp.int32).at[place_of_partner].set(place, mode="drop", unique_indices=True)


def token_of_row(tokens: int, permutation: Permutation, token: Tokens) -> Int[Array, " M"]:
    """The token of each row; `tokens` where it is empty."""
    if token is None:  # row A // K is T, past the end, where the row is empty
        return permutation.assignment // (permutation.row.shape[0] // tokens)
    return token.at[permutation.assignment].get(mode="fill", fill_value=tokens)


def sum_per_token(tokens: int, values: Float[Array, "A D"], token: Tokens) -> Float[Array, "T D"]:
    """Sum the values of each token's assignments."""
    if token is None:
        return values.reshape(tokens, -1, values.shape[1]).sum(axis=1)
    return jnp.zeros((tokens, values.shape[1]), values.dtype).at[token].add(values)


def take(array: jax.Array, index: Int[Array, " N"]) -> jax.Array:
    """Entries by index; zero past the end."""
    return array.at[index].get(mode="fill", fill_value=0)


def wide(array: jax.Array) -> jax.Array:
    """For products and sums, which run in float32 at least."""
    return array if array.dtype.itemsize >= 4 else array.astype(jnp.float32)
