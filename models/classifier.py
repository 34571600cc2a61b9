"""A classifier: something that makes vectors of an input, bidirectional layers, a pooled head, and exits on the way.

`VisionTransformer` and `TextClassifier` derive from it, and differ in what makes the vectors alone. Letters: B rows,
S tokens, D width, V classes, N exits.
"""

import abc
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..dynamic import Exits, LayerDropout, StageOutput
from ..moe import FeedForward, LayerPattern, MoEStats, RoutingContext, Tap, no_tap
from .attention import Attention
from .block import Block
from .exit_heads import build_exit_heads, own_parts
from .ffn import Dense
from .layer_stack import Sequences, layer_kinds, run_layers, single_blocks, store_router_states
from .layers import build_segments
from .linear import linear
from .norm import RMSNorm
from .pooling import MeanPool, Pooling
from .self_attention import AttentionPattern, SelfAttention
from .sharding import Layout


class Vectors(NamedTuple):
    """What the layers are given of an input."""

    x: Float[Array, "B S D"]
    positions: Int[Array, "B S"]
    """For rotary attention; all 0 leaves queries and keys unturned."""
    real: Bool[Array, "B S"]
    """False at padding."""
    token_ids: Int[Array, "B S"] | None = None
    """For routers that look at them."""


@dataclass(frozen=True, kw_only=True)
class Classifier(abc.ABC):
    """Configuration of a classifier, all but its inputs."""

    classes: int = 10
    """Number of classes V."""
    width: int = 64
    """Width D of the residual stream."""
    layers: int = 4
    """Number of layers L."""
    attention: AttentionPattern = Attention()
    """The attention of every layer, or a pattern; every token sees all others."""
    ffn: LayerPattern = Dense()
    """The feed-forward network of every layer, or a pattern."""
    pooling: Pooling = MeanPool()
    """Makes one vector of the tokens."""
    exits: Exits | None = None
    """Where the model can already answer; none: after the last layer alone."""
    layer_dropout: LayerDropout | None = None
    """Which layers are left out now and then in training."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    residual_scale: float = 1.0
    """Factor on what each attention and each feed-forward network adds."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and of weights in use. Parameters, norms, softmax and routing stay in float32."""
    remat: bool = False
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    unroll: int = 1
    """Repeats of the layers' scan that are compiled as one."""

    def __post_init__(self):
        name = type(self).__name__
        for field, least in (("classes", 2), ("width", 1), ("layers", 1), ("unroll", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{name}.{field} is {getattr(self, field)}; it must be at least {least}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"{name}.dtype is {self.dtype!r}; allowed are 'float32' and 'bfloat16'")
        for attention in self.attentions:
            attention.cache_shape(self.width)
        if self.exits is not None:
            self.exits.depths(self.layers)

    @abc.abstractmethod
    def build_inputs(self, key: jax.Array) -> "Inputs":
        """Build what makes vectors of an input."""

    @abc.abstractmethod
    def example(self, rows: int) -> jax.ShapeDtypeStruct:
        """The shape and dtype of a batch of inputs."""

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """The feed-forward network of each layer."""
        return tuple(self.ffn.at(layer) for layer in range(self.layers))

    @property
    def attentions(self) -> tuple[SelfAttention, ...]:
        """The attention of each layer."""
        return tuple(self.attention.at(layer) for layer in range(self.layers))

    @property
    def exit_depths(self) -> tuple[int, ...]:
        """How many layers run before each exit; the last is the model's own end."""
        return (self.layers,) if self.exits is None else self.exits.depths(self.layers)

    @property
    def kinds(self) -> tuple[tuple[SelfAttention, FeedForward, int], ...]:
        """See `layer_kinds`."""
        return layer_kinds(self.attentions, self.feed_forwards, self.exit_depths)

    def build(self, key: jax.Array, *, stacked: bool = True) -> "ClassifierModel":
        """Build the model with fresh parameters, stacked for training or unstacked for exits that save time."""
        return ClassifierModel(self, key=key, stacked=stacked)


class Inputs(nnx.Module):
    """Built: makes vectors of a batch of inputs. One of your own derives from this."""

    def __call__(self, inputs: Array) -> Vectors:
        raise NotImplementedError


class ClassifierOutput(NamedTuple):
    """What a forward pass returns."""

    logits: Float[Array, "N B V"]
    """Of every exit, the last layer's at the end; float32."""
    pooled: Float[Array, "N B D"]
    """What each exit's head read."""
    stats: tuple[MoEStats | None, ...]
    """Of each layer; None where its feed-forward network is dense."""
    taps: dict[str, Any]
    """What the tap returned, by path."""


class ClassifierModel(nnx.Module):
    """The built model. Its parameters carry logical axes, see `models.sharding`."""

    linear_kernels = {"head_kernel": 1}  # see models.quantization

    def __init__(self, config: Classifier, *, key: jax.Array, stacked: bool):
        inputs, layers, head, exits, token = jax.random.split(key, 5)
        self.config = config
        self.inputs = config.build_inputs(inputs)
        drawn = 0.02 * jax.random.normal(token, (config.width,))
        self.class_token = nnx.Param(drawn, axes=("embed",)) if config.pooling.class_token else None
        keys = jax.random.split(layers, config.layers)
        segments = build_segments(
            config.kinds, keys, lambda kind, key: Block(config, kind[0], kind[1], key), stacked=stacked
        )
        self.segments = nnx.List(segments)
        self.final_norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        initial = jax.nn.initializers.lecun_normal()(head, (config.width, config.classes))
        self.head_kernel = nnx.Param(initial, axes=("embed", "vocab"))
        if config.exits is not None:
            self.exit_heads = nnx.List(build_exit_heads(config.exits, config, config.classes, exits))

    def embed(self, inputs: Array, rows: Bool[Array, " B"] | None = None) -> Vectors:
        """The vectors that enter the first layer, in the compute dtype.

        Args:
            inputs: as `Classifier.example` says.
            rows: False at rows that are padding, whole. None: there are none.
        """
        x, positions, real, ids = self.inputs(inputs)
        x = x.astype(self.config.dtype)
        if self.class_token is not None:
            token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (len(x), 1, x.shape[2]))
            x = jnp.concatenate([token, x], axis=1)
            positions, real = (jnp.pad(array, ((0, 0), (1, 0)), mode="edge") for array in (positions, real))
            real = real.at[:, 0].set(True)
            ids = None if ids is None else jnp.pad(ids, ((0, 0), (1, 0)))
        if rows is not None:
            real = real & rows[:, None]
        return Vectors(x, positions, real, ids)

    def head(
        self, x: Float[Array, "B S D"], real: Bool[Array, "B S"], exit: int = -1
    ) -> tuple[Float[Array, "B D"], Float[Array, "B V"]]:
        """The pooled vector and the float32 logits at an exit: of `exit_depths`, the last by default."""
        norm, kernel = own_parts(self, exit)
        pooled = self.config.pooling(norm(x), real)
        return pooled, linear(pooled, self.head_kernel[...] if kernel is None else kernel, dtype=jnp.float32)

    def __call__(
        self,
        inputs: Array,
        rows: Bool[Array, " B"] | None = None,
        *,
        key: jax.Array | None = None,
        training: bool = False,
        tap: Tap | None = None,
        layout: Layout | None = None,
        progress: Float[Array, ""] | float = 1.0,
    ) -> ClassifierOutput:
        """The logits of all exits.

        Args:
            inputs: a batch, as `Classifier.example` says.
            rows: False at rows that are padding. None: there are none.
            key: randomness of routers that draw and of layer dropout.
            training: whether routers and layer dropout behave as in training.
            tap: `tap(path, activations, routing)`, called where activations enter a module.
            layout: keeps activations split by batch on a mesh.
            progress: share of the training that is done, for what changes over it.
        """
        x, positions, real, ids = self.embed(inputs, rows)
        sequences = Sequences(positions, _sees(real), real, ids)
        hidden = run_layers(
            self.config,
            self.segments,
            x,
            sequences,
            key=key,
            training=training,
            tap=tap,
            layout=layout,
            progress=progress,
        )
        heads = [self.head(x, real, exit) for exit, x in enumerate((*hidden.exits, hidden.x))]
        pooled, logits = (jnp.stack(parts) for parts in zip(*heads, strict=True))
        return ClassifierOutput(logits, pooled, hidden.stats, hidden.taps)

    def stage(self, exit: int, carried: Any) -> StageOutput:
        """The layers between two exits, and the second one's head: what `dynamic.run_with_exits` runs.

        Args:
            exit: number of the exit in `exit_depths`.
            carried: the inputs for the first, the stage before's `carried` for the others.

        Raises:
            ValueError: the model is stacked.
        """
        depths = (0, *self.config.exit_depths)
        blocks = single_blocks(self.segments, depths[exit], depths[exit + 1] - depths[exit])
        x, positions, real, ids = self.embed(carried) if exit == 0 else carried
        context = RoutingContext(mask=real.reshape(-1), token_ids=None if ids is None else ids.reshape(-1))
        for block in blocks:
            x, _ = block(x, positions, _sees(real), context, no_tap)
        pooled, logits = self.head(x, real, exit)
        return StageOutput(Vectors(x, positions, real, ids), pooled, logits)

    def update_router_states(self, stats: tuple[MoEStats | None, ...]) -> None:
        """Store what the routers are to remember of a forward pass, outside of the gradient."""
        store_router_states(self.segments, stats)


def _sees(real: Bool[Array, "B S"]) -> Bool[Array, "B S S"]:
    """All real tokens of a row see each other; padding sees only itself, so that nothing becomes NaN."""
    return (real[:, :, None] & real[:, None, :]) | jnp.eye(real.shape[1], dtype=bool)[None]
