"""MoEfication: the hidden units of a trained dense network, grouped into experts that together are the network.

Zhang et al. 2021, "MoEfication", https://arxiv.org/abs/2110.01786: units whose input weights point in similar
directions are active together, so they are clustered into E groups of equal size, and each group becomes an expert. No
unit is copied: all experts together are the dense network, and each computes its share for the tokens sent to it.

What is clustered are the directions of a unit's weights from the input: the columns of gate where there is one, for
they decide which units are active, else of up. The router scores an expert by the cosine of the token and the mean of
its units' directions, the paper's "parameter center"; the paper's better router, trained on activations, is what
training the mixture gives.

Experts have to be summed, not averaged: the function is the dense one, exactly, if every expert counts once and all are
selected. `EqualWeights` routes so. With weights that sum to a constant the scale makes an expert count once on average.
Fewer experts than all keep as much as the activations are sparse: little for SiLU, most for ReLU. So the function is
not kept.

Differs from the paper in the clustering, see `balanced_k_means`.
"""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from ..layer import MoE
from .balanced_k_means import balanced_k_means, unit_length
from .technique import DenseWeights, ExpertWeights, Upcycling, check_scale, gate_or_refuse, output_scale


@dataclass(frozen=True, kw_only=True)
class MoEfication(Upcycling):
    """Experts are clusters of the dense network's hidden units; the function is kept where all experts are selected."""

    iterations: int = 20
    """Rounds of balanced k-means."""
    scale: float | None = None
    """Factor of the experts' output. None: an expert counts once, or once on average."""

    def __post_init__(self):
        check_scale(self, self.scale)
        if self.iterations < 1:
            raise ValueError(f"MoEfication.iterations is {self.iterations}; it must be at least 1")

    @property
    def keeps_function(self) -> bool:
        return False

    def __call__(
        self, dense: DenseWeights, gate: Float[Array, "D E"] | None, *, mixture: MoE, key: jax.Array
    ) -> tuple[ExpertWeights, Float[Array, "D E"] | None]:
        hidden, experts = dense.up.shape[1], mixture.experts
        if hidden % experts:
            raise ValueError(
                f"MoE.experts is {experts} and the dense network's hidden width {hidden}; it must be a multiple of the "
                "experts"
            )
        gate_or_refuse(gate, self, mixture)
        down = dense.down * output_scale(self.scale, mixture, parts=mixture.router.experts_per_token)
        directions = unit_length((dense.up if dense.gate is None else dense.gate).T)
        units = balanced_k_means(directions, experts, iterations=self.iterations, key=key)
        centers = unit_length(directions[units].mean(axis=1))
        weights = ExpertWeights(
            None if dense.gate is None else dense.gate[:, units].swapaxes(0, 1),
            dense.up[:, units].swapaxes(0, 1),
            down[units],
        )
        return weights, centers.T
