"""What fills the feed-forward slot of the layers: a dense network, and patterns that alternate two kinds.

A mixture of experts is `dynamoe.moe.MoE`. Letters: D width, F hidden width.
"""

from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float

from ..moe.feed_forward import FeedForward, Tap, no_tap
from ..moe.routing import NO_CONTEXT, RoutingContext
from .linear import linear


@dataclass(frozen=True, kw_only=True)
class Dense(FeedForward):
    """A gated network, down(silu(gate x) * up x). Shazeer 2020, https://arxiv.org/abs/2002.05202."""

    hidden: int = 512
    """Hidden width F."""

    def __post_init__(self):
        if self.hidden < 1:
            raise ValueError(f"Dense.hidden is {self.hidden}; it must be at least 1")

    def build(self, *, width: int, key: jax.Array) -> "DenseLayer":
        return DenseLayer(self, width=width, key=key)


class DenseLayer(nnx.Module):
    """Weights gate and up [D, F] and down [F, D], used in the dtype of the activations."""

    def __init__(self, config: Dense, *, width: int, key: jax.Array):
        gate, up, down = jax.random.split(key, 3)
        initial = jax.nn.initializers.lecun_normal()
        self.gate = nnx.Param(initial(gate, (width, config.hidden)), axes=("embed", "mlp"))
        self.up = nnx.Param(initial(up, (width, config.hidden)), axes=("embed", "mlp"))
        self.down = nnx.Param(initial(down, (config.hidden, width)), axes=("mlp", "embed"))

    def __call__(
        self, x: Float[Array, "*batch D"], context: RoutingContext = NO_CONTEXT, tap: Tap = no_tap
    ) -> tuple[Float[Array, "*batch D"], None]:
        tap("ffn", x, None)
        hidden = jax.nn.silu(linear(x, self.gate[...])) * linear(x, self.up[...])
        return linear(hidden, self.down[...]), None


@dataclass(frozen=True, kw_only=True)
class EveryNth:
    """`ffn` in every n-th layer (the last of each n, as in Switch and GShard), `otherwise` in the rest."""

    ffn: FeedForward
    """The network of every n-th layer."""
    otherwise: FeedForward = Dense()
    """The network of the other layers."""
    n: int = 2
    """Distance between two layers with `ffn`."""

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"EveryNth.n is {self.n}; it must be at least 1")

    def at(self, layer: int) -> FeedForward:
        return self.ffn if layer % self.n == self.n - 1 else self.otherwise


@dataclass(frozen=True, kw_only=True)
class FirstLayers:
    """`first` in the first `count` layers, `ffn` after them (DeepSeek-V2 and V3)."""

    ffn: FeedForward
    """The network after the first layers."""
    first: FeedForward = Dense()
    """The network of the first layers."""
    count: int = 1
    """How many layers are first."""

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"FirstLayers.count is {self.count}; it must be at least 0")

    def at(self, layer: int) -> FeedForward:
        return self.first if layer < self.count else self.ffn
