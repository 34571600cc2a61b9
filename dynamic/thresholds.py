"""What a confidence is held against: one threshold, one of each exit, or one that sinks along an answer.

Letters: B rows.
"""

import abc
import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Thresholds(abc.ABC):
    """The threshold of a row. One of your own derives from this: a frozen dataclass."""

    @abc.abstractmethod
    def at(self, exit_index: Int[Array, " B"], position: Int[Array, " B"]) -> Float[Array, " B"]:
        """float32 thresholds of rows at an exit, from 0, and a token of their answer, from 0. Runs under `jax.jit`."""

    @property
    def exits(self) -> int | None:
        """How many exits before the last it is made for; None: any number."""
        return None

    def check_exits(self, exits: int) -> None:
        """Refuse a model with so many exits before the last, if it is made for another number."""
        if self.exits not in (None, exits):
            raise ValueError(f"thresholds are {self}, of {self.exits} exits; the model has {exits} before the last")


@dataclass(frozen=True, kw_only=True)
class NeverExit(Thresholds):
    """No score is high enough: the full model."""

    def at(self, exit_index: Int[Array, " B"], position: Int[Array, " B"]) -> Float[Array, " B"]:
        return jnp.full(exit_index.shape, jnp.inf, jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Constant(Thresholds):
    """One for all."""

    threshold: float

    def __post_init__(self):
        check_threshold("Constant.threshold", self.threshold)

    def at(self, exit_index: Int[Array, " B"], position: Int[Array, " B"]) -> Float[Array, " B"]:
        return jnp.full(exit_index.shape, self.threshold, jnp.float32)


@dataclass(frozen=True, kw_only=True)
class PerExit(Thresholds):
    """One of each exit but the last."""

    thresholds: tuple[float, ...]
    """inf: none leaves there."""

    def __post_init__(self):
        if not self.thresholds:
            raise ValueError("PerExit.thresholds is (); it needs one of each exit but the last")
        for threshold in self.thresholds:
            if threshold != math.inf:
                check_threshold("PerExit.thresholds", threshold)

    @property
    def exits(self) -> int:
        return len(self.thresholds)

    def at(self, exit_index: Int[Array, " B"], position: Int[Array, " B"]) -> Float[Array, " B"]:
        values = jnp.asarray(self.thresholds, jnp.float32)
        # Past the last, where all leave anyway, an index must not read another exit's.
        return values.at[exit_index].get(mode="fill", fill_value=0.0)


@dataclass(frozen=True, kw_only=True)
class Decaying(Thresholds):
    """clip(0.9 threshold + 0.1 exp(-tau t / N)): strict at first, where an error would spread along the answer.

    Schuster et al. 2022 (CALM), https://arxiv.org/abs/2207.07061, eq. 5; t the token, N the longest answer.
    """

    threshold: float
    tau: float = 4.0
    length: int
    """N, tokens."""

    def __post_init__(self):
        check_threshold("Decaying.threshold", self.threshold)
        if not 0 <= self.tau < math.inf:
            raise ValueError(f"Decaying.tau is {self.tau}; it must be finite and at least 0")
        if self.length < 1:
            raise ValueError(f"Decaying.length is {self.length}; it must be at least 1 token")

    def at(self, exit_index: Int[Array, " B"], position: Int[Array, " B"]) -> Float[Array, " B"]:
        strict = jnp.exp(-self.tau * position.astype(jnp.float32) / self.length)
        return jnp.clip(0.9 * self.threshold + 0.1 * strict, 0.0, 1.0)


def check_threshold(name: str, value: float) -> None:
    """
    Raises:
        ValueError: it is not between 0 and 1.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be 0 to 1, the range of every confidence")
