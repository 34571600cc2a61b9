"""How likely a model finds the tokens that follow, without the logits of all positions at once.

Letters: B batch, S sequence, D width, V vocabulary.
"""

import jax
import optax
from jaxtyping import Array, Float, Int

from ..dynamic import divergence
from .decoder import DecoderLM
from .sequence_blocks import by_blocks


def negative_log_likelihood(
    model: DecoderLM, x: Float[Array, "B S D"], targets: Int[Array, "B S"], *, exit: int = -1
) -> Float[Array, "B S"]:
    """The nats of each target, in float32.

    Args:
        model: its configuration says at how many positions logits [V] exist at once, `Decoder.loss_block`.
        x: what enters the exit's head, see `DecoderLM.hidden`.
        targets: the token that follows each position.
        exit: whose head; by default the last layer's.
    """

    def nats(x: jax.Array, targets: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.head(x, exit), targets)

    return by_blocks(nats, model.config.loss_block, x, targets)


def exit_divergence(
    model: DecoderLM, x: Float[Array, "B S D"], last: Float[Array, "B S D"], *, exit: int
) -> Float[Array, "B S"]:
    """How far an exit's distribution is from the last exit's, in nats; the last one's is a constant."""

    def nats(x: jax.Array, last: jax.Array) -> jax.Array:
        return divergence(model.head(x, exit), model.head(last))

    return by_blocks(nats, model.config.loss_block, x, last)
