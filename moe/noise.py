"""Noise of routers in training, so that a token also tries experts that do not score highest.

Letters: T tokens, D width, E experts, K experts per token.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

GateMap = Callable[[Float[Array, "T D"]], Float[Array, "T E"]]
"""The linear map to a router's logits."""


class NoisyLogits(NamedTuple):
    """What a router goes on with."""

    logits: Float[Array, "T E"]
    """Their scores weigh the experts."""
    selection: Float[Array, "T E"] | None = None
    """Their scores choose the experts; None: `logits` do."""
    mean: Float[Array, "T E"] | None = None
    """Of normally distributed logits, the mean; None where the noise is of another kind."""
    deviation: Float[Array, "T E"] | None = None
    """And the standard deviation."""


@runtime_checkable
class NoiseModule(Protocol):
    """A built noise: an `nnx.Module` that takes a gate's logits and disturbs them."""

    def __call__(self, x: Float[Array, "T D"], gate: GateMap, key: jax.Array | None) -> NoisyLogits:
        """The logits of tokens x, float32, through `gate`. `key` is None outside of training: then without noise."""
        ...


@dataclass(frozen=True, kw_only=True)
class Noise(abc.ABC):
    """Configuration of a noise.

    A dataclass itself, so that the command line finds the options of what stands in an optional field.
    """

    @abc.abstractmethod
    def build(self, *, width: int, experts: int, key: jax.Array) -> NoiseModule:
        """Build it for tokens of `width` and `experts` experts."""


@dataclass(frozen=True, kw_only=True)
class Jitter(Noise):
    """The router's input times noise, uniform around 1. Fedus et al. 2021 (Switch), https://arxiv.org/abs/2101.03961,
    appendix F."""

    amount: float = 0.01
    """The factors lie between 1 - amount and 1 + amount."""

    def __post_init__(self):
        if not 0 < self.amount < 1:
            raise ValueError(f"Jitter.amount is {self.amount}; it must be above 0 and below 1")

    def build(self, *, width: int, experts: int, key: jax.Array) -> "JitterNoise":
        return JitterNoise(self)


class JitterNoise(nnx.Module):
    """Draws a factor for each token and coordinate."""

    def __init__(self, config: Jitter):
        self.config = config

    def __call__(self, x: Float[Array, "T D"], gate: GateMap, key: jax.Array | None) -> NoisyLogits:
        if key is None:
            return NoisyLogits(gate(x))
        amount = self.config.amount
        return NoisyLogits(gate(x * jax.random.uniform(key, x.shape, minval=1 - amount, maxval=1 + amount)))


@dataclass(frozen=True, kw_only=True)
class Gumbel(Noise):
    """Experts drawn instead of the best taken: the k highest of logits + temperature * Gumbel noise.

    That draws k experts without replacement, each time in proportion to exp(logit / temperature). Kool et al. 2019,
    "Stochastic Beams and Where to Find Them", https://arxiv.org/abs/1903.06059. The noise chooses; the
    weights are those of the logits without it. A bias of `balancing` is added to the scores of the noisy logits.
    """

    temperature: float = 1.0
    """0 would be plain top-k; the higher, the more even the draws."""

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"Gumbel.temperature is {self.temperature}; it must be above 0 and finite")

    def build(self, *, width: int, experts: int, key: jax.Array) -> "GumbelNoise":
        return GumbelNoise(self)


class GumbelNoise(nnx.Module):
    """Draws a number for each token and expert."""

    def __init__(self, config: Gumbel):
        self.config = config

    def __call__(self, x: Float[Array, "T D"], gate: GateMap, key: jax.Array | None) -> NoisyLogits:
        logits = gate(x)
        if key is None:
            return NoisyLogits(logits)
        return NoisyLogits(logits, logits + self.config.temperature * jax.random.gumbel(key, logits.shape))


@dataclass(frozen=True, kw_only=True)
class LearnedNoise(Noise):
    """Normal noise whose spread the router learns for each token and expert. Shazeer et al. 2017,
    https://arxiv.org/abs/1701.06538, eq. 4: H = x W_gate + normal * softplus(x W_noise).

    The noisy logits choose and weigh. W_noise is 0 at first, as in the paper's appendix A.
    """

    minimum: float = 0.01
    """Added to each deviation, so that none vanishes under a division; the paper's equation has no such term."""

    def __post_init__(self):
        if not 0 < self.minimum < math.inf:
            raise ValueError(f"LearnedNoise.minimum is {self.minimum}; it must be above 0 and finite")

    def build(self, *, width: int, experts: int, key: jax.Array) -> "LearnedNormalNoise":
        return LearnedNormalNoise(self, width=width, experts=experts)


class LearnedNormalNoise(nnx.Module):
    """A second linear map from a token, to the spread of its logits."""

    def __init__(self, config: LearnedNoise, *, width: int, experts: int):
        self.config = config
        self.kernel = nnx.Param(jnp.zeros((width, experts), jnp.float32), axes=("embed", None))

    def __call__(self, x: Float[Array, "T D"], gate: GateMap, key: jax.Array | None) -> NoisyLogits:
        spread = jnp.matmul(x, self.kernel[...].astype(jnp.float32), precision="highest")
        mean, deviation = gate(x), jax.nn.softplus(spread) + self.config.minimum
        logits = mean if key is None else mean + deviation * jax.random.normal(key, mean.shape)
        return NoisyLogits(logits, mean=mean, deviation=deviation)


def chance_of_top_k(noisy: NoisyLogits, k: int) -> Float[Array, "T E"] | None:
    """How probable it is that an expert is among the k best, were its own noise drawn anew and the others' kept.

    Shazeer et al. 2017, eq. 8-9. An expert must beat the k-th best of the others: that is the k-th best of all, or the
    next one for an expert that is among the k best itself. None where the noise is not normal.
    """
    if noisy.mean is None or noisy.deviation is None:
        return None
    if k == noisy.logits.shape[1]:
        return jnp.ones_like(noisy.mean)
    best, _ = jax.lax.top_k(noisy.logits, k + 1)
    last, next_one = best[:, k - 1 : k], best[:, k:]
    to_beat = jnp.where(noisy.logits >= last, next_one, last)
    return jax.scipy.stats.norm.cdf((noisy.mean - to_beat) / noisy.deviation)
