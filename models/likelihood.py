"""How likely a model finds the tokens that follow, without the logits of all positions at once.

Letters: B batch, S sequence, D width, V vocabulary.
"""

import jax
import optax
from jaxtyping import Array, Float, Int

from .decoder import DecoderLM
from .sequence_blocks import by_blocks


def negative_log_likelihood(
    model: DecoderLM, x: Float[Array, "B S D"], targets: Int[Array, "B S"]
) -> Float[Array, "B S"]:
    """The nats of each target, in float32.

    Args:
        model: its configuration says at how many positions logits [V] exist at once, `Decoder.loss_block`.
        x: what leaves the last layer, `DecoderLM.hidden`.
        targets: the token that follows each position.
    """

    def nats(x: jax.Array, targets: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.head(x), targets)

    return by_blocks(nats, model.config.loss_block, x, targets)
