"""How the next token is chosen from its logits. Letters: B rows, V vocabulary."""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .filters import Filter, Temperature


@dataclass(frozen=True, kw_only=True)
class Sampler(abc.ABC):
    """Filters the logits and chooses a token of each row."""

    filters: tuple[Filter, ...] = ()
    """Applied in this order."""

    def __post_init__(self):
        if strange := [filter for filter in self.filters if not isinstance(filter, Filter)]:
            raise ValueError(f"{type(self).__name__}.filters holds {strange[0]!r}; it must hold filters")

    @property
    def needs_seen(self) -> bool:
        """Whether a filter looks at which tokens a row holds already."""
        return any(filter.needs_seen for filter in self.filters)

    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, keys: Array) -> Int[Array, " B"]:
        """One token of each row.

        Args:
            logits: float32; -infinity where a token is not to be drawn.
            seen: see `Filter`.
            keys: a PRNG key of each row [B].
        """
        for filter in self.filters:
            logits = filter(logits, seen)
        return self.choose(logits, keys)

    @abc.abstractmethod
    def choose(self, logits: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
        """One token of each row, from filtered logits."""


@dataclass(frozen=True, kw_only=True)
class Greedy(Sampler):
    """The most likely token, the first among equals."""

    def choose(self, logits: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
        return logits.argmax(axis=1).astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class Categorical(Sampler):
    """A token drawn with the probability that the softmax gives it."""

    filters: tuple[Filter, ...] = (Temperature(),)

    def choose(self, logits: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
