"""Sparse upcycling: every expert begins as the dense network.

Komatsuzaki et al. 2022, "Sparse Upcycling", https://arxiv.org/abs/2212.05055. The router begins fresh.

A token's experts are equal, so their weighted sum is the dense output times the sum of the weights. Where that sum is
constant (`Router.weight_sum`) it is divided out, and the function is kept to float tolerance, for tokens that no
dispatcher drops. Elsewhere there is no such factor, and the technique asks for one: E / K is right
while all experts are equally probable (He et al. 2024, https://arxiv.org/abs/2410.07524).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..layer import MoE
from .technique import DenseWeights, ExpertWeights, Upcycling, check_scale, output_scale


@dataclass(frozen=True, kw_only=True)
class Copy(Upcycling):
    """Every expert is a copy of the dense network, the router is fresh; the function is kept."""

    scale: float | None = None
    """Factor of the experts' output. None: the one that keeps the function, where the router has one."""

    def __post_init__(self):
        check_scale(self, self.scale)

    @property
    def keeps_function(self) -> bool:
        return self.scale is None

    def __call__(
        self, dense: DenseWeights, gate: Float[Array, "D E"] | None, *, mixture: MoE, key: jax.Array
    ) -> tuple[ExpertWeights, Float[Array, "D E"] | None]:
        dense = dense._replace(down=dense.down * output_scale(self.scale, mixture))
        return copies(dense, mixture.experts), gate


def copies(dense: DenseWeights, experts: int) -> ExpertWeights:
    """The dense network, `experts` times."""

    def repeated(weight: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.broadcast_to(weight[None], (experts, *weight.shape))

    gate = None if dense.gate is None else repeated(dense.gate)
    return ExpertWeights(gate, repeated(dense.up), repeated(dense.down))
