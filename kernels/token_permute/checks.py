"""What is asked of the arguments of every function that moves tokens. Letters: T tokens, A assignments, M rows."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .permutation import Permutation


def check_matrix(name: str, array: jax.Array, letters: str) -> None:
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has shape {array.shape} and dtype {array.dtype}; it must be {letters}, floating")


def check_permutation(permutation: Permutation) -> None:
    for name, array in permutation._asdict().items():
        if array.ndim != 1 or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"permutation.{name} has shape {array.shape} and dtype {array.dtype}; it must be one axis of integers"
            )


def check_rows(rows: jax.Array, permutation: Permutation, letter: str) -> None:
    taken = permutation.assignment.shape[0]
    if rows.shape[0] != taken:
        raise ValueError(
            f"rows has shape {rows.shape}; the permutation has {taken} rows: it must be ({taken}, {letter})"
        )


def check_token(token: jax.Array | None, assignments: int, tokens: int) -> None:
    if token is None:
        if tokens < 0 or assignments % tokens if tokens else assignments:
            raise ValueError(
                f"token is None, with {assignments} assignments and {tokens} tokens; without it every token must have "
                "equally many assignments"
            )
        return
    if token.shape != (assignments,) or not jnp.issubdtype(token.dtype, jnp.integer):
        raise ValueError(
            f"token has shape {token.shape} and dtype {token.dtype}; the permutation has {assignments} assignments: it "
            f"must be ({assignments},), of integers"
        )
    if not isinstance(token, Tracer) and assignments:
        least, most = int(np.asarray(token).min()), int(np.asarray(token).max())
        if least < 0 or most >= tokens:
            raise ValueError(f"token holds {least if least < 0 else most}; allowed are 0 to {tokens - 1}")


def check_weight(weight: jax.Array, assignments: int) -> None:
    if weight.shape != (assignments,) or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"weight has shape {weight.shape} and dtype {weight.dtype}; the permutation has {assignments} assignments: "
            f"it must be ({assignments},), floating"
        )
