"""Layer dropout: in training deep layers are now and then left out, so that shallow ones learn to do without them.

Elhoushi et al. 2024 (LayerSkip), https://arxiv.org/abs/2404.16710, section 4.1; stochastic depth before it, Huang et
al. 2016, https://arxiv.org/abs/1603.09382. Letters: L layers, B rows.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class LayerDropout:
    """Layer l of L is left out for a row with the probability most * (e^(l ln2 / (L-1)) - 1), l from 0: none for the
    first, `most` for the last.

    A dropped layer is computed all the same, for shapes are static: it costs what it would.
    """

    most: float = 0.1
    """Of the last layer."""
    from_scratch: bool = True
    """Whether the probabilities grow from 0 over the training, e^(t ln2) - 1 at its share t: the paper's choice for a
    model that begins from nothing; not for one that is trained on."""

    def __post_init__(self):
        if not 0 < self.most < 1:
            raise ValueError(f"LayerDropout.most is {self.most}; it must be above 0 and below 1")

    def probability(self, layer: Int[Array, ""] | int, layers: int, progress: Float[Array, ""]) -> Float[Array, ""]:
        """Of leaving out a layer, counted from 0, after a share `progress` of the training."""
        depth = jnp.asarray(layer, jnp.float32) / max(layers - 1, 1)
        now = jnp.expm1(progress * math.log(2)) if self.from_scratch else 1.0
        return self.most * jnp.expm1(depth * math.log(2)) * now

    def kept(
        self, key: jax.Array, rows: int, layer: Int[Array, ""] | int, layers: int, progress: Float[Array, ""]
    ) -> Bool[Array, " B"]:
        """Which rows the layer runs for, drawn from a key."""
        return ~jax.random.bernoulli(key, self.probability(layer, layers, progress), (rows,))
