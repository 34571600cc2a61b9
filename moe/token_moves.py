"""Products of experts that take tokens as they stand: they are gathered on the way in and summed on the way out.

Letters: T tokens, D width, F hidden width, E experts, A assignments, M rows sorted by expert.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from ..kernels import Permutation, gather_matmul, matmul_combine
from ..kernels.quantized import Quantized
from .routing import Routing


class TokenMoves(NamedTuple):
    """Tokens, and which experts' rows they are: what an expert needs for its first products and for its last."""

    x: Float[Array, "T D"]
    routing: Routing
    places: Permutation
    implementation: str | None = None
    """See `kernels.gather_matmul`."""

    def enter(self, w: Float[Array, "E D F"] | Quantized) -> Float[Array, "M F"]:
        """The product of each row's token with its expert's matrix."""
        return gather_matmul(self.x, w, self.places, self.routing.token, implementation=self.implementation)

    def leave(self, rows: Float[Array, "M F"], w: Float[Array, "E F D"] | Quantized) -> Float[Array, "T D"]:
        """The products of the rows with their expert's matrix, weighted by the routing and summed per token."""
        return matmul_combine(
            rows,
            w,
            self.routing.weight,
            self.places,
            self.routing.token,
            tokens=self.x.shape[0],
            implementation=self.implementation,
        )


@runtime_checkable
class TokenExperts(Protocol):
    """Built experts that can take tokens as they stand."""

    def on_tokens(self, moves: TokenMoves) -> jax.Array:
        """Run each expert on its tokens, and return the weighted sums per token [T, D]."""
        ...
