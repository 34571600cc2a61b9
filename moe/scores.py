"""Scores: what a router makes of its logits before it selects experts. Letters: T tokens, E experts."""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Scores(abc.ABC):
    """A function from a token's logits to its experts' scores."""

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, "T E"]) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
        """The scores, by which experts are chosen and weighted, and the same as probabilities, which sum to 1."""


@dataclass(frozen=True, kw_only=True)
class Softmax(Scores):
    """Experts compete for a token: the scores are probabilities."""

    def __call__(self, logits: Float[Array, "T E"]) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
        probs = jax.nn.softmax(logits, axis=-1)
        return probs, probs


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Scores):
    """Every expert is scored on its own, from 0 to 1. DeepSeek-V3, https://arxiv.org/abs/2412.19437, eq. 15.

    Statistics and balance losses see the scores divided by their sum, as the paper's eq. 18 has it.
    """

    def __call__(self, logits: Float[Array, "T E"]) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
        scores = jax.nn.sigmoid(logits)
        return scores, normalized(scores)


def normalized(scores: Float[Array, "T N"]) -> Float[Array, "T N"]:
    """Scores over their sum; zero where all of a token's scores are so small that they are 0."""
    return scores / jnp.maximum(scores.sum(axis=-1, keepdims=True), jnp.finfo(scores.dtype).tiny)
