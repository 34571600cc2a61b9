"""The loss of a batch over all exits of a model; of one without exits, over its end.

Letters: B batch, S sequence.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...models import DecoderLM, Hidden, exit_divergence, negative_log_likelihood
from ..data import Windows, target_mask


def exits_loss(
    model: DecoderLM, hidden: Hidden, windows: Windows, progress: Float[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What training minimises, summed over the targets that count, and what is logged: "loss", the last exit's nats,
    and "loss_after_2", those of the exit after two layers.

    Args:
        model: says by `Decoder.exits` what each exit counts.
        hidden: its forward pass.
        windows: the batch.
        progress: share of the training that is done.
    """
    config, last = model.config, exit_nats(model, hidden, windows)
    if config.exits is None:
        return last, {"loss": last}
    loss, depths = config.exits.loss, config.exit_depths
    losses, logged = [], {"loss": last}
    for exit, (depth, x) in enumerate(zip(depths, hidden.exits, strict=False)):
        nats = exit_nats(model, hidden, windows, exit)
        logged[f"loss_after_{depth}"] = nats
        if loss.distilled:
            apart = _counted(exit_divergence(model, x, hidden.x, exit=exit), windows)
            nats = (1 - loss.distilled) * nats + loss.distilled * apart
        losses.append(nats)
    weights = loss.weights(depths, config.layers, progress)
    return (weights * jnp.stack([*losses, last])).sum(), logged


def exit_nats(model: DecoderLM, hidden: Hidden, windows: Windows, exit: int = -1) -> Float[Array, ""]:
    """Sum of the negative log-likelihoods, at an exit, of the targets that count."""
    targets: Any = windows.tokens[:, 1:]
    x = (*hidden.exits, hidden.x)[exit]
    return _counted(negative_log_likelihood(model, x, targets, exit=exit), windows)


def _counted(nats: jax.Array, windows: Windows) -> Float[Array, ""]:
    return jnp.where(target_mask(windows), nats, 0.0).sum()
