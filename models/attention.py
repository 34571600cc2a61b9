"""Grouped-query attention with rotary positions. Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.

Letters: B batch, S sequence, D width, H query heads, G key-value heads, P head width.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from .cache import LayerCache
from .cached_attention import cached_attention
from .dot_product import dot_product_attention
from .linear import added, linear
from .norm import RMSNorm
from .precision import wide
from .rotary import RotaryScaling, rotate
from .self_attention import CacheShape, SelfAttention
from .sequence_blocks import by_blocks


@dataclass(frozen=True, kw_only=True)
class Attention(SelfAttention):
    """Causal self-attention. How published models write theirs, beside heads and widths:

    Llama 3.1    Attention(rope_theta=500_000.0, scaling=Llama3Scaling(factor=8.0, trained=8192))
    Qwen3        Attention(qk_norm=True, rope_theta=1_000_000.0)
    OLMoE        Attention(projection_norm=True)
    gpt-oss      Attention(bias=True, output_bias=True, sinks=True, window=128, scaling=Yarn(factor=32.0, ...))
    """

    heads: int = 4
    """Query heads H."""
    kv_heads: int | None = None
    """Key-value heads G, which must divide H; None: as many as query heads."""
    head_width: int | None = None
    """Width P of a head, even; None: the model's width divided by H."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    scaling: RotaryScaling | None = None
    """How the rotary frequencies are changed for long texts; None: not at all."""
    qk_norm: bool = False
    """Normalise queries and keys per head before the rotation (Qwen3)."""
    projection_norm: bool = False
    """Normalise queries, and keys, over all heads together (OLMoE)."""
    clip: float | None = None
    """Clip queries, keys and values to this magnitude before the rotation (OLMo's clip_qkv)."""
    bias: bool = False
    """Add biases to queries, keys and values."""
    output_bias: bool = False
    """Add a bias to the output."""
    window: int | None = None
    """A token sees so many tokens, itself among them, and no earlier one (Mistral's sliding window); None: all."""
    sinks: bool = False
    """Each head has a learned score of attention to nothing (gpt-oss)."""
    scale: float | None = None
    """Factor on the scores; None: 1 / sqrt(P)."""
    query_block: int | None = None
    """Queries whose scores [H, S] exist at once, computed again in the backward pass; none: those of all."""

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError(f"Attention.heads is {self.heads}; it must be at least 1")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"Attention.kv_heads is {self.kv_heads}; it must divide heads={self.heads}")
        if self.head_width is not None and (self.head_width < 2 or self.head_width % 2):
            raise ValueError(f"Attention.head_width is {self.head_width}; rotary positions need an even width")
        for name in ("rope_theta", "clip", "scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Attention.{name} is {value}; it must be positive and finite")
        if self.qk_norm and self.projection_norm:
            raise ValueError("Attention.qk_norm and projection_norm are both True; at most one may be")
        if self.window is not None and self.window < 1:
            raise ValueError(f"Attention.window is {self.window}; it must be at least 1, or None")
        if self.query_block is not None and self.query_block < 1:
            raise ValueError(f"Attention.query_block is {self.query_block}; it must be at least 1, or None")

    def shape(self, width: int) -> tuple[int, int, int]:
        """(H, G, P) in a model of `width`. Raises ValueError where the width does not divide into even heads."""
        if self.head_width is None and width % (2 * self.heads):
            raise ValueError(
                f"width is {width}; with Attention.heads={self.heads} and no head_width it must be a multiple of "
                f"{2 * self.heads}, so that every head has the same even width"
            )
        return self.heads, self.kv_heads or self.heads, self.head_width or width // self.heads

    def cache_shape(self, width: int) -> CacheShape:
        _, kv_heads, head_width = self.shape(width)
        return CacheShape(kv_heads, head_width, head_width)

    def score_flops(self, width: int, sequence_length: int) -> float:
        heads, _, head_width = self.shape(width)
        return 4.0 * sequence_length * heads * head_width

    def build(self, *, width: int, epsilon: float, key: jax.Array) -> "AttentionLayer":
        return AttentionLayer(self, width=width, epsilon=epsilon, key=key)


class AttentionLayer(nnx.Module):
    """Projections query [D, H, P], key and value [D, G, P], output [H, P, D], used in the dtype of the activations, and
    what the options add: biases, norms, sinks [H]."""

    linear_kernels = {"query": 1, "key": 1, "value": 1, "output": 2}  # see models.quantization

    def __init__(self, config: Attention, *, width: int, epsilon: float, key: jax.Array):
        heads, kv_heads, head_width = config.shape(width)
        query, keys, values, output = jax.random.split(key, 4)
        inward = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        outward = jax.nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        kv_shape = (width, kv_heads, head_width)
        self.config = config
        self.query = nnx.Param(inward(query, (width, heads, head_width)), axes=("embed", "heads", None))
        self.key = nnx.Param(inward(keys, kv_shape), axes=("embed", "kv_heads", None))
        self.value = nnx.Param(inward(values, kv_shape), axes=("embed", "kv_heads", None))
        self.output = nnx.Param(outward(output, (heads, head_width, width)), axes=("heads", None, "embed"))
        self.query_bias = _zeros((heads, head_width), ("heads", None)) if config.bias else None
        self.key_bias = _zeros((kv_heads, head_width), ("kv_heads", None)) if config.bias else None
        self.value_bias = _zeros((kv_heads, head_width), ("kv_heads", None)) if config.bias else None
        self.output_bias = _zeros((width,), ("embed",)) if config.output_bias else None
        self.sinks = _zeros((heads,), ("heads",)) if config.sinks else None
        normed = config.qk_norm or config.projection_norm
        together = (heads, kv_heads) if config.projection_norm else (1, 1)
        self.query_norm, self.key_norm = (
            RMSNorm(count * head_width, epsilon=epsilon, axis=None) if normed else None for count in together
        )

    def keys_values(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S G P"], Float[Array, "B S G P"]]:
        """Keys, rotated, and values of x: all that later tokens need of it."""
        keys = self._project(x, self.key, self.key_bias, self.key_norm)
        values = self._project(x, self.value, self.value_bias, None)
        return rotate(keys, positions, self.config.rope_theta, self.config.scaling), values

    def attend(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        keys: Float[Array, "B N G P"],
        values: Float[Array, "B N G P"],
        mask: Bool[Array, "B S N"],
    ) -> Float[Array, "B S D"]:
        """Let the queries of x see the keys where `mask` is True; softmax in float32."""
        # Float32 in between, so that the gradients of keys and values are summed over the blocks in it.
        keys, values = keys.astype(wide(x)), values.astype(wide(x))

        def heads(query: jax.Array, mask: jax.Array) -> jax.Array:
            narrow_keys, narrow_values = keys.astype(x.dtype), values.astype(x.dtype)
            return dot_product_attention(
                query, narrow_keys, narrow_values, mask, scale=self.config.scale, sinks=self._sinks
            )

        attended = by_blocks(heads, self.config.query_block, self.queries(x, positions), mask)
        return self._outward(attended)

    def queries(self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]) -> Float[Array, "B S H P"]:
        """Queries of x, rotated."""
        query = self._project(x, self.query, self.query_bias, self.query_norm)
        return rotate(query, positions, self.config.rope_theta, self.config.scaling)

    @property
    def _sinks(self) -> Float[Array, " H"] | None:
        return None if self.sinks is None else self.sinks[...]

    def _outward(self, heads: Float[Array, "B S H P"]) -> Float[Array, "B S D"]:
        return added(linear(heads, self.output[...], inputs=2), self.output_bias)

    def _project(
        self, x: Float[Array, "B S D"], kernel: nnx.Variable, bias: nnx.Param | None, norm: RMSNorm | None
    ) -> Float[Array, "B S N P"]:
        """Heads of x, normalised and clipped as the configuration has it."""
        heads = added(linear(x, kernel[...]), bias)
        if norm is not None and self.config.projection_norm:
            heads = norm(heads.reshape(*x.shape[:2], -1)).reshape(heads.shape)
        elif norm is not None:
            heads = norm(heads)
        return heads if self.config.clip is None else jnp.clip(heads, -self.config.clip, self.config.clip)

    def __call__(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], mask: Bool[Array, "B S S"]
    ) -> Float[Array, "B S D"]:
        """Attention among the tokens of x."""
        return self.attend(x, positions, *self.keys_values(x, positions), self._near(mask, positions, positions))

    def remember(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], mask: Bool[Array, "B S"], cache: LayerCache
    ) -> LayerCache:
        """Write the tokens of x into the cache, where `mask` is True."""
        turns = jnp.where(mask, positions, 0)  # padding stands behind, and must not lengthen the text
        return cache.write(*self.keys_values(x, turns), positions, mask)

    def decode(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], mask: Bool[Array, "B S"], cache: LayerCache
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """Write the tokens of x into the cache (where `mask` is True) and attend to all valid slots up to each."""
        cache, turns = self.remember(x, positions, mask, cache), jnp.where(mask, positions, 0)
        heads = cached_attention(
            self.queries(x, turns),
            cache,
            positions,
            mask,
            scale=self.config.scale,
            window=self.config.window,
            sinks=self._sinks,
        )
        return self._outward(heads), cache

    def _near(
        self, mask: Bool[Array, "B S N"], positions: Int[Array, "B S"], others: Int[Array, "#B N"]
    ) -> Bool[Array, "B S N"]:
        """The mask without what lies before the window."""
        if self.config.window is None:
            return mask
        return mask & (positions[:, :, None] - others[:, None, :] < self.config.window)


def _zeros(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape), axes=axes)


def causal_mask(segments: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """True where the second position is not later than the first and belongs to the same document."""
    same = segments[:, :, None] == segments[:, None, :]
    return same & jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))[None]
