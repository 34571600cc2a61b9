"""Experts: E feed-forward networks of one shape, held and run as one batched module.

Letters: E experts, D width, F hidden width of an expert, C rows per expert, M rows sorted by expert.
"""

import abc
import functools
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..kernels import grouped_matmul
from ..kernels.quantized import Quantized, dequantize
from .token_moves import TokenMoves


@runtime_checkable
class ExpertsModule(Protocol):
    """Built experts: an `nnx.Module` over the rows of a dispatcher."""

    def __call__(self, rows: Float[Array, "..."], group_sizes: Int[Array, " E"] | None) -> Float[Array, "..."]:
        """Run each expert on its rows, and return [E, C, D], or [M, D].

        With `group_sizes` None they are equal batches [E, C, D], or one batch [1, C, D] that all experts share;
        else they are sorted by expert, [M, D].
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Experts(abc.ABC):
    """Configuration of the experts of a layer. A dataclass, so that the command line shows the fields of experts that
    may be None."""

    @abc.abstractmethod
    def build(self, *, experts: int, width: int, key: jax.Array) -> ExpertsModule:
        """Build `experts` networks from `width` to `width`; weights that one expert owns have the axis "expert"."""


@dataclass(frozen=True, kw_only=True)
class SwiGLU(Experts):
    """Gated experts, down(silu(gate x) * up x), without biases. Shazeer 2020, https://arxiv.org/abs/2002.05202."""

    hidden: int = 256
    """Hidden width F of each expert."""
    implementation: str | None = None
    """Of the grouped matrix multiplications, see `kernels.grouped_matmul`; none: the platform's best."""

    def __post_init__(self):
        check_hidden(self)

    def build(self, *, experts: int, width: int, key: jax.Array) -> "SwiGLUExperts":
        return SwiGLUExperts(self, experts=experts, width=width, key=key)


class SwiGLUExperts(nnx.Module):
    """Weights gate and up [E, D, F] and down [E, F, D], used in the dtype of the rows."""

    def __init__(self, config: SwiGLU, *, experts: int, width: int, key: jax.Array):
        gate, up, down = jax.random.split(key, 3)
        self.config = config
        self.gate = inward_weight(gate, experts, width, config.hidden)
        self.up = inward_weight(up, experts, width, config.hidden)
        self.down = outward_weight(down, experts, config.hidden, width)

    def __call__(self, rows: Float[Array, "..."], group_sizes: Int[Array, " E"] | None) -> Float[Array, "..."]:
        gate, up, down = (w[...].astype(rows.dtype) for w in (self.gate, self.up, self.down))
        multiply = functools.partial(expert_matmul, implementation=self.config.implementation)
        hidden = jax.nn.silu(multiply(rows, gate, group_sizes)) * multiply(rows, up, group_sizes)
        return multiply(hidden, down, group_sizes)

    def on_tokens(self, moves: TokenMoves) -> Float[Array, "T D"]:
        """See `TokenExperts`."""
        gate, up, down = (w[...].astype(moves.x.dtype) for w in (self.gate, self.up, self.down))
        return moves.leave(jax.nn.silu(moves.enter(gate)) * moves.enter(up), down)


@dataclass(frozen=True, kw_only=True)
class GELU(Experts):
    """Experts of two matrices, down(gelu(up x)), without biases. Hendrycks and Gimpel 2016,
    https://arxiv.org/abs/1606.08415, the exact form."""

    hidden: int = 256
    """Hidden width F of each expert."""
    implementation: str | None = None
    """Of the grouped matrix multiplications, see `kernels.grouped_matmul`; none: the platform's best."""

    def __post_init__(self):
        check_hidden(self)

    def build(self, *, experts: int, width: int, key: jax.Array) -> "GELUExperts":
        return GELUExperts(self, experts=experts, width=width, key=key)


class GELUExperts(nnx.Module):
    """Weights up [E, D, F] and down [E, F, D], used in the dtype of the rows."""

    def __init__(self, config: GELU, *, experts: int, width: int, key: jax.Array):
        up, down = jax.random.split(key)
        self.config = config
        self.up = inward_weight(up, experts, width, config.hidden)
        self.down = outward_weight(down, experts, config.hidden, width)

    def __call__(self, rows: Float[Array, "..."], group_sizes: Int[Array, " E"] | None) -> Float[Array, "..."]:
        up, down = (w[...].astype(rows.dtype) for w in (self.up, self.down))
        multiply = functools.partial(expert_matmul, implementation=self.config.implementation)
        return multiply(jax.nn.gelu(multiply(rows, up, group_sizes), approximate=False), down, group_sizes)

    def on_tokens(self, moves: TokenMoves) -> Float[Array, "T D"]:
        """See `TokenExperts`."""
        up, down = (w[...].astype(moves.x.dtype) for w in (self.up, self.down))
        return moves.leave(jax.nn.gelu(moves.enter(up), approximate=False), down)


def check_hidden(config: Any) -> None:
    """Refuse a hidden width below 1."""
    if config.hidden < 1:
        raise ValueError(f"{type(config).__name__}.hidden is {config.hidden}; it must be at least 1")


def inward_weight(key: jax.Array, experts: int, width: int, hidden: int) -> nnx.Param:
    """A fresh weight [E, D, F] of variance 1 / D."""
    return nnx.Param(_INITIAL(key, (experts, width, hidden)), axes=(expert_axis(experts), "embed", "mlp"))


def outward_weight(key: jax.Array, experts: int, hidden: int, width: int) -> nnx.Param:
    """A fresh weight [E, F, D] of variance 1 / F."""
    return nnx.Param(_INITIAL(key, (experts, hidden, width)), axes=(expert_axis(experts), "mlp", "embed"))


_INITIAL = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)


def expert_axis(experts: int) -> str | None:
    """One expert alone runs for every token on every device: it is not split."""
    return "expert" if experts > 1 else None


def expert_matmul(
    rows: Float[Array, "..."],
    weight: Float[Array, "E I O"] | Quantized,
    group_sizes: Int[Array, " E"] | None,
    *,
    implementation: str | None = None,
) -> Float[Array, "..."]:
    """Multiply each expert's rows by its own matrix.

    Args:
        rows: equal batches [E, C, I]; or [1, C, I], a batch that all experts share; or rows sorted by expert [M, I].
        weight: [E, I, O]; or packed, with no gradient: unpacked inside the grouped product, whole for equal batches.
        group_sizes: rows of each expert where they are sorted, else None.
        implementation: of the product over sorted rows, see `kernels.grouped_matmul`.

    Returns:
        [E, C, O], or [M, O].

    Raises:
        ValueError: the shapes do not fit, or as `kernels.grouped_matmul` does.
    """
    experts, inputs, outputs = weight.shape
    if group_sizes is not None:
        return grouped_matmul(rows, weight, group_sizes, implementation=implementation)
    if isinstance(weight, Quantized):
        weight = jax.lax.stop_gradient(dequantize(weight))
    if rows.ndim == 3 and rows.shape[0] == experts > 1:
        return jnp.einsum("eci,eio->eco", rows, weight)
    if rows.ndim != 3 or rows.shape[0] != 1:
        raise ValueError(
            f"rows have shape {rows.shape} and group_sizes is None; they must be [{experts}, C, {inputs}], or "
            f"[1, C, {inputs}] shared by all experts"
        )
    # One wide product: XLA on CPU sums the gradient of broadcast rows 4 times slower (experiments/LOG.md).
    wide = rows[0] @ weight.swapaxes(0, 1).reshape(inputs, experts * outputs)
    return wide.reshape(-1, experts, outputs).swapaxes(0, 1)


def expert_bias(
    y: Float[Array, "..."], bias: Float[Array, "E O"], group_sizes: Int[Array, " E"] | None
) -> Float[Array, "..."]:
    """Add each expert's bias to its rows: y [E, C, O], or sorted [M, O]. Rows of nobody, past the last, get none."""
    bias = bias.astype(y.dtype)
    if group_sizes is None:
        return y + bias[:, None]
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(y.shape[0]), side="right")
    return y + bias.at[expert].get(mode="fill", fill_value=0)
