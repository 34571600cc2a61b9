"""What runs a model's layers over whole sequences, for the decoder and the classifiers alike.

Letters: B batch, S sequence, D width, T = B * S tokens.
"""

import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..dynamic import LayerDropout
from ..moe import FeedForward, MoEStats, RoutingContext, Tap
from .block import Block, BlockConfig, Recorder, run_segment
from .layers import Segment, stack, unstack
from .self_attention import SelfAttention
from .sharding import Layout

_DROPOUT_STREAM = 0xD801
"""Folded into the key of a layer for its dropout, away from its router's noise."""


@runtime_checkable
class LayersConfig(BlockConfig, Protocol):
    """What running the layers reads of a model's configuration."""

    @property
    def layers(self) -> int: ...
    @property
    def exit_depths(self) -> tuple[int, ...]: ...
    @property
    def layer_dropout(self) -> LayerDropout | None: ...
    @property
    def remat(self) -> bool: ...
    @property
    def unroll(self) -> int: ...


class Sequences(NamedTuple):
    """Where the tokens of a batch stand, and who sees whom."""

    positions: Int[Array, "B S"]
    mask: Bool[Array, "B S S"]
    """Whether a token (second axis) sees another (third)."""
    real: Bool[Array, "B S"]
    """False at padding."""
    token_ids: Int[Array, "B S"] | None = None
    """For routers that look at them."""


class Hidden(NamedTuple):
    """A forward pass up to the head."""

    x: Float[Array, "B S D"]
    """What leaves the last layer, not yet normalised."""
    stats: tuple[MoEStats | None, ...]
    """Of each layer; None where its feed-forward network is dense."""
    taps: dict[str, Any]
    """What the tap returned, by path: "layers.0.attention", "layers.0.ffn", ..., "head"."""
    exits: tuple[Float[Array, "B S D"], ...] = ()
    """What enters the head of each exit before the last."""


def layer_kinds(
    attentions: Sequence[SelfAttention], ffns: Sequence[FeedForward], exit_depths: Sequence[int]
) -> tuple[tuple[SelfAttention, FeedForward, int], ...]:
    """What each layer is made of, and how many exits stand before it: layers of equal kind may be stacked."""
    before = [bisect.bisect_right(exit_depths, layer) for layer in range(len(ffns))]
    return tuple(zip(attentions, ffns, before, strict=True))


def run_layers(
    config: LayersConfig,
    segments: Sequence[Segment],
    x: Float[Array, "B S D"],
    sequences: Sequences,
    *,
    key: jax.Array | None,
    training: bool,
    tap: Tap | None,
    layout: Layout | None,
    progress: Float[Array, ""] | float,
) -> Hidden:
    """All layers, from what the embedding made to what enters the heads; arguments as of `DecoderLM.hidden`."""
    constrain: Callable[[jax.Array], jax.Array] = (lambda x: x) if layout is None else layout.constrain
    ids = sequences.token_ids
    flat = RoutingContext(
        mask=sequences.real.reshape(-1),
        token_ids=None if ids is None else ids.reshape(-1),
        training=training,
        placement=layout,
    )

    def layer(block: Block, x: jax.Array, index: jax.Array | int) -> tuple[jax.Array, tuple[MoEStats | None, dict]]:
        recorder = Recorder(tap)
        context = flat if key is None else flat._replace(key=jax.random.fold_in(key, index))
        y, stats = block(constrain(x), sequences.positions, sequences.mask, context, recorder)
        if training and key is not None and config.layer_dropout is not None:
            draw = jax.random.fold_in(jax.random.fold_in(key, index), _DROPOUT_STREAM)
            kept = config.layer_dropout.kept(draw, len(x), index, config.layers, jnp.asarray(progress))
            y = jnp.where(kept[:, None, None], y, x)
        return constrain(y), (stats, recorder.seen)

    x, early, stats, taps, exits = constrain(x), config.exit_depths[:-1], [], {}, []
    for segment in segments:
        x, outputs = run_segment(segment, x, layer, first=len(stats), remat=config.remat, unroll=config.unroll)
        for layer_stats, seen in outputs:
            taps |= {f"layers.{len(stats)}.{path}": value for path, value in seen.items()}
            stats.append(layer_stats)
        if len(stats) in early:
            exits.append(x)
    if tap is not None:
        taps["head"] = tap("head", x, None)
    return Hidden(x, tuple(stats), taps, tuple(exits))


def single_blocks(segments: Sequence[Segment], first: int, count: int) -> list[Block]:
    """Some layers in a row of an unstacked model.

    Raises:
        ValueError: the model is stacked.
    """
    if any(segment.depth > 1 for segment in segments):
        raise ValueError(
            "decode needs the layers unstacked; this model is stacked: use with_layers(model, stacked=False)"
        )
    return [cast(Block, segment.unit.layers[0]) for segment in segments[first : first + count]]


def store_router_states(segments: Sequence[Segment], stats: tuple[MoEStats | None, ...]) -> None:
    """Store in the layers what their routers are to remember of a forward pass, outside of the gradient."""
    first = 0
    for segment in segments:
        length = len(segment.unit.layers)
        for offset, block in enumerate(segment.unit.layers):
            ffn: Any = cast(Block, block).ffn
            repeats = [layer.router_state for layer in stats[first + offset : first + segment.depth : length] if layer]
            if repeats and repeats[0]:
                join = (lambda *arrays: jnp.stack(arrays)) if segment.repeats > 1 else (lambda array: array)
                ffn.update_router_state(jax.tree.map(join, *repeats))
        first += segment.depth


def refuse_batch_dependence(config: Any, layout: Layout | None) -> None:
    """Raise ValueError where a layer's result depends on the other tokens of a call; it is named."""
    for layer, ffn in enumerate(config.feed_forwards):
        if (what := ffn.batch_dependence(layout)) is not None:
            raise ValueError(
                f"{type(config).__name__}.ffn of layer {layer} has {what}, by which a token's output depends on the "
                "other tokens of the batch; generation and answers in buckets need one that does not, as TopK with a "
                "DroplessDispatcher: else a row's answer would depend on its neighbours"
            )


Model = TypeVar("Model", bound=nnx.Module)


def with_layers(model: Model, *, stacked: bool) -> Model:
    """The same model with its layers stacked (training) or unstacked (decoding, early exit, editing). Arrays outside of
    the layers are shared."""
    # A copy of the variables first, so that editing the result leaves the given model alone in every form.
    converted: Any = nnx.clone(model)
    segments = unstack(converted.segments)
    if stacked:
        segments = stack(segments, converted.config.kinds)
    converted.segments = nnx.List(segments)
    return converted
