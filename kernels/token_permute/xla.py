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

from .permutation import Permutation, Tokens, invert, sum_per_token, take, token_of_row, wide


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
    return take(x, token_of_row(tokens, permutation, token))


def _permute_forward(tokens, x, permutation, token):
    return _permute(tokens, x, permutation, token), (permutation, token)


def _permute_backward(tokens, residuals, gradient):
    permutation, token = residuals
    to_assignment = wide(take(gradient, permutation.row))
    return sum_per_token(tokens, to_assignment, token).astype(gradient.dtype), None, None


_permute.defvjp(_permute_forward, _permute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpermute(
    tokens: int, rows: Float[Array, "M D"], weight: Float[Array, " A"], permutation: Permutation, token: Tokens
) -> Float[Array, "T D"]:
    # The weight of whom has no row may be anything, and NaN * 0 is NaN.
    weight = jnp.where(permutation.row < rows.shape[0], weight, jnp.zeros((), weight.dtype))
    value = wide(take(rows, permutation.row))
    return sum_per_token(tokens, value * weight.astype(value.dtype)[:, None], token).astype(rows.dtype)


def _unpermute_forward(tokens, rows, weight, permutation, token):
    return _unpermute(tokens, rows, weight, permutation, token), (rows, weight, permutation, token)


def _unpermute_backward(tokens, residuals, gradient):
    rows, weight, permutation, token = residuals
    to_row = wide(take(gradient, token_of_row(tokens, permutation, token)))
    to_row *= take(weight, permutation.assignment).astype(to_row.dtype)[:, None]
    of_assignment = jnp.repeat(gradient, weight.shape[0] // tokens, axis=0) if token is None else gradient[token]
    to_weight = (wide(take(rows, permutation.row)) * wide(of_assignment)).sum(axis=1)
    return to_row.astype(rows.dtype), to_weight.astype(weight.dtype), None, None


_unpermute.defvjp(_unpermute_forward, _unpermute_backward)
