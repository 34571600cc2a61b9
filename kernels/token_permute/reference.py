"""The plainest correct way: a stable argsort, plain indexing, and the gradients that JAX derives (scatters).

Letters: T tokens, D width, A assignments, M rows, E experts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .permutation import Permutation


def sort_by_expert_reference(expert: Int[Array, " A"], experts: int) -> Permutation:
    """See `sort_by_expert`. A comparison sort; the inverse is another one."""
    assignments = expert.shape[0]
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    row = jnp.argsort(order).astype(jnp.int32)
    sizes = jnp.bincount(expert, length=experts + 1)[:experts].astype(jnp.int32)
    return Permutation(
        row=jnp.where(expert < experts, row, assignments),
        assignment=jnp.where(jnp.arange(assignments) < sizes.sum(), order, assignments),
        group_sizes=sizes,
    )


def permute_reference(
    x: Float[Array, "T D"], permutation: Permutation, token: Int[Array, " A"] | None
) -> Float[Array, "M D"]:
    """See `permute`."""
    token_of_row = _spelled_out(x.shape[0], permutation, token).at[permutation.assignment]
    return x.at[token_of_row.get(mode="fill", fill_value=x.shape[0])].get(mode="fill", fill_value=0)


def unpermute_reference(
    rows: Float[Array, "M D"],
    weight: Float[Array, " A"],
    permutation: Permutation,
    tokens: int,
    token: Int[Array, " A"] | None,
) -> Float[Array, "T D"]:
    """See `unpermute`."""
    found = (permutation.row < rows.shape[0])[:, None]
    value = rows.at[permutation.row].get(mode="fill", fill_value=0).astype(jnp.float32)
    weighted = jnp.where(found, value * weight.astype(jnp.float32)[:, None], 0.0)
    y = jnp.zeros((tokens, rows.shape[1]), jnp.float32)
    return y.at[_spelled_out(tokens, permutation, token)].add(weighted).astype(rows.dtype)


def _spelled_out(tokens: int, permutation: Permutation, token: Int[Array, " A"] | None) -> Int[Array, " A"]:
    assignments = permutation.row.shape[0]
    return jnp.arange(assignments) // (assignments // tokens) if token is None else token
