"""The importance loss: experts should weigh the same in sum. Letters: T tokens, E experts."""

import abc
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..routing import Routing, RoutingContext
from .loss import RouterLoss
from .scope import GlobalBatch, Parts, Scope


class Importance(abc.ABC):
    """What is summed over tokens as an expert's importance."""

    @abc.abstractmethod
    def __call__(self, routing: Routing, parts: Parts) -> Float[Array, "parts E"]:
        """The importance of each expert in each part of the batch."""


@dataclass(frozen=True, kw_only=True)
class Gates(Importance):
    """The weights of the assignments, zero for experts that were not selected. Shazeer et al. 2017, eq. 6."""

    def __call__(self, routing: Routing, parts: Parts) -> Float[Array, "parts E"]:
        return parts.assigned(routing, routing.weight.astype(jnp.float32))


@dataclass(frozen=True, kw_only=True)
class Probabilities(Importance):
    """The router's probabilities of all experts, selected or not. Riquelme et al. 2021 (V-MoE),
    https://arxiv.org/abs/2106.05974."""

    def __call__(self, routing: Routing, parts: Parts) -> Float[Array, "parts E"]:
        return parts.total(routing.probs)


@dataclass(frozen=True, kw_only=True)
class ImportanceLoss(RouterLoss):
    """Squared coefficient of variation of the experts' importance. Shazeer et al. 2017,
    https://arxiv.org/abs/1701.06538, eq. 6-7. It is 0 when all experts weigh the same, and E - 1 when one has all.

    The same importance may come from few tokens with large weights or many with small ones: the paper adds `LoadLoss`,
    and V-MoE takes the mean of the two.
    """

    coefficient: float = 0.01
    of: Importance = Gates()
    """What an expert's importance is the sum of."""
    scope: Scope = GlobalBatch()
    """The tokens that the importance is summed over."""

    def __call__(self, routing: Routing, context: RoutingContext) -> Float[Array, ""]:
        parts = self.scope.parts(routing, context)
        return parts.join(squared_variation(self.of(routing, parts)))


def squared_variation(values: Float[Array, "parts E"]) -> Float[Array, " parts"]:
    """Variance over the squared mean of each row; zero for zeros."""
    square = jnp.square(values.mean(axis=1))
    return values.var(axis=1) / jnp.maximum(square, jnp.finfo(values.dtype).tiny)
