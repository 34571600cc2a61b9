"""How sure an exit is of its answer. Letters: B rows, V classes or tokens, D width."""

import abc
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Confidence(abc.ABC):
    """A score of each row in [0, 1]; a row leaves where it is at least the threshold."""

    def memory(self, rows: int, width: int) -> Any:
        """What is remembered of each row from one exit to the next: a pytree of arrays with leading axis `rows`."""
        return ()

    @abc.abstractmethod
    def score(
        self, exit: int, logits: Float[Array, "B V"], hidden: Float[Array, "B D"], memory: Any
    ) -> tuple[Float[Array, " B"], Any]:
        """The scores at an exit, and what is to be remembered; at the first exit nothing is remembered yet."""


@dataclass(frozen=True, kw_only=True)
class Top2Gap(Confidence):
    """The difference of the two largest probabilities: "softmax response" in CALM, Schuster et al. 2022,
    https://arxiv.org/abs/2207.07061."""

    def score(
        self, exit: int, logits: Float[Array, "B V"], hidden: Float[Array, "B D"], memory: Any
    ) -> tuple[Float[Array, " B"], Any]:
        probs = jax.nn.softmax(logits)
        first = probs.argmax(axis=1)
        others = jnp.where(jnp.arange(probs.shape[1])[None] == first[:, None], 0.0, probs)  # top_k is slow on CPU
        return probs.max(axis=1) - others.max(axis=1), memory
