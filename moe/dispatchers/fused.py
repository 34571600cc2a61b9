"""Dropless dispatch without a dispatch: the experts' own products gather tokens and sum them up again.

Tan et al. 2024, "Scattered Mixture-of-Experts Implementation" (ScatterMoE), https://arxiv.org/abs/2403.08245. The
result is that of `DroplessDispatcher`. What is saved is the copy of the tokens in their experts' order, forward and
backward; on which chips that wins is to be measured (`dynamoe bench moe_layer`): no default before.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..experts import ExpertsModule
from ..routing import Routing, RoutingContext
from ..token_moves import TokenExperts, TokenMoves
from .dropless import DroplessDispatcher
from .on_mesh import Local


@dataclass(frozen=True, kw_only=True)
class FusedDispatcher(DroplessDispatcher):
    """As dropless, for experts that take tokens as they stand (`TokenExperts`): `SwiGLU` and `GELU` do."""

    implementation: str | None = None
    """Of the products that move tokens, see `kernels.gather_matmul`; none: the platform's best."""

    def _run_here(
        self, experts: ExpertsModule, x: Float[Array, "T D"], routing: Routing, context: RoutingContext
    ) -> Local:
        if not isinstance(experts, TokenExperts):
            raise ValueError(
                f"experts are {type(experts).__name__}; FusedDispatcher needs such with a method on_tokens, as those "
                "of SwiGLU and GELU: take DroplessDispatcher"
            )
        named = getattr(getattr(experts, "config", None), "implementation", None)
        if named is not None:
            raise ValueError(
                f"the experts' implementation is {named!r}; with FusedDispatcher it is none, for its own is what counts"
            )
        plan = self.plan(routing, context)
        y = experts.on_tokens(TokenMoves(x, routing, plan.places, self.implementation))
        return Local(y, plan.dropped, jnp.zeros((), jnp.float32))
