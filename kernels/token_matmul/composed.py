"""Permute, multiply, unpermute, one op after the other: whatever a platform has for each."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..grouped_matmul import grouped_matmul
from ..quantized import Quantized
from ..token_permute import Permutation, permute, unpermute
from ..token_permute.permutation import Tokens


def gather_matmul_composed(
    x: Float[Array, "T D"], w: jax.Array | Quantized, permutation: Permutation, token: Tokens
) -> Float[Array, "M F"]:
    """See `gather_matmul`."""
    return grouped_matmul(permute(x, permutation, token), w, permutation.group_sizes)


def matmul_combine_composed(
    rows: Float[Array, "M F"],
    w: jax.Array | Quantized,
    weight: Float[Array, " A"],
    permutation: Permutation,
    tokens: int,
    token: Tokens,
) -> Float[Array, "T D"]:
    """See `matmul_combine`."""
    # A group may have rows that are kept empty, and in the gradient of w a NaN there would meet a zero.
    empty = permutation.assignment >= permutation.row.shape[0]
    rows = jnp.where(empty[:, None], jnp.zeros((), rows.dtype), rows)
    y = grouped_matmul(rows, w, permutation.group_sizes)
    return unpermute(y, weight, permutation, token, tokens=tokens)
