"""How a classifier makes one vector of a sequence. Letters: B rows, S tokens, D width."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Pooling(abc.ABC):
    """Makes the vector that a head reads, of the normed tokens."""

    class_token: ClassVar[bool]
    """Whether a learned token stands before all others."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "B S D"], real: Bool[Array, "B S"]) -> Float[Array, "B D"]:
        """The vector of each row; `real` is False at padding."""


@dataclass(frozen=True)
class MeanPool(Pooling):
    """The mean of the real tokens; zeros where there is none."""

    class_token = False

    def __call__(self, x: Float[Array, "B S D"], real: Bool[Array, "B S"]) -> Float[Array, "B D"]:
        kept = jnp.where(real[..., None], x, jnp.zeros((), x.dtype))
        count = jnp.maximum(real.sum(axis=1, keepdims=True), 1).astype(x.dtype)
        return kept.sum(axis=1) / count


@dataclass(frozen=True)
class ClassToken(Pooling):
    """A learned token that stands first and gathers what it needs: Devlin et al. 2018 (BERT),
    https://arxiv.org/abs/1810.04805, and the vision transformer."""

    class_token = True

    def __call__(self, x: Float[Array, "B S D"], real: Bool[Array, "B S"]) -> Float[Array, "B D"]:
        return x[:, 0]
