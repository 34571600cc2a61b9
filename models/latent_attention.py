"""Multi-head latent attention: keys and values of all heads out of one narrow vector, which is all that is cached.

DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1; the same in DeepSeek-V3, https://arxiv.org/abs/2412.19437.
A head's query and key have a plain part and a rotary one; the rotary key is shared by all heads.

Letters: B batch, S sequence, N cache slots, D width, H heads, P plain width, R rotary width, W value width, C width of
the latent vector of keys and values, Q of that of queries.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from .cache import LayerCache
from .dot_product import dot_product_attention
from .linear import linear
from .norm import RMSNorm
from .rotary import RotaryScaling, rotate
from .self_attention import CacheShape, SelfAttention


@dataclass(frozen=True, kw_only=True)
class LatentAttention(SelfAttention):
    """Causal multi-head latent attention."""

    heads: int = 4
    """Heads H."""
    latent_width: int = 64
    """Width C of what keys and values are made of (kv_lora_rank)."""
    query_latent_width: int | None = None
    """Width Q of what queries are made of (q_lora_rank); None: of the token itself (DeepSeek-V2-Lite)."""
    plain_width: int = 16
    """Width P of the part of a head without positions."""
    rotary_width: int = 8
    """Width R of the part with rotary positions, even."""
    value_width: int = 16
    """Width W of a head's value."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    scaling: RotaryScaling | None = None
    """How they are changed for long texts."""
    scale: float | None = None
    """Factor on the scores; None: 1 / sqrt(P + R)."""
    norm_epsilon: float = 1e-6
    """Of the norms of the latent vectors."""

    def __post_init__(self):
        for name in ("heads", "latent_width", "query_latent_width", "plain_width", "rotary_width", "value_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"LatentAttention.{name} is {value}; it must be at least 1")
        if self.rotary_width % 2:
            raise ValueError(f"LatentAttention.rotary_width is {self.rotary_width}; it must be even")
        for name in ("rope_theta", "scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"LatentAttention.{name} is {value}; it must be positive and finite")

    def cache_shape(self, width: int) -> CacheShape:
        return CacheShape(1, self.rotary_width, self.latent_width)

    def score_flops(self, width: int, sequence_length: int) -> float:
        return 2.0 * sequence_length * self.heads * (self.plain_width + self.rotary_width + self.value_width)

    def build(self, *, width: int, epsilon: float, key: jax.Array) -> "LatentAttentionLayer":
        return LatentAttentionLayer(self, width=width, key=key)


class LatentAttentionLayer(nnx.Module):
    """Down to the latent vectors: query_down [D, Q], latent_down [D, C], key_rotary [D, R]; up to the heads:
    query_plain [Q or D, H, P], query_rotary [Q or D, H, R], key_plain [C, H, P], value [C, H, W]; output [H, W, D]."""

    def __init__(self, config: LatentAttention, *, width: int, key: jax.Array):
        keys = jax.random.split(key, 8)
        heads, latent, rank = config.heads, config.latent_width, config.query_latent_width
        down = jax.nn.initializers.lecun_normal()
        up = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        outward = jax.nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)

        def to_heads(key: jax.Array, inputs: int, head_width: int, axis: str | None) -> nnx.Param:
            return nnx.Param(up(key, (inputs, heads, head_width)), axes=(axis, "heads", None))

        self.config = config
        self.query_down = None if rank is None else nnx.Param(down(keys[0], (width, rank)), axes=("embed", None))
        self.query_norm = None if rank is None else RMSNorm(rank, epsilon=config.norm_epsilon, axis=None)
        source, axis = (width, "embed") if rank is None else (rank, None)
        self.query_plain = to_heads(keys[1], source, config.plain_width, axis)
        self.query_rotary = to_heads(keys[2], source, config.rotary_width, axis)
        self.latent_down = nnx.Param(down(keys[3], (width, latent)), axes=("embed", None))
        self.latent_norm = RMSNorm(latent, epsilon=config.norm_epsilon, axis=None)
        self.key_rotary = nnx.Param(down(keys[4], (width, config.rotary_width)), axes=("embed", None))
        self.key_plain = to_heads(keys[5], latent, config.plain_width, None)
        self.value = to_heads(keys[6], latent, config.value_width, None)
        initial = outward(keys[7], (heads, config.value_width, width))
        self.output = nnx.Param(initial, axes=("heads", None, "embed"))

    def keys_values(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S 1 R"], Float[Array, "B S 1 C"]]:
        """The shared rotary key, turned, and the latent vector of keys and values: all that later tokens need of x."""
        rotary = linear(x, self.key_rotary[...])[:, :, None]
        latent = self.latent_norm(linear(x, self.latent_down[...]))
        return rotate(rotary, positions, self.config.rope_theta, self.config.scaling), latent[:, :, None]

    def _queries(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S H P"], Float[Array, "B S H R"]]:
        if self.query_down is not None and self.query_norm is not None:
            x = self.query_norm(linear(x, self.query_down[...]))
        rotary = rotate(linear(x, self.query_rotary[...]), positions, self.config.rope_theta, self.config.scaling)
        return linear(x, self.query_plain[...]), rotary

    @property
    def _scale(self) -> float:
        config = self.config
        return (config.plain_width + config.rotary_width) ** -0.5 if config.scale is None else config.scale

    def __call__(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], mask: Bool[Array, "B S S"]
    ) -> Float[Array, "B S D"]:
        """Attention among the tokens of x, over the keys and values of each head."""
        plain, rotary = self._queries(x, positions)
        shared, latent = self.keys_values(x, positions)
        latent = latent[:, :, 0]
        keys = linear(latent, self.key_plain[...])
        keys = jnp.concatenate([keys, jnp.broadcast_to(shared, (*keys.shape[:3], shared.shape[3]))], axis=-1)
        query = jnp.concatenate([plain, rotary], axis=-1)
        heads = dot_product_attention(query, keys, linear(latent, self.value[...]), mask, scale=self._scale)
        return linear(heads, self.output[...], inputs=2)

    def remember(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], mask: Bool[Array, "B S"], cache: LayerCache
    ) -> LayerCache:
        """Write the tokens of x into the cache, where `mask` is True."""
        turns = jnp.where(mask, positions, 0)  # padding stands behind, and must not lengthen the text
        return cache.write(*self.keys_values(x, turns), positions, mask)

    def decode(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], mask: Bool[Array, "B S"], cache: LayerCache
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """Write the tokens of x into the cache (where `mask` is True) and attend to all valid slots up to each.

        The maps up to keys and values move over to queries and outputs, so that attention runs on the latent vectors
        themselves, as if they were one key-value head.
        """
        cache, turns = self.remember(x, positions, mask, cache), jnp.where(mask, positions, 0)
        held = cache.block(0, cache.valid.shape[1])
        shared, latent = (array.swapaxes(1, 2).astype(x.dtype) for array in (held.keys, held.values))
        plain, rotary = self._queries(x, turns)
        inner = jnp.einsum("bshp,chp->bshc", plain, self.key_plain[...].astype(x.dtype))
        query, keys = jnp.concatenate([inner, rotary], axis=-1), jnp.concatenate([latent, shared], axis=-1)
        mixed = dot_product_attention(query, keys, latent, held.visible(positions), scale=self._scale)
        heads = jnp.einsum("bshc,chw->bshw", mixed, self.value[...].astype(x.dtype))
        return linear(heads, self.output[...], inputs=2), cache
