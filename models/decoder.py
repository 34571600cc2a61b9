"""A decoder-only language model whose feed-forward networks are chosen by type, layer by layer.

    config = Decoder(vocab=264, width=128, layers=4, ffn=MoE(experts=8, router=TopK(k=2)))
    model = config.build(key)
    logits, stats, taps = model(tokens)

Letters: B batch, S sequence, D width, V vocabulary, L layers, T = B * S tokens.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..dynamic import Exits, LayerDropout
from ..moe import FeedForward, LayerPattern, MoEStats, RoutingContext, Tap
from .attention import Attention, causal_mask
from .block import Block
from .cache import Cache, LayerCache, empty_layer
from .exit_heads import build_exit_heads, own_parts
from .ffn import Dense
from .layer_stack import (
    Hidden,
    Sequences,
    layer_kinds,
    run_layers,
    single_blocks,
    store_router_states,
)
from .layers import build_segments
from .linear import linear, look_up
from .norm import RMSNorm
from .precision import wide
from .self_attention import AttentionPattern, SelfAttention
from .sharding import Layout


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A pre-norm decoder: RMSNorm, attention, RMSNorm, feed-forward network, L times, and a language-model head."""

    vocab: int = 264
    """Vocabulary size V."""
    width: int = 128
    """Width D of the residual stream."""
    layers: int = 4
    """Number of layers L."""
    attention: AttentionPattern = Attention()
    """The attention of every layer, or a pattern that chooses one for each."""
    ffn: LayerPattern = Dense()
    """The feed-forward network of every layer, or a pattern that chooses one for each."""
    tied: bool = False
    """Use the embedding as the head."""
    allow_look_ahead: bool = False
    """Accept routers by which a token's output depends on later tokens; the losses of such a model are too good."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    embedding_scale: float = 1.0
    """Factor on the embeddings of tokens (Granite's embedding_multiplier)."""
    residual_scale: float = 1.0
    """Factor on what each attention and each feed-forward network adds (Granite's residual_multiplier)."""
    logit_scale: float = 1.0
    """Factor on the logits (1 / Granite's logits_scaling)."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype of activations and of weights in use. Parameters, norms, softmax and routing stay in float32; with float64,
    which dense layers take to check others by, norms and softmax follow, and `jax_enable_x64` has to be on."""
    remat: bool = False
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    loss_block: int | None = None
    """Positions of a sequence whose logits a loss holds at once, computed again in the backward pass; none: all."""
    exits: Exits | None = None
    """Where the model can already answer; none: after the last layer alone."""
    layer_dropout: LayerDropout | None = None
    """Which layers are left out now and then in training."""
    unroll: int = 1
    """Repeats of the layers' scan that are compiled as one: more are faster, above all on CPU, and compile longer."""

    def __post_init__(self):
        for name in ("vocab", "width", "layers", "unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"Decoder.{name} is {getattr(self, name)}; it must be at least 1")
        if self.loss_block is not None and self.loss_block < 1:
            raise ValueError(f"Decoder.loss_block is {self.loss_block}; it must be at least 1, or None")
        if self.dtype not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"Decoder.dtype is {self.dtype!r}; allowed are 'float32', 'bfloat16' and 'float64'")
        if jax.dtypes.canonicalize_dtype(self.dtype) != jnp.dtype(self.dtype):
            raise ValueError("Decoder.dtype is 'float64', which JAX knows only with jax_enable_x64: JAX_ENABLE_X64=1")
        if not self.norm_epsilon >= 0:
            raise ValueError(f"Decoder.norm_epsilon is {self.norm_epsilon}; it must be at least 0")
        for name in ("embedding_scale", "residual_scale", "logit_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Decoder.{name} is {getattr(self, name)}; it must be positive and finite")
        for attention in self.attentions:
            attention.cache_shape(self.width)
        if self.exits is not None:
            self.exits.depths(self.layers)
        for layer, ffn in enumerate(self.feed_forwards):
            if ffn.looks_ahead and not self.allow_look_ahead:
                raise ValueError(
                    f"Decoder.ffn of layer {layer} is {ffn}, which looks at later tokens; a causal decoder needs one "
                    "that does not, or allow_look_ahead=True"
                )
            if ffn.vocabulary is not None and ffn.vocabulary < self.vocab:
                raise ValueError(
                    f"Decoder.ffn of layer {layer} knows {ffn.vocabulary} token ids, and Decoder.vocab is "
                    f"{self.vocab}: it must know at least as many"
                )

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

    def build(self, key: jax.Array, *, stacked: bool = True) -> "DecoderLM":
        """Build the model with fresh parameters, stacked for training or unstacked for decoding and editing."""
        return DecoderLM(self, key=key, stacked=stacked)


class NewTokens(NamedTuple):
    """Tokens that come behind those in a cache."""

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    """One after the other in each row."""
    mask: Bool[Array, "B S"]
    """True at real tokens; padding stands behind them."""


class Output(NamedTuple):
    """What a forward pass returns."""

    logits: Float[Array, "B S V"]
    """Float32."""
    stats: tuple[MoEStats | None, ...]
    """Of each layer; None where its feed-forward network is dense."""
    taps: dict[str, Any]
    """What the tap returned, by path: "layers.0.attention", "layers.0.ffn", ..., "head"."""


class DecoderLM(nnx.Module):
    """The built model. Its parameters carry logical axes, see `models.sharding`."""

    linear_kernels = {"head_kernel": 1}  # see models.quantization

    def __init__(self, config: Decoder, *, key: jax.Array, stacked: bool):
        embedding, layers, head = jax.random.split(key, 3)
        shape = (config.vocab, config.width)
        # A tied embedding is also the head: with this deviation its logits start with variance 1.
        deviation = config.width**-0.5 if config.tied else 1.0
        self.config = config
        self.embedding = nnx.Param(deviation * jax.random.normal(embedding, shape), axes=("vocab", "embed"))
        keys = jax.random.split(layers, config.layers)
        segments = build_segments(
            config.kinds, keys, lambda kind, key: Block(config, kind[0], kind[1], key), stacked=stacked
        )
        self.segments = nnx.List(segments)
        self.final_norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        if not config.tied:
            initial = jax.nn.initializers.lecun_normal()(head, shape[::-1])
            self.head_kernel = nnx.Param(initial, axes=("embed", "vocab"))
        if config.exits is not None:
            exits = build_exit_heads(config.exits, config, config.vocab, jax.random.fold_in(head, 1))
            self.exit_heads = nnx.List(exits)

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Token embeddings in the compute dtype. A token outside the vocabulary becomes NaN, so that it shows."""
        rows = look_up(self.embedding[...], tokens).astype(self.config.dtype)
        return rows if self.config.embedding_scale == 1 else self.config.embedding_scale * rows

    def head(self, x: Float[Array, "B S D"], exit: int = -1) -> Float[Array, "B S V"]:
        """Logits of the next token, in float32, at an exit: of those of `Decoder.exit_depths`, the last by default."""
        norm, kernel = own_parts(self, exit)
        if kernel is None:
            kernel = self.embedding[...].T if self.config.tied else self.head_kernel[...]
        logits = linear(norm(x), kernel, dtype=wide(x))
        return logits if self.config.logit_scale == 1 else self.config.logit_scale * logits

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        *,
        key: jax.Array | None = None,
        training: bool = False,
        tap: Tap | None = None,
        layout: Layout | None = None,
    ) -> Output:
        """Logits of every next token.

        Args:
            tokens: token ids below V.
            segments: document of each token, 0 at padding; attention stays inside a document. None: one document a row.
            positions: position of each token in its document. None: counted along the row.
            key: randomness of routers that draw; folded with the layer's number.
            training: whether routers behave as in training.
            tap: `tap(path, activations, routing)`, called where activations enter a module; see `Output.taps`.
            layout: keeps activations split by batch on a mesh, where dispatchers then run device by device. None: leave
                that to XLA.
        """
        hidden = self.hidden(tokens, segments, positions, key=key, training=training, tap=tap, layout=layout)
        return Output(self.head(hidden.x), hidden.stats, hidden.taps)

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        *,
        key: jax.Array | None = None,
        training: bool = False,
        tap: Tap | None = None,
        layout: Layout | None = None,
        progress: Float[Array, ""] | float = 1.0,
    ) -> Hidden:
        """All but the head, of the same arguments; for losses that never hold all logits, see likelihood.py.

        Args:
            progress: share of the training that is done, for what changes over it.
        """
        segments = jnp.ones_like(tokens) if segments is None else segments
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
        return run_layers(
            self.config,
            self.segments,
            self.embed(tokens),
            Sequences(positions, causal_mask(segments), segments > 0, tokens),
            key=key,
            training=training,
            tap=tap,
            layout=layout,
            progress=progress,
        )

    def decode(
        self,
        tokens: Int[Array, "B S"],
        cache: Cache,
        mask: Bool[Array, "B S"] | None = None,
        *,
        layout: Layout | None = None,
    ) -> tuple[Float[Array, "B S V"], Cache]:
        """Logits of new tokens after those in the cache, and the cache with them.

        Args:
            tokens: the next S tokens of each row; a prompt, a part of one, or one token.
            cache: from `empty_cache` or an earlier call. A row's tokens past its last slot are dropped.
            mask: True at real tokens; padding stands behind them and leaves nothing in the cache.
            layout: as for a forward pass.

        Raises:
            ValueError: the model is stacked.
        """
        x, cache = self.extend(tokens, cache, mask, layout=layout)
        return self.head(x), cache

    def extend(
        self,
        tokens: Int[Array, "B S"],
        cache: Cache,
        mask: Bool[Array, "B S"] | None = None,
        *,
        layout: Layout | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """`decode` without the head: what `head` would make logits of, and the cache. See there."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1])[None]
        new = NewTokens(tokens, positions, mask)
        x, layers = self.decode_layers(self.embed(tokens), new, cache.layers, first=0, layout=layout)
        return x, Cache(layers, cache.length + mask.sum(axis=1, dtype=jnp.int32))

    def decode_layers(
        self,
        x: Float[Array, "B S D"],
        new: NewTokens,
        caches: tuple[LayerCache, ...],
        *,
        first: int,
        layout: Layout | None = None,
    ) -> tuple[Float[Array, "B S D"], tuple[LayerCache, ...]]:
        """Run some layers over new tokens, and write them into these layers' caches.

        Args:
            x: what enters layer `first`.
            new: the tokens.
            caches: of layers `first`, `first` + 1 and so on, as many as are to run.
            first: number of the first layer.
            layout: as for a forward pass.

        Raises:
            ValueError: the model is stacked.
        """
        constrain: Callable[[jax.Array], jax.Array] = (lambda x: x) if layout is None else layout.constrain
        context = RoutingContext(mask=new.mask.reshape(-1), token_ids=new.tokens.reshape(-1), placement=layout)
        x, written = constrain(x), []
        for block, cache in zip(single_blocks(self.segments, first, len(caches)), caches, strict=True):
            x, cache = block.decode(x, new.positions, new.mask, context, cache)
            x = constrain(x)
            written.append(cache)
        return x, tuple(written)

    def remember_layers(
        self, x: Float[Array, "B S D"], new: NewTokens, caches: tuple[LayerCache, ...], *, first: int
    ) -> tuple[LayerCache, ...]:
        """Write keys and values of x into the caches of layers that do not run for it: state propagation, Elbayad et
        al. 2020, https://arxiv.org/abs/1910.10073, as in CALM. Arguments as of `decode_layers`."""
        blocks = single_blocks(self.segments, first, len(caches))
        return tuple(block.remember(x, *new[1:], cache) for block, cache in zip(blocks, caches, strict=True))

    def update_router_states(self, stats: tuple[MoEStats | None, ...]) -> None:
        """Store what the routers are to remember of a forward pass, `Output.stats`, outside of the gradient."""
        store_router_states(self.segments, stats)

    def empty_cache(self, *, batch: int, slots: int) -> Cache:
        """A cache for `batch` rows of up to `slots` tokens, in the compute dtype."""
        layer = functools.partial(empty_layer, batch=batch, slots=slots, dtype=jnp.dtype(self.config.dtype))
        shapes = [attention.cache_shape(self.config.width) for attention in self.config.attentions]
        return Cache(tuple(layer(*shape) for shape in shapes), jnp.zeros(batch, jnp.int32))
