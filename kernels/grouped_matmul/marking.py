"""Group sizes that are traced cannot be checked: where they break their bounds, the result says so."""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int


def marked(y: Float[Array, "N F"], group_sizes: Int[Array, " E"], rows: int) -> Float[Array, "N F"]:
    """The same, with NaN in one element where traced group sizes are negative or sum to more than `rows`."""
    if not isinstance(group_sizes, Tracer):
        return y
    return _mark(y, jnp.any(group_sizes < 0) | (jnp.sum(group_sizes) > rows))


@jax.custom_vjp
def _mark(y: Float[Array, "N F"], broken: jax.Array) -> Float[Array, "N F"]:
    """Put NaN into one element where `broken`. The gradient passes untouched: a copy of it would not be free."""
    # A row is written, not an element: beside one, XLA of jaxlib 0.10.2 put wrong numbers where a mesh splits F.
    first = jnp.arange(y.shape[1]) == 0
    return y.at[0].set(jnp.where(broken & first, jnp.full((), jnp.nan, y.dtype), y[0]))


_mark.defvjp(lambda y, broken: (_mark(y, broken), None), lambda _, dy: (dy, None))
