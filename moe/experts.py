"""Experts: E feed-forward networks of one shape, held and run as one batched module.

Letters: E experts, D width, F hidden width of an expert, C rows per expert, M rows sorted by expert.
"""

import abc
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


@runtime_checkable
class ExpertsModule(Protocol):
    """Built experts: an `nnx.Module` over the rows of a dispatcher."""

    def __call__(self, rows: Float[Array, "..."], group_sizes: Int[Array, " E"] | None) -> Float[Array, "..."]:
        """Run each expert on its rows, and return [E, C, D], or [M, D].

        With `group_sizes` None they are equal batches [E, C, D], or one batch [1, C, D] that all experts share;
        else they are sorted by expert, [M, D].
        """
        ...


class Experts(abc.ABC):
    """Configuration of the experts of a layer."""

    @abc.abstractmethod
    def build(self, *, experts: int, width: int, key: jax.Array) -> ExpertsModule:
        """Build `experts` networks from `width` to `width`; weights that one expert owns have the axis "expert"."""


@dataclass(frozen=True, kw_only=True)
class SwiGLU(Experts):
    """Gated experts, down(silu(gate x) * up x), without biases. Shazeer 2020, https://arxiv.org/abs/2002.05202."""

    hidden: int = 256
    """Hidden width F of each expert."""

    def __post_init__(self):
        if self.hidden < 1:
            raise ValueError(f"SwiGLU.hidden is {self.hidden}; it must be at least 1")

    def build(self, *, experts: int, width: int, key: jax.Array) -> "SwiGLUExperts":
        return SwiGLUExperts(self, experts=experts, width=width, key=key)


class SwiGLUExperts(nnx.Module):
    """Weights gate and up [E, D, F] and down [E, F, D], used in the dtype of the rows."""

    def __init__(self, config: SwiGLU, *, experts: int, width: int, key: jax.Array):
        gate, up, down = jax.random.split(key, 3)
        initial = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        inward, outward = (experts, width, config.hidden), (experts, config.hidden, width)
        self.gate = nnx.Param(initial(gate, inward, jnp.float32), axes=("expert", "embed", "mlp"))
        self.up = nnx.Param(initial(up, inward, jnp.float32), axes=("expert", "embed", "mlp"))
        self.down = nnx.Param(initial(down, outward, jnp.float32), axes=("expert", "mlp", "embed"))

    def __call__(self, rows: Float[Array, "..."], group_sizes: Int[Array, " E"] | None) -> Float[Array, "..."]:
        gate, up, down = (w[...].astype(rows.dtype) for w in (self.gate, self.up, self.down))
        hidden = jax.nn.silu(expert_matmul(rows, gate, group_sizes)) * expert_matmul(rows, up, group_sizes)
        return expert_matmul(hidden, down, group_sizes)


def expert_matmul(
    rows: Float[Array, "..."], weight: Float[Array, "E I O"], group_sizes: Int[Array, " E"] | None
) -> Float[Array, "..."]:
    """Multiply each expert's rows by its own matrix.

    Args:
        rows: equal batches [E, C, I]; or [1, C, I], a batch that all experts share; or rows sorted by expert [M, I].
        weight: [E, I, O].
        group_sizes: rows of each expert where they are sorted, else None.

    Returns:
        [E, C, O], or [M, O].
    """
    experts, inputs, outputs = weight.shape
    if group_sizes is not None:
        return jax.lax.ragged_dot(rows, weight, group_sizes)
    if rows.shape[0] == experts:
        return jnp.einsum("eci,eio->eco", rows, weight)
    # One wide product: XLA on CPU sums the gradient of broadcast rows 4 times slower (experiments/LOG.md).
    wide = rows[0] @ weight.swapaxes(0, 1).reshape(inputs, experts * outputs)
    return wide.reshape(-1, experts, outputs).swapaxes(0, 1)
