"""A decoder's layer, and how a run of equal layers is carried out.

Letters: B batch, S sequence, D width.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..moe import FeedForward, MoEStats, Routing, RoutingContext, Tap
from .cache import LayerCache
from .layers import Segment, split_repeats
from .norm import RMSNorm
from .self_attention import SelfAttention


@runtime_checkable
class BlockConfig(Protocol):
    """What a layer reads of its model's configuration."""

    @property
    def width(self) -> int: ...
    @property
    def norm_epsilon(self) -> float: ...
    @property
    def residual_scale(self) -> float: ...


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + ffn(norm(x)), both scaled where the configuration says so."""

    def __init__(self, config: BlockConfig, attention: SelfAttention, ffn: FeedForward, key: jax.Array):
        attention_key, ffn_key = jax.random.split(key)
        self.scale = config.residual_scale
        self.attention_norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.attention = attention.build(width=config.width, epsilon=config.norm_epsilon, key=attention_key)
        self.ffn_norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.ffn = ffn.build(width=config.width, key=ffn_key)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S S"],
        context: RoutingContext,
        tap: Tap,
    ) -> tuple[Float[Array, "B S D"], MoEStats | None]:
        normed = self.attention_norm(x)
        tap("attention", normed, None)
        x = self._add(x, self.attention(normed, positions, mask))
        y, stats = self.ffn(self.ffn_norm(x), context, tap)
        return self._add(x, y), stats

    def decode(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        context: RoutingContext,
        cache: LayerCache,
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """The layer over new tokens and the cache of earlier ones."""
        y, cache = self.attention.decode(self.attention_norm(x), positions, mask, cache)
        x = self._add(x, y)
        y, _ = self.ffn(self.ffn_norm(x), context)
        return self._add(x, y), cache

    def remember(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], mask: Bool[Array, "B S"], cache: LayerCache
    ) -> LayerCache:
        """The cache with keys and values of x, which the layer does not run for."""
        return self.attention.remember(self.attention_norm(x), positions, mask, cache)

    def _add(self, x: Float[Array, "B S D"], y: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return x + y if self.scale == 1 else x + self.scale * y


class Recorder:
    """Collects what a tap returns within one layer, so that it can leave a scan or a rematerialised function."""

    def __init__(self, tap: Tap | None):
        self.tap = tap
        self.seen: dict[str, Any] = {}

    def __call__(self, path: str, activations: jax.Array, routing: Routing | None) -> None:
        if self.tap is not None:
            self.seen[path] = self.tap(path, activations, routing)


def run_segment(
    segment: Segment, x: jax.Array, layer: Callable, *, first: int, remat: bool, unroll: int
) -> tuple[jax.Array, list[tuple[MoEStats | None, dict]]]:
    """Run a segment's layers, numbered from `first`, and return each one's outputs."""
    length = len(segment.unit.layers)

    def unit(x: jax.Array, state: nnx.State, start: jax.Array | int) -> tuple[jax.Array, list]:
        outputs = []
        for offset, block in enumerate(nnx.merge(graph, state).layers):
            x, output = layer(block, x, start + offset)
            outputs.append(output)
        return x, outputs

    graph, state = nnx.split(segment.unit) if segment.repeats == 1 else split_repeats(segment)
    unit = jax.checkpoint(unit) if remat else unit
    if segment.repeats == 1:
        return unit(x, state, first)
    starts = first + length * jnp.arange(segment.repeats)
    x, stacked = jax.lax.scan(lambda x, of: unit(x, *of), x, (state, starts), unroll=unroll)
    return x, [jax.tree.map(lambda a, i=i: a[i], output) for i in range(segment.repeats) for output in stacked]
