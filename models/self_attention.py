"""The attention slot of a decoder's layers: what fills it, and a pattern that alternates two kinds.

Letters: D width, S sequence, G and P heads and head width of the cached keys, W width of the cached values.
"""

import abc
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int

from .cache import LayerCache


class CacheShape(NamedTuple):
    """What one token leaves in a layer's cache: keys [heads, key_width] and values [heads, value_width]."""

    heads: int
    key_width: int
    value_width: int


@runtime_checkable
class SelfAttentionModule(Protocol):
    """Built attention: an `nnx.Module` from width to width."""

    def __call__(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], mask: Bool[Array, "B S S"]
    ) -> Float[Array, "B S D"]:
        """Attention among the tokens of x, where `mask` lets a token (second axis) see another (third)."""
        ...

    def remember(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], mask: Bool[Array, "B S"], cache: LayerCache
    ) -> LayerCache:
        """Write what later tokens need of x into the cache (where `mask` is True)."""
        ...

    def decode(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], mask: Bool[Array, "B S"], cache: LayerCache
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """Write the tokens of x into the cache (where `mask` is True) and attend to all valid slots up to each."""
        ...


class SelfAttention(abc.ABC):
    """Configuration of an attention."""

    def at(self, layer: int) -> "SelfAttention":
        """The attention of every layer, as an `AttentionPattern`: this one."""
        return self

    @abc.abstractmethod
    def cache_shape(self, width: int) -> CacheShape:
        """What a token leaves in the cache. Raises ValueError where a model of `width` cannot have this attention."""

    @abc.abstractmethod
    def score_flops(self, width: int, sequence_length: int) -> float:
        """FLOPs per token of the products without parameters, over the whole sequence."""

    @abc.abstractmethod
    def build(self, *, width: int, epsilon: float, key: jax.Array) -> SelfAttentionModule:
        """Build it for tokens of `width`; `epsilon` is that of the model's norms."""


@runtime_checkable
class AttentionPattern(Protocol):
    """Chooses the attention of each layer of a model. A `SelfAttention` chooses itself."""

    def at(self, layer: int) -> SelfAttention:
        """The attention of layer `layer`, counted from 0."""
        ...


@dataclass(frozen=True, kw_only=True)
class AttentionAtLayers:
    """`attention` in the layers that are named, `otherwise` in the rest: gpt-oss's window in every second one, Qwen3's
    in the last ones."""

    attention: AttentionPattern
    """The attention of the named layers."""
    layers: tuple[int, ...]
    """Their numbers, from 0."""
    otherwise: AttentionPattern
    """The attention of the other layers."""

    def __post_init__(self):
        if wrong := [layer for layer in self.layers if layer < 0]:
            raise ValueError(f"AttentionAtLayers.layers holds {wrong[0]}; layers are numbered from 0")

    def at(self, layer: int) -> SelfAttention:
        return (self.attention if layer in self.layers else self.otherwise).at(layer)
