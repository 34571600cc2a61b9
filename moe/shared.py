"""Shared experts whose output a gate of their own weights, token by token.

A plain shared expert needs nothing of this: `MoE(shared=SwiGLU(hidden=n * F))`. Letters: E experts, D width, C rows per
expert, M rows sorted by expert.
"""

from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from .experts import Experts, ExpertsModule, SwiGLU, expert_axis, expert_matmul


@dataclass(frozen=True, kw_only=True)
class GatedShared(Experts):
    """sigmoid(x w) * expert(x), as Qwen1.5-MoE and Qwen2-MoE weight their shared expert: Yang et al. 2024,
    https://arxiv.org/abs/2407.10671, and the released models. `MoE(shared=GatedShared(expert=SwiGLU(hidden=F)))`.
    """

    expert: Experts = SwiGLU()
    """The network whose output is weighted."""

    def build(self, *, experts: int, width: int, key: jax.Array) -> "GatedSharedExperts":
        return GatedSharedExperts(self, experts=experts, width=width, key=key)


class GatedSharedExperts(nnx.Module):
    """The expert and its gate [E, D, 1], used in the dtype of the rows."""

    def __init__(self, config: GatedShared, *, experts: int, width: int, key: jax.Array):
        expert, gate = jax.random.split(key)
        self.config = config
        self.expert: ExpertsModule = config.expert.build(experts=experts, width=width, key=expert)
        initial = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        self.gate = nnx.Param(initial(gate, (experts, width, 1)), axes=(expert_axis(experts), "embed", None))

    def __call__(self, rows: Float[Array, "..."], group_sizes: Int[Array, " E"] | None) -> Float[Array, "..."]:
        gate = expert_matmul(rows, self.gate[...].astype(rows.dtype), group_sizes)
        return jax.nn.sigmoid(gate) * self.expert(rows, group_sizes)
