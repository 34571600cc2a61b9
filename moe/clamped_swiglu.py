"""The experts of gpt-oss. OpenAI 2025, https://arxiv.org/abs/2508.10925.

Letters: E experts, D width, F hidden width, M rows sorted by expert.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .experts import Experts, check_hidden, expert_axis, expert_bias, expert_matmul, inward_weight, outward_weight


@dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU(Experts):
    """Gated experts with biases: down((u + 1) * g * sigmoid(alpha g)), where g = gate x is clamped from above, and
    u = up x from both sides."""

    hidden: int = 256
    """Hidden width F of each expert."""
    alpha: float = 1.702
    """Gain inside the sigmoid."""
    limit: float = 7.0
    """Where gate and up are clamped."""
    implementation: str | None = None
    """Of the grouped matrix multiplications, see `kernels.grouped_matmul`; none: the platform's best."""

    def __post_init__(self):
        check_hidden(self)
        for name in ("alpha", "limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"ClampedSwiGLU.{name} is {getattr(self, name)}; it must be positive and finite")

    def build(self, *, experts: int, width: int, key: jax.Array) -> "ClampedSwiGLUExperts":
        return ClampedSwiGLUExperts(self, experts=experts, width=width, key=key)


class ClampedSwiGLUExperts(nnx.Module):
    """Weights gate and up [E, D, F] and down [E, F, D], their biases [E, F] and [E, D], in the dtype of the rows."""

    def __init__(self, config: ClampedSwiGLU, *, experts: int, width: int, key: jax.Array):
        gate, up, down = jax.random.split(key, 3)
        axis = expert_axis(experts)
        self.config = config
        self.gate = inward_weight(gate, experts, width, config.hidden)
        self.up = inward_weight(up, experts, width, config.hidden)
        self.down = outward_weight(down, experts, config.hidden, width)
        self.gate_bias = nnx.Param(jnp.zeros((experts, config.hidden)), axes=(axis, "mlp"))
        self.up_bias = nnx.Param(jnp.zeros((experts, config.hidden)), axes=(axis, "mlp"))
        self.down_bias = nnx.Param(jnp.zeros((experts, width)), axes=(axis, "embed"))

    def __call__(self, rows: Float[Array, "..."], group_sizes: Int[Array, " E"] | None) -> Float[Array, "..."]:
        config = self.config
        gate, up, down = (w[...].astype(rows.dtype) for w in (self.gate, self.up, self.down))
        multiply = functools.partial(expert_matmul, implementation=config.implementation)
        g = expert_bias(multiply(rows, gate, group_sizes), self.gate_bias[...], group_sizes)
        u = expert_bias(multiply(rows, up, group_sizes), self.up_bias[...], group_sizes)
        g, u = jnp.minimum(g, config.limit), jnp.clip(u, -config.limit, config.limit)
        hidden = (u + 1) * g * jax.nn.sigmoid(config.alpha * g)
        # Where a mesh splits F, each part adds its share of the bias, for the parts' outputs are summed.
        parts = config.hidden // gate.shape[-1]
        return expert_bias(multiply(hidden, down, group_sizes), self.down_bias[...] / parts, group_sizes)
