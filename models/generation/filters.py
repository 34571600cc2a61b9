"""Filters of the logits that the next token is drawn from.

Each does what the processor of that name does in Hugging Face transformers,
https://huggingface.co/docs/transformers/internal/generation_utils. They apply in the order given; theirs is repetition
penalty, temperature, top-k, top-p, min-p. A token that is filtered out has the logit -infinity.

Letters: B rows, V vocabulary.
"""

import abc
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Filter(abc.ABC):
    """A filter of your own derives from this: a frozen dataclass, for compiled functions are kept by it."""

    @property
    def needs_seen(self) -> bool:
        """Whether it looks at which tokens a row holds already."""
        return False

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None) -> Float[Array, "B V"]:
        """Filtered logits, each row by itself.

        Args:
            logits: float32.
            seen: the tokens of each row's prompt and of what was drawn after it; None where no filter needs them.
        """


@dataclass(frozen=True, kw_only=True)
class Temperature(Filter):
    """Divides the logits."""

    value: float = 0.8

    def __post_init__(self):
        if not 0 < self.value < math.inf:
            raise ValueError(f"Temperature.value is {self.value}; it must be above 0 and finite (0 is Greedy)")

    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None) -> Float[Array, "B V"]:
        return logits / self.value


@dataclass(frozen=True, kw_only=True)
class TopKTokens(Filter):
    """Keeps the k most likely tokens, and those as likely as the k-th. Fan et al. 2018,
    https://arxiv.org/abs/1805.04833."""

    k: int = 50

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"TopKTokens.k is {self.k}; it must be at least 1")

    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None) -> Float[Array, "B V"]:
        lowest = jax.lax.top_k(logits, min(self.k, logits.shape[1]))[0][:, -1:]
        return jnp.where(logits < lowest, -jnp.inf, logits)


@dataclass(frozen=True, kw_only=True)
class TopPTokens(Filter):
    """Keeps the fewest most likely tokens that reach probability p together. Holtzman et al. 2020 (nucleus sampling),
    https://arxiv.org/abs/1904.09751."""

    p: float = 0.9

    def __post_init__(self):
        if not 0 < self.p <= 1:
            raise ValueError(f"TopPTokens.p is {self.p}; it must be above 0 and at most 1")

    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None) -> Float[Array, "B V"]:
        ascending = jnp.sort(logits, axis=1)
        below = jnp.cumsum(jax.nn.softmax(ascending, axis=1), axis=1)
        # A token goes where those up to it, the least likely, hold at most 1 - p; the most likely one stays.
        kept = (below > 1 - self.p).at[:, -1].set(True)
        lowest = jnp.where(kept, ascending, jnp.inf).min(axis=1, keepdims=True)
        return jnp.where(logits < lowest, -jnp.inf, logits)


@dataclass(frozen=True, kw_only=True)
class MinPTokens(Filter):
    """Keeps the tokens that are at least p times as probable as the most probable one. Nguyen et al. 2024,
    https://arxiv.org/abs/2407.01082."""

    p: float = 0.05

    def __post_init__(self):
        if not 0 < self.p <= 1:
            raise ValueError(f"MinPTokens.p is {self.p}; it must be above 0 and at most 1")

    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None) -> Float[Array, "B V"]:
        # Of the logarithms: probabilities would underflow, and need a sum.
        lowest = logits.max(axis=1, keepdims=True) + math.log(self.p)
        return jnp.where(logits < lowest, -jnp.inf, logits)


@dataclass(frozen=True, kw_only=True)
class RepetitionPenalty(Filter):
    """Makes tokens less likely that stand in the prompt or were drawn: divides a positive logit, multiplies a negative
    one. Keskar et al. 2019 (CTRL), https://arxiv.org/abs/1909.05858."""

    penalty: float = 1.1

    def __post_init__(self):
        if not 0 < self.penalty < math.inf:
            raise ValueError(f"RepetitionPenalty.penalty is {self.penalty}; it must be above 0 and finite")

    @property
    def needs_seen(self) -> bool:
        return True

    def __call__(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None) -> Float[Array, "B V"]:
        assert seen is not None
        penalized = jnp.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return jnp.where(seen, penalized, logits)
