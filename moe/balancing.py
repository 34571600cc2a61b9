"""Balancing: how a router keeps its experts' loads even without a loss. Letters: T tokens, E experts.

`LossFree`: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
https://arxiv.org/abs/2408.15664, algorithm 1; DeepSeek-V3, https://arxiv.org/abs/2412.19437, eq. 16.
"""

import abc
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .routing import RouterState


@runtime_checkable
class BalancingModule(Protocol):
    """A built balancing: an `nnx.Module` whose `RouterState`s follow the load."""

    def selection(self, scores: Float[Array, "T E"]) -> Float[Array, "T E"]:
        """The scores by which experts are chosen. They are weighted by the scores that came in."""
        ...

    def updated(self, load: Int[Array, " E"]) -> dict[str, jax.Array]:
        """New values of this module's `RouterState`s by attribute name, after a batch with `load` assignments each."""
        ...


class Balancing(abc.ABC):
    """Configuration of a balancing."""

    @abc.abstractmethod
    def build(self, *, experts: int) -> BalancingModule:
        """Build it for `experts` experts."""


@dataclass(frozen=True, kw_only=True)
class LossFree(Balancing):
    """A bias per expert chooses and does not weigh: b += rate * sign(mean load - load), after each training batch.

    The load counts the assignments of the whole global batch, padding left out; each micro-batch of an accumulated step
    moves the bias on. A bias is added to scores between 0 and 1, as both papers have it (theirs are sigmoids).
    """

    rate: float = 0.001
    """What one batch adds to or takes from a bias."""

    def __post_init__(self):
        if not 0 < self.rate < math.inf:
            raise ValueError(f"LossFree.rate is {self.rate}; it must be above 0 and finite")

    def build(self, *, experts: int) -> "LossFreeBias":
        return LossFreeBias(self, experts=experts)


class LossFreeBias(nnx.Module):
    """One bias per expert, 0 at first."""

    def __init__(self, config: LossFree, *, experts: int):
        self.config = config
        self.bias = RouterState(jnp.zeros(experts, jnp.float32), axes=(None,))

    def selection(self, scores: Float[Array, "T E"]) -> Float[Array, "T E"]:
        return scores + self.bias[...][None]

    def updated(self, load: Int[Array, " E"]) -> dict[str, jax.Array]:
        counts = load.astype(jnp.float32)
        return {"bias": self.bias[...] + self.config.rate * jnp.sign(counts.mean() - counts)}
