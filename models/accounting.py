"""Parameters and active FLOPs per token of a decoder, by part.

Active FLOPs are the matrix multiplications of one token's forward pass through everything that runs for it: attention,
router, its share of the experts, head; not norms, softmax and other pointwise work, nor the embedding's look-up.
A multiplication and an addition count as two. Attention scores count the whole sequence S, as the masked kernels run.
Heads of exits before the last do not run for a token that goes to the end: they have parameters, none active.
Where experts work on mixtures of a sequence's tokens, all their parameters are active, at the cost of the mixtures.
"""

import math
from typing import NamedTuple, cast

import jax
from flax import nnx

from .decoder import Decoder

_FEED_FORWARD = ("router", "experts", "latent projections", "shared experts", "residual network", "ffn")


class Part(NamedTuple):
    """Costs of one part of a model."""

    name: str
    parameters: int
    active_parameters: float
    """Of those, what runs for one token; not whole where experts per token are a mean."""
    flops: float
    """Per token, forward."""


def count_parts(config: Decoder, sequence_length: int) -> list[Part]:
    """Count a model's parts: embedding, attention, attention scores, feed-forward networks, norms, head.

    Args:
        config: the model.
        sequence_length: S, which attention scores depend on.

    Returns:
        The parts that the model has, in this order, then "total".

    Raises:
        ValueError: the sequence length is below 1.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length is {sequence_length}; it must be at least 1 token")
    model = nnx.eval_shape(lambda: config.build(jax.random.key(0), stacked=False))
    order = ("embedding", "attention", "attention scores", *_FEED_FORWARD, "norms", "exit heads", "head")
    totals: dict[str, list[float]] = {name: [0, 0, 0] for name in order}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        shape, axes = variable.get_value().shape, variable.get_metadata().get("axes") or ()
        name = _part(path, axes)
        size = math.prod(shape)
        ffn = config.feed_forwards[cast(int, path[1])] if name == "experts" else None
        active = size * (ffn.active_fraction if ffn else 1.0)
        run = size * (ffn.flops_fraction(sequence_length) if ffn else 1.0)
        entry = totals[name]
        entry[0] += size
        if name == "exit heads":
            continue
        entry[1] += active
        # A vector, one per expert or one for all, is a bias or a scale: it takes part in no matrix multiplication.
        matrix = len(shape) - ("expert" in axes) >= 2 and not str(path[-1]).endswith("bias")
        entry[2] += 2 * run if matrix and name != "embedding" else 0
    scores = (attention.score_flops(config.width, sequence_length) for attention in config.attentions)
    totals["attention scores"][2] = sum(scores)
    totals["router"][2] += sum(ffn.mixing_flops(config.width) for ffn in config.feed_forwards)
    if config.tied:
        totals["head"][2] = 2 * config.vocab * config.width
    parts = [Part(name, int(total), active, flops) for name, (total, active, flops) in totals.items() if total or flops]
    total = Part(
        "total",
        sum(part.parameters for part in parts),
        sum(part.active_parameters for part in parts),
        sum(part.flops for part in parts),
    )
    return [*parts, total]


def _part(path: tuple, axes: tuple) -> str:
    if path[0] == "embedding":
        return "embedding"
    if path[0] == "exit_heads":
        return "exit heads"
    if path[0] == "head_kernel":
        return "head"
    if path[-1] == "scale":
        return "norms"
    if "attention" in path:
        return "attention"
    if "router" in path:
        return "router"
    if "latent" in path:
        return "latent projections"
    if "shared" in path:
        return "shared experts"
    if "residual" in path:
        return "residual network"
    return "experts" if "experts" in path or "expert" in axes else "ffn"
