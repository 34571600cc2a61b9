"""How inputs are changed in training, so that a model does not learn them by heart.

Letters: B rows, S tokens.
"""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ...models.text_classifier import PADDING
from ..data.labelled_text import UNKNOWN


class Augmentation(abc.ABC):
    """Changes a batch of inputs at random. One of your own derives from this: a frozen dataclass."""

    @abc.abstractmethod
    def __call__(self, key: jax.Array, inputs: Array) -> Array:
        """The changed inputs, of the same shape and dtype; runs inside of the jitted step."""


@dataclass(frozen=True)
class NoChange(Augmentation):
    """Inputs as they are."""

    def __call__(self, key: jax.Array, inputs: Array) -> Array:
        return inputs


@dataclass(frozen=True, kw_only=True)
class RandomShift(Augmentation):
    """Images [B, height, width, channels] moved by up to some pixels each way; zeros come in."""

    most: int = 2
    """Pixels."""

    def __post_init__(self):
        if self.most < 1:
            raise ValueError(f"RandomShift.most is {self.most}; it must be at least 1 pixel")

    def __call__(self, key: jax.Array, inputs: Array) -> Array:
        rows, height, width, channels = inputs.shape
        edge = (self.most, self.most)
        padded = jnp.pad(inputs, ((0, 0), edge, edge, (0, 0)))
        starts = jax.random.randint(key, (rows, 2), 0, 2 * self.most + 1)

        def moved(image: Array, start: Array) -> Array:
            return jax.lax.dynamic_slice(image, (start[0], start[1], 0), (height, width, channels))

        return jax.vmap(moved)(padded, starts)


@dataclass(frozen=True, kw_only=True)
class WordDropout(Augmentation):
    """Tokens [B, S] become the unknown one now and then: Iyyer et al. 2015, "Deep Unordered Composition Rivals
    Syntactic Methods for Text Classification", where they are left out."""

    share: float = 0.1
    """Of the tokens."""

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"WordDropout.share is {self.share}; it must be above 0 and below 1")

    def __call__(self, key: jax.Array, inputs: Array) -> Array:
        dropped = jax.random.bernoulli(key, self.share, inputs.shape) & (inputs != PADDING)
        return jnp.where(dropped, UNKNOWN, inputs)
