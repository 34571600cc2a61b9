"""Latent experts: one projection before all routed experts of a layer and one behind them.

Elango et al. 2026 (LatentMoE), https://arxiv.org/abs/2601.18089: tokens are carried to the experts, and the experts
work, in a width of W instead of D. The bytes that are moved and the weights of an expert shrink by D / W, which pays
for more experts and more of them per token. The router, shared experts and the residual network stay in the full width.
Liu et al. 2025 (MoLAE), https://arxiv.org/abs/2503.23100, factorize the experts of a trained model in a like way, each
of their matrices on its own; here one projection serves the whole expert. Letters: T tokens, D width, W latent width.
"""

from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float


@dataclass(frozen=True, kw_only=True)
class Latent:
    """The routed experts work in a narrower width."""

    width: int = 64
    """Latent width W, which the experts have on both sides."""

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"Latent.width is {self.width}; it must be at least 1")

    def build(self, *, width: int, key: jax.Array) -> "LatentProjections":
        """Build the projections for tokens of `width`."""
        return LatentProjections(self, width=width, key=key)


class LatentProjections(nnx.Module):
    """Weights down [D, W] and up [W, D], without biases, used in the dtype of the tokens."""

    def __init__(self, config: Latent, *, width: int, key: jax.Array):
        down, up = jax.random.split(key)
        initial = jax.nn.initializers.lecun_normal()
        self.config = config
        self.down = nnx.Param(initial(down, (width, config.width)), axes=("embed", "mlp"))
        self.up = nnx.Param(initial(up, (config.width, width)), axes=("mlp", "embed"))

    def enter(self, tokens: Float[Array, "T D"]) -> Float[Array, "T W"]:
        """What is dispatched to the experts."""
        return tokens @ self.down[...].astype(tokens.dtype)

    def leave(self, y: Float[Array, "T W"]) -> Float[Array, "T D"]:
        """What the combined outputs of the experts become: the projection is linear, so once a token is enough."""
        return y @ self.up[...].astype(y.dtype)
