"""Top-k routing.

Shazeer et al. 2017, "Outrageously Large Neural Networks", https://arxiv.org/abs/1701.06538, without the learned noise;
k = 1 is the router of Switch Transformer, https://arxiv.org/abs/2101.03961; k = 2 renormalised is Mixtral's; sigmoid
scores renormalised are DeepSeek-V3's, without its groups and bias.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..routing import Router, Routing, RoutingContext
from ..scores import Scores, Softmax, normalized
from .gate import Gate


@dataclass(frozen=True, kw_only=True)
class TopK(Router):
    """Each token goes to the k experts that score highest, in float32."""

    k: int = 2
    """Experts per token."""
    scores: Scores = Softmax()
    """What the logits become: the scores choose and weight the experts."""
    renormalize: bool = True
    """Divide the k weights by their sum (Mixtral, Qwen3-MoE). With k = 1 it must be False (Switch): the weight would be
    a constant 1, and the router would learn from the balance loss alone."""
    jitter: float = 0.0
    """In training, multiply the router's input by noise, uniform from 1 - jitter to 1 + jitter (Switch: 0.01)."""

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"TopK.k is {self.k}; it must be at least 1 expert per token")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"TopK.jitter is {self.jitter}; it must be at least 0 and below 1")
        if self.k == 1 and self.renormalize:
            raise ValueError(
                "TopK.renormalize is True with k=1: every weight would be 1 and the task would teach the router "
                "nothing; it must be False"
            )

    @property
    def experts_per_token(self) -> float:
        return float(self.k)

    @property
    def weight_sum(self) -> float | None:
        return 1.0 if self.renormalize else None

    def build(self, *, width: int, experts: int, key: jax.Array) -> "TopKRouter":
        if self.k > experts:
            raise ValueError(f"TopK.k is {self.k}; with {experts} experts it must be at most {experts}")
        return TopKRouter(self, width=width, experts=experts, key=key)


class TopKRouter(nnx.Module):
    """A linear map to expert logits, scores and a top-k. With jitter it needs `context.key` in training."""

    def __init__(self, config: TopK, *, width: int, experts: int, key: jax.Array):
        self.config = config
        self.gate = Gate(width=width, experts=experts, key=key)

    def __call__(self, x: Float[Array, "T D"], context: RoutingContext) -> tuple[Routing, None]:
        x = x.astype(jnp.float32)
        if self.config.jitter and context.training:
            x = x * jitter(self.config.jitter, x.shape, context.key)
        logits = self.gate(x)
        scores, probs = self.config.scores(logits)
        weight, expert = jax.lax.top_k(scores, self.config.k)
        if self.config.renormalize:
            weight = normalized(weight)
        if context.mask is not None:
            real = context.mask[:, None]
            weight, expert = jnp.where(real, weight, 0.0), jnp.where(real, expert, logits.shape[1])
        return Routing(expert.reshape(-1), weight.reshape(-1), None, logits, probs), None


def jitter(amount: float, shape: tuple[int, ...], key: jax.Array | None) -> Float[Array, "..."]:
    """Factors of noise around 1. Fedus et al. 2021, https://arxiv.org/abs/2101.03961, appendix F."""
    if key is None:
        raise ValueError("context.key is None; a router with jitter needs a PRNG key in training")
    return jax.random.uniform(key, shape, minval=1 - amount, maxval=1 + amount)
