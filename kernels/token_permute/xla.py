"""What JAX itself offers: its sort, and gathers in both directions.

The transpose of a gather is a scatter, whose writes to one token collide on accelerators. (On CPU it is a loop, and
was faster than to gather and sum: experiments/LOG.md.) Here each row knows its assignment and each assignment its row,
so the backward pass gathers too. Only where the assignments are not token-major does the sum over a token's assignments
need a scatter. Letters: T tokens, D width, A assignments, M rows, E experts.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .permutation import Permutation, invert

Tokens = Int[Array, " A"] | None
"""The token of each assignment; None: token-major."""


def sort_by_expert_xla(expert: Int[Array, " A"], experts: int) -> Permutation:
    """See `sort_by_expert`. One sort of expert and place packed in one number, where they fit: on CPU it is 5 times
    faster than an argsort."""
    assignments = expert.shape[0]
    if (experts + 1) * assignments < 2**31:
        order = jnp.sort(expert * assignments + jnp.arange(assignments, dtype=jnp.int32)) % assignments
    else:
        order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    ends = jnp.searchsorted(expert[order], jnp.arange(experts, dtype=jnp.int32), side="right").astype(jnp.int32)
    assignment = jnp.where(jnp.arange(assignments) < ends[-1], order, assignments)
    return Permutation(invert(assignment, assignments), assignment, jnp.diff(ends, prepend=0))


def permute_xla(x: Float[Array, "T D"], permutation: Permutation, token: Tokens) -> Float[Array, "M D"]:
    """See `permute`."""
    return _permute(x.shape[0], x, permutation, token)


def unpermute_xla(
    rows: Float[Array, "M D"], weight: Float[Array, " A"], permutation: Permutation, tokens: int, token: Tokens
) -> Float[Array, "T D"]:
    """See `unpermute`."""
    return _unpermute(tokens, rows, weight, permutation, token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _permute(tokens: int, x: Float[Array, "T D"], permutation: Permutation, token: Tokens) -> Float[Array, "M D"]:
    return _take(x, _token_of_row(tokens, permutation, token))


def _permute_forward(tokens, x, permutation, token):
    return _permute(tokens, x, permutation, token), (permutation, token)


def _permute_backward(tokens, residuals, gradient):
    permutation, token = residuals
    to_assignment = _wide(_take(gradient, permutation.row))
    return _sum_per_token(tokens, to_assignment, token).astype(gradient.dtype), None, None


_permute.defvjp(_permute_forward, _permute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpermute(
    tokens: int, rows: Float[Array, "M D"], weight: Float[Array, " A"], permutation: Permutation, token: Tokens
) -> Float[Array, "T D"]:
    # The weight of whom has no row may be anything, and NaN * 0 is NaN.
    weight = jnp.where(permutation.row < rows.shape[0], weight, jnp.zeros((), weight.dtype))
    value = _wide(_take(rows, permutation.row))
    return _sum_per_token(tokens, value * weight.astype(value.dtype)[:, None], token).astype(rows.dtype)


def _unpermute_forward(tokens, rows, weight, permutation, token):
    return _unpermute(tokens, rows, weight, permutation, token), (rows, weight, permutation, token)


def _unpermute_backward(tokens, residuals, gradient):
    rows, weight, permutation, token = residuals
    to_row = _wide(_take(gradient, _token_of_row(tokens, permutation, token)))
    to_row *= _take(weight, permutation.assignment).astype(to_row.dtype)[:, None]
    of_assignment = jnp.repeat(gradient, weight.shape[0] // tokens, axis=0) if token is None else gradient[token]
    to_weight = (_wide(_take(rows, permutation.row)) * _wide(of_assignment)).sum(axis=1)
    return to_row.astype(rows.dtype), to_weight.astype(weight.dtype), None, None


_unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def _take(array: jax.Array, index: Int[Array, " N"]) -> jax.Array:
    """Entries by index; zero past the end."""
    return array.at[index].get(mode="fill", fill_value=0)


def _wide(array: jax.Array) -> jax.Array:
    """Products and sums run in float32 at least."""
    return array if array.dtype.itemsize >= 4 else array.astype(jnp.float32)


def _sum_per_token(tokens: int, values: Float[Array, "A D"], token: Tokens) -> Float[Array, "T D"]:
    if token is None:
        return values.reshape(tokens, -1, values.shape[1]).sum(axis=1)
    return jnp.zeros((tokens, values.shape[1]), values.dtype).at[token].add(values)


def _token_of_row(tokens: int, permutation: Permutation, token: Tokens) -> Int[Array, " M"]:
    if token is None:  # row A // K is T, past the end, where the row is empty
        return permutation.assignment // (permutation.row.shape[0] // tokens)
    return token.at[permutation.assignment].get(mode="fill", fill_value=tokens)
