"""What an upcycling technique is given and makes.

A technique is a pure function of arrays that runs under jit: the weights of one layer's dense network go in, those of
its experts and its router's gate come out. `models.upcycling` applies it to the layers of a model.

Letters: D width, F hidden width of the dense network, E experts, I hidden width of an expert.
"""

import abc
import math
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from ..layer import MoE
from ..routers import TopK
from ..scores import Softmax


class DenseWeights(NamedTuple):
    """A dense network, down(act(gate x) * up x), or down(act(up x)) where `gate` is None; without biases."""

    gate: Float[Array, "D F"] | None
    up: Float[Array, "D F"]
    down: Float[Array, "F D"]


class ExpertWeights(NamedTuple):
    """The same of E experts."""

    gate: Float[Array, "E D I"] | None
    up: Float[Array, "E D I"]
    down: Float[Array, "E I D"]


class Upcycling(abc.ABC):
    """Configuration of a technique, and the technique. One of your own subclasses this; nothing is registered."""

    @property
    @abc.abstractmethod
    def keeps_function(self) -> bool:
        """Whether the mixture begins as the function that the dense network was, by its default scale."""

    @abc.abstractmethod
    def __call__(
        self, dense: DenseWeights, gate: Float[Array, "D E"] | None, *, mixture: MoE, key: jax.Array
    ) -> tuple[ExpertWeights, Float[Array, "D E"] | None]:
        """Make experts of a dense network.

        Args:
            dense: the trained weights.
            gate: the fresh weights of the router's `Gate`; None where the router has none.
            mixture: the layer that they are for: its number of experts, and its router.
            key: randomness, of this layer alone.

        Returns:
            The experts' weights, and the gate's: those given, or others.

        Raises:
            ValueError: the sizes or the router do not fit the technique.
        """


def check_scale(technique: Upcycling, scale: float | None) -> None:
    """Refuse a scale that is not above 0 and finite."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"{type(technique).__name__}.scale is {scale}; it must be above 0 and finite, or None")


def output_scale(scale: float | None, mixture: MoE, *, parts: float = 1.0) -> float:
    """The factor of the experts' output: `scale`, or the one by which the weighted sum of a token's experts is whole.

    Args:
        scale: the user's; None: choose it.
        mixture: the layer.
        parts: over how many experts one copy of the dense network is spread.

    Raises:
        ValueError: `scale` is None, and the sum of the router's weights is not the same for every token.
    """
    if scale is not None:
        return scale
    if mixture.router.weight_sum is None:
        router, hint = mixture.router, ""
        if isinstance(router, TopK) and isinstance(router.scores, Softmax):
            uniform = router.scale * router.k / mixture.experts
            hint = f"; {parts / uniform:g} is right while all experts are equally probable"
        raise ValueError(
            f"MoE.router is {mixture.router}, whose weights have another sum for every token: no scale of the experts "
            "keeps the dense network's function. Use a router whose weights have a constant sum, as "
            f"TopK(renormalize=True), or set the technique's scale{hint}"
        )
    return parts / mixture.router.weight_sum


def gate_or_refuse(gate: Float[Array, "D E"] | None, technique: Upcycling, mixture: MoE) -> Float[Array, "D E"]:
    """The gate's weights. Raises ValueError where the router has none."""
    if gate is None:
        raise ValueError(
            f"MoE.router is {mixture.router}, which has no single Gate; {type(technique).__name__} sets the weights of "
            "one: the router must have it, as TopK does"
        )
    return gate
