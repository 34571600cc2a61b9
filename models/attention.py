"""Grouped-query attention with rotary positions. Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.

Letters: B batch, S sequence, D width, H query heads, G key-value heads, P head width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from .cache import LayerCache
from .cached_attention import cached_attention
from .linear import linear
from .norm import RMSNorm
from .sequence_blocks import by_blocks


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal self-attention."""

    heads: int = 4
    """Query heads H."""
    kv_heads: int | None = None
    """Key-value heads G, which must divide H; None: as many as query heads."""
    head_width: int | None = None
    """Width P of a head, even; None: the model's width divided by H."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    qk_norm: bool = False
    """Normalise queries and keys per head before the rotation (Qwen3)."""
    projection_norm: bool = False
    """Normalise queries, and keys, over all heads together (OLMoE)."""
    query_block: int | None = None
    """Queries whose scores [H, S] exist at once, computed again in the backward pass; none: those of all."""

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError(f"Attention.heads is {self.heads}; it must be at least 1")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"Attention.kv_heads is {self.kv_heads}; it must divide heads={self.heads}")
        if self.head_width is not None and (self.head_width < 2 or self.head_width % 2):
            raise ValueError(f"Attention.head_width is {self.head_width}; rotary positions need an even width")
        if self.rope_theta <= 0:
            raise ValueError(f"Attention.rope_theta is {self.rope_theta}; it must be positive")
        if self.qk_norm and self.projection_norm:
            raise ValueError("Attention.qk_norm and projection_norm are both True; at most one may be")
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

    def build(self, *, width: int, epsilon: float, key: jax.Array) -> "AttentionLayer":
        return AttentionLayer(self, width=width, epsilon=epsilon, key=key)


class AttentionLayer(nnx.Module):
    """Projections query [D, H, P], key and value [D, G, P], output [H, P, D], used in the dtype of the activations."""

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
        normed = config.qk_norm or config.projection_norm
        together = (heads, kv_heads) if config.projection_norm else (1, 1)
        self.query_norm, self.key_norm = (
            RMSNorm(count * head_width, epsilon=epsilon, axis=None) if normed else None for count in together
        )

    def keys_values(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S G P"], Float[Array, "B S G P"]]:
        """Keys, rotated, and values of x: all that later tokens need of it."""
        keys = self._normed(linear(x, self.key[...]), self.key_norm)
        values = linear(x, self.value[...])
        return rotate(keys, positions, self.config.rope_theta), values

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
        wide = tuple(array.astype(jnp.float32) for array in (keys, values))

        def heads(query: jax.Array, mask: jax.Array) -> jax.Array:
            narrow = (array.astype(x.dtype) for array in wide)
            return jax.nn.dot_product_attention(query, *narrow, mask=mask[:, None])

        attended = by_blocks(heads, self.config.query_block, self.queries(x, positions), mask)
        return linear(attended, self.output[...], inputs=2)

    def queries(self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]) -> Float[Array, "B S H P"]:
        """Queries of x, rotated."""
        query = self._normed(linear(x, self.query[...]), self.query_norm)
        return rotate(query, positions, self.config.rope_theta)

    def _normed(self, heads: Float[Array, "B S N P"], norm: RMSNorm | None) -> Float[Array, "B S N P"]:
        if norm is None:
            return heads
        joined = (*heads.shape[:2], -1) if self.config.projection_norm else heads.shape
        return norm(heads.reshape(joined)).reshape(heads.shape)

    def __call__(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], mask: Bool[Array, "B S S"]
    ) -> Float[Array, "B S D"]:
        """Attention among the tokens of x."""
        return self.attend(x, positions, *self.keys_values(x, positions), mask)

    def decode(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], mask: Bool[Array, "B S"], cache: LayerCache
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """Write the tokens of x into the cache (where `mask` is True) and attend to all valid slots up to each."""
        cache = cache.write(*self.keys_values(x, positions), positions, mask)
        heads = cached_attention(self.queries(x, positions), cache, positions, mask)
        return linear(heads, self.output[...], inputs=2), cache


def rotate(x: Float[Array, "B S N P"], positions: Int[Array, "B S"], theta: float) -> Float[Array, "B S N P"]:
    """Rotary position embedding in Llama's layout (pairs i and i + P/2). Su et al. 2021, https://arxiv.org/abs/2104.09864."""
    half = x.shape[-1] // 2
    frequency = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.einsum("bs,f->bsf", positions.astype(jnp.float32), frequency)[:, :, None, :]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


def causal_mask(segments: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """True where the second position is not later than the first and belongs to the same document."""
    same = segments[:, :, None] == segments[:, None, :]
    return same & jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))[None]
