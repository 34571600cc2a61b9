"""The loss of a model with exits: what each exit's loss counts.

Letters: N exits, the last layer's among them; L layers.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class ExitLoss(abc.ABC):
    """Weights of the exits' losses. One of your own derives from this: a frozen dataclass."""

    @abc.abstractmethod
    def weights(self, depths: Sequence[int], layers: int, progress: Float[Array, ""]) -> Float[Array, " N"]:
        """Weights with sum 1.

        Args:
            depths: layers that run before each exit, ascending; the last is `layers`.
            layers: L.
            progress: share of the training that is done, 0 to 1.
        """

    @property
    def distilled(self) -> float:
        """Share of the loss of each exit but the last that is its divergence from the last exit's distribution."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class DepthWeighted(ExitLoss):
    """Weights in proportion to depth, as CALM trains: Schuster et al. 2022, https://arxiv.org/abs/2207.07061, eq. 6."""

    def weights(self, depths: Sequence[int], layers: int, progress: Float[Array, ""]) -> Float[Array, " N"]:
        return _normalised(jnp.asarray(depths, jnp.float32))


@dataclass(frozen=True, kw_only=True)
class LayerSkipLoss(ExitLoss):
    """The weights and the curriculum of LayerSkip: Elhoushi et al. 2024, https://arxiv.org/abs/2404.16710, section 4.1.

    A layer's weight grows with the sum of the numbers up to it; the last layer's besides with L. In the gradual
    curriculum deep exits take part first, and one more at equal steps until half of the training, when all do.
    """

    scale: float = 0.2
    """e_scale, of the exits before the last."""
    gradual: bool = True
    """Whether the exits come one by one. The paper's other curriculum, in which they take turns, is not here."""

    def __post_init__(self):
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"LayerSkipLoss.scale is {self.scale}; it must be finite and at least 0")

    def weights(self, depths: Sequence[int], layers: int, progress: Float[Array, ""]) -> Float[Array, " N"]:
        values = [self.scale * sum(range(depth)) for depth in depths[:-1]]
        values.append(layers - 1 + self.scale * sum(range(layers - 1)))
        weights = jnp.asarray(values, jnp.float32)
        if not self.gradual:
            return _normalised(weights)
        # Of N - 1 early exits, the n-th from the deepest begins after n / (N - 1) of the first half.
        order = jnp.arange(len(depths), 0, -1, dtype=jnp.float32) - 1
        begins = 0.5 * order / max(len(depths) - 1, 1)
        return _normalised(jnp.where(progress >= begins, weights, 0.0))


@dataclass(frozen=True, kw_only=True)
class SelfDistilled(ExitLoss):
    """Exits learn from the last exit besides from the data: Phuong and Lampert 2019, "Distillation-Based Training for
    Multi-Exit Architectures"; the last exit's distribution is a constant to them."""

    weighting: ExitLoss = DepthWeighted()
    """How much each exit counts."""
    share: float = 0.5
    """Of an exit's loss, what is divergence from the last exit; the rest is the data's."""

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"SelfDistilled.share is {self.share}; it must be above 0 and at most 1")

    @property
    def distilled(self) -> float:
        return self.share

    def weights(self, depths: Sequence[int], layers: int, progress: Float[Array, ""]) -> Float[Array, " N"]:
        return self.weighting.weights(depths, layers, progress)


def divergence(logits: Float[Array, "... V"], teacher: Float[Array, "... V"]) -> Float[Array, "..."]:
    """KL(teacher || exit) in nats; the teacher is a constant."""
    wanted = jax.nn.log_softmax(jax.lax.stop_gradient(teacher))
    return (jnp.exp(wanted) * (wanted - jax.nn.log_softmax(logits))).sum(axis=-1)


def _normalised(weights: Float[Array, " N"]) -> Float[Array, " N"]:
    return weights / weights.sum()
