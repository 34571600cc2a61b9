"""Rotary positions, and how models stretch them to longer texts than they were trained on.

Su et al. 2021, "RoFormer", https://arxiv.org/abs/2104.09864. A head of width P holds P/2 pairs of numbers; pair i is
turned by position * theta^(-2i/P) radians. A `RotaryScaling` changes these frequencies.

Letters: B batch, S sequence, N heads, P head width.
"""

import abc
import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .precision import wide


@dataclass(frozen=True, kw_only=True)
class RotaryScaling(abc.ABC):
    """A change of the frequencies. A dataclass, so that the command line shows the fields of what may be None."""

    @property
    def magnitude(self) -> float:
        """Factor on what was turned."""
        return 1.0

    @abc.abstractmethod
    def frequencies(self, theta: float, width: int, positions: Int[Array, "B S"]) -> Float[Array, "#B half"]:
        """Radians per position of each pair: the same for every row, or one set for each."""


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RotaryScaling):
    """All positions are divided by a factor. Chen et al. 2023, https://arxiv.org/abs/2306.15595."""

    factor: float
    """How many times longer the text may be."""

    def __post_init__(self):
        _check_factor(self, self.factor)

    def frequencies(self, theta: float, width: int, positions: Int[Array, "B S"]) -> Float[Array, "#B half"]:
        return _constant(plain_frequencies(theta, width) / self.factor)


@dataclass(frozen=True, kw_only=True)
class DynamicNTK(RotaryScaling):
    """A row longer than the trained length gets a larger theta, the larger the longer it is, by u/emozilla 2023 after
    "NTK-aware" scaling, u/bloc97 2023; both cited in YaRN, https://arxiv.org/abs/2309.00071, section 3.3.

    A row's length is its last position plus 1, and other rows do not matter (transformers takes the longest row of the
    batch). While decoding, earlier keys keep the turn that they got, there and here.
    """

    factor: float
    """Stretch at which the formula would reach linear scaling."""
    trained: int
    """Length in tokens up to which nothing changes."""

    def __post_init__(self):
        _check_factor(self, self.factor)
        _check_trained(self, self.trained)

    def frequencies(self, theta: float, width: int, positions: Int[Array, "B S"]) -> Float[Array, "#B half"]:
        if width < 4:
            raise ValueError(f"DynamicNTK needs heads of width 4 or more; the width is {width}")
        length = jnp.maximum(positions.max(axis=1) + 1, self.trained).astype(jnp.float32)
        stretch = self.factor * length / self.trained - (self.factor - 1)
        base = theta * stretch ** (width / (width - 2))
        exponent = jnp.asarray(np.arange(0, width, 2, dtype=np.float32) / width)
        return base[:, None] ** -exponent[None]


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RotaryScaling):
    """Low frequencies are divided by a factor, high ones stay, those between are mixed. Llama 3.1, Grattafiori et al.
    2024, https://arxiv.org/abs/2407.21783, and the released code."""

    factor: float
    trained: int
    """Length in tokens of the first training."""
    low: float = 1.0
    """Pairs that turn fewer times than this in the trained length are divided."""
    high: float = 4.0
    """Pairs that turn more often than this stay."""

    def __post_init__(self):
        _check_factor(self, self.factor)
        _check_trained(self, self.trained)
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"Llama3Scaling.low is {self.low} and high {self.high}; it must be 0 < low < high")

    def frequencies(self, theta: float, width: int, positions: Int[Array, "B S"]) -> Float[Array, "#B half"]:
        plain = plain_frequencies(theta, width)
        turns = self.trained * plain / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return _constant(plain * (kept + (1 - kept) / self.factor))


@dataclass(frozen=True, kw_only=True)
class Yarn(RotaryScaling):
    """Each pair between its own frequency and that of linear scaling, by how often it turns in the trained length; and
    sharper attention. Peng et al. 2023, https://arxiv.org/abs/2309.00071."""

    factor: float
    trained: int
    """Length in tokens of the first training."""
    fast: float = 32.0
    """Pairs that turn more often than this keep their frequency."""
    slow: float = 1.0
    """Pairs that turn less often than this are divided by the factor."""
    whole_pairs: bool = True
    """Round the bounds between pairs to whole pairs (not in gpt-oss)."""
    attention: float | None = None
    """Factor on queries and on keys; None: 0.1 ln(factor) + 1, as the paper has it."""

    def __post_init__(self):
        _check_factor(self, self.factor)
        _check_trained(self, self.trained)
        if not 0 < self.slow < self.fast < math.inf:
            raise ValueError(f"Yarn.slow is {self.slow} and fast {self.fast}; it must be 0 < slow < fast")
        if self.attention is not None and not 0 < self.attention < math.inf:
            raise ValueError(f"Yarn.attention is {self.attention}; it must be above 0 and finite, or None")

    @property
    def magnitude(self) -> float:
        return yarn_magnitude(self.factor) if self.attention is None else self.attention

    def frequencies(self, theta: float, width: int, positions: Int[Array, "B S"]) -> Float[Array, "#B half"]:
        plain = plain_frequencies(theta, width)
        first, last = (self._pair(turns, theta, width) for turns in (self.fast, self.slow))
        if self.whole_pairs:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        last = last + 0.001 if first == last else last
        divided = np.clip((np.arange(width // 2) - first) / (last - first), 0.0, 1.0)
        return _constant(plain * (1 - divided) + plain / self.factor * divided)

    def _pair(self, turns: float, theta: float, width: int) -> float:
        """The number of the pair, not whole, that turns so often in the trained length."""
        return width * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(theta))


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """0.1 * weight * ln(factor) + 1, and 1 where nothing is stretched."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def plain_frequencies(theta: float, width: int) -> np.ndarray:
    """theta^(-2i/P) of each pair, in float64: rounded once, they are the same on every platform."""
    return float(theta) ** -(np.arange(0, width, 2) / width)


def rotate(
    x: Float[Array, "B S N P"], positions: Int[Array, "B S"], theta: float, scaling: RotaryScaling | None = None
) -> Float[Array, "B S N P"]:
    """Turn each head by its position, in Llama's layout: the pairs are numbers i and i + P/2. Computed in float32 or
    wider."""
    half = x.shape[-1] // 2
    plain = _constant(plain_frequencies(theta, x.shape[-1]))
    frequency = plain if scaling is None else scaling.frequencies(theta, x.shape[-1], positions)
    frequency = jnp.broadcast_to(frequency, (positions.shape[0], half)).astype(wide(x))
    angle = jnp.einsum("bs,bf->bsf", positions.astype(frequency.dtype), frequency)[:, :, None, :]
    magnitude = 1.0 if scaling is None else scaling.magnitude
    cosine, sine = magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)
    first, second = x[..., :half].astype(wide(x)), x[..., half:].astype(wide(x))
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


def _constant(frequencies: np.ndarray) -> Float[Array, "1 half"]:
    return jnp.asarray(frequencies[None], jnp.float32)


def _check_factor(config: RotaryScaling, factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise ValueError(f"{type(config).__name__}.factor is {factor}; it must be at least 1 and finite")


def _check_trained(config: RotaryScaling, trained: int) -> None:
    if trained < 1:
        raise ValueError(f"{type(config).__name__}.trained is {trained}; it must be at least 1 token")
