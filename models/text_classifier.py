"""A bidirectional transformer that puts texts into classes: an encoder as BERT's, Devlin et al. 2018,
https://arxiv.org/abs/1810.04805, with rotary positions.

    TextClassifier(vocab=8000, length=64, classes=2, exits=Exits(after=(1, 2)))

Letters: B texts, S tokens, D width, V here the vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from .classifier import Classifier, Inputs, Vectors
from .linear import look_up

PADDING = -1
"""The token id of padding."""


@dataclass(frozen=True, kw_only=True)
class TextClassifier(Classifier):
    """Configuration of a text classifier."""

    vocab: int = 264
    """Vocabulary size V."""
    length: int = 64
    """Tokens S of a text: shorter ones are padded, longer ones cut where they are read."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("vocab", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"TextClassifier.{name} is {getattr(self, name)}; it must be at least 1")
        for layer, ffn in enumerate(self.feed_forwards):
            if ffn.vocabulary is not None and ffn.vocabulary < self.vocab:
                raise ValueError(
                    f"TextClassifier.ffn of layer {layer} knows {ffn.vocabulary} token ids, and TextClassifier.vocab "
                    f"is {self.vocab}: it must know at least as many"
                )

    def build_inputs(self, key: jax.Array) -> "Embedding":
        return Embedding(self, key)

    def example(self, rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, self.length), jnp.int32)


class Embedding(Inputs):
    """A table [V, D]."""

    def __init__(self, config: TextClassifier, key: jax.Array):
        self.table = nnx.Param(jax.random.normal(key, (config.vocab, config.width)), axes=("vocab", "embed"))

    def __call__(self, inputs: Int[Array, "B S"]) -> Vectors:
        """Vectors of token ids, `PADDING` behind them; a token outside the vocabulary becomes NaN, so that it shows."""
        real = inputs != PADDING
        tokens = jnp.where(real, inputs, 0)
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        return Vectors(look_up(self.table[...], tokens), positions, real, tokens)
