"""What fills the feed-forward slot of the layers: a dense network, and patterns that alternate two kinds.

A mixture of experts is `dynamoe.moe.MoE`. Patterns nest, and count layers from the model's first: one dense layer and
then a mixture in every second is `FirstLayers(first=Dense(), ffn=EveryNth(ffn=MoE(), n=2))`. Letters: D width, F hidden
width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..moe.feed_forward import FeedForward, LayerPattern, Tap, no_tap
from ..moe.routing import NO_CONTEXT, RoutingContext
from .linear import added, linear


@dataclass(frozen=True, kw_only=True)
class Dense(FeedForward):
    """A gated network, down(silu(gate x) * up x). Shazeer 2020, https://arxiv.org/abs/2002.05202."""

    hidden: int = 512
    """Hidden width F."""
    bias: bool = False
    """Add a bias to each of the three products."""

    def __post_init__(self):
        if self.hidden < 1:
            raise ValueError(f"Dense.hidden is {self.hidden}; it must be at least 1")

    def build(self, *, width: int, key: jax.Array) -> "DenseLayer":
        return DenseLayer(self, width=width, key=key)


class DenseLayer(nnx.Module):
    """Weights gate and up [D, F] and down [F, D], perhaps biases, used in the dtype of the activations."""

    linear_kernels = {"gate": 1, "up": 1, "down": 1}  # see models.quantization

    def __init__(self, config: Dense, *, width: int, key: jax.Array):
        gate, up, down = jax.random.split(key, 3)
        initial = jax.nn.initializers.lecun_normal()
        self.gate = nnx.Param(initial(gate, (width, config.hidden)), axes=("embed", "mlp"))
        self.up = nnx.Param(initial(up, (width, config.hidden)), axes=("embed", "mlp"))
        self.down = nnx.Param(initial(down, (config.hidden, width)), axes=("mlp", "embed"))
        self.gate_bias = nnx.Param(jnp.zeros(config.hidden), axes=("mlp",)) if config.bias else None
        self.up_bias = nnx.Param(jnp.zeros(config.hidden), axes=("mlp",)) if config.bias else None
        self.down_bias = nnx.Param(jnp.zeros(width), axes=("embed",)) if config.bias else None

    def __call__(
        self, x: Float[Array, "*batch D"], context: RoutingContext = NO_CONTEXT, tap: Tap = no_tap
    ) -> tuple[Float[Array, "*batch D"], None]:
        tap("ffn", x, None)
        gate, up = added(linear(x, self.gate[...]), self.gate_bias), added(linear(x, self.up[...]), self.up_bias)
        return added(linear(jax.nn.silu(gate) * up, self.down[...]), self.down_bias), None


@dataclass(frozen=True, kw_only=True)
class EveryNth:
    """`ffn` in one layer of each n, `otherwise` in the rest: GShard and Switch (n = 2), ST-MoE and NLLB (n = 4), Jamba,
    Llama 4 Maverick."""

    ffn: LayerPattern
    """The network of every n-th layer."""
    otherwise: LayerPattern = Dense()
    """The network of the other layers."""
    n: int = 2
    """Distance between two layers with `ffn`."""
    offset: int | None = None
    """The first layer with `ffn`, from 0 to n - 1; None: n - 1, the last of each n."""

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"EveryNth.n is {self.n}; it must be at least 1")
        if self.offset is not None and not 0 <= self.offset < self.n:
            raise ValueError(f"EveryNth.offset is {self.offset}; with n={self.n} it must be from 0 to {self.n - 1}")

    def at(self, layer: int) -> FeedForward:
        offset = self.n - 1 if self.offset is None else self.offset
        return (self.ffn if layer % self.n == offset else self.otherwise).at(layer)


@dataclass(frozen=True, kw_only=True)
class FirstLayers:
    """`first` in the first `count` layers, `ffn` after them: DeepSeek-V2 and V3, GLM-4.5. With two mixtures it is the
    pyramid of DeepSpeed-MoE, which has more experts in later layers."""

    ffn: LayerPattern
    """The network after the first layers."""
    first: LayerPattern = Dense()
    """The network of the first layers."""
    count: int = 1
    """How many layers are first."""

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"FirstLayers.count is {self.count}; it must be at least 0")

    def at(self, layer: int) -> FeedForward:
        return (self.first if layer < self.count else self.ffn).at(layer)


@dataclass(frozen=True, kw_only=True)
class AtLayers:
    """`ffn` in the layers that are named, `otherwise` in the rest: V-MoE's last few of every second layer, or the list
    of dense layers in Qwen's configurations, with a mixture as `otherwise`."""

    ffn: LayerPattern
    """The network of the named layers."""
    layers: tuple[int, ...]
    """Their numbers, from 0."""
    otherwise: LayerPattern = Dense()
    """The network of the other layers."""

    def __post_init__(self):
        if wrong := [layer for layer in self.layers if layer < 0]:
            raise ValueError(f"AtLayers.layers holds {wrong[0]}; layers are numbered from 0")

    def at(self, layer: int) -> FeedForward:
        return (self.ffn if layer in self.layers else self.otherwise).at(layer)
