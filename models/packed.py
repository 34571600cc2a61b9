"""Packed weights of linear maps: what takes the place of a parameter, and the product with it.

A kernel [*in, *out] is packed as one matrix [in, out], so that groups may be longer than a head; an embedding [V, D] as
[D, V], groups along the width, so that it can be the head too. Letters: T tokens, D width, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..kernels import grouped_matmul
from ..kernels.quantized import Quantized, dequantize
from ..moe import QuantizedWeight


class PackedKernel(NamedTuple):
    """A kernel [*into, *out] of `models.linear.linear`."""

    matrix: Quantized
    """[in, out]."""
    into: tuple[int, ...]
    out: tuple[int, ...]


class PackedTable(NamedTuple):
    """An embedding [V, D] of `models.linear.look_up`."""

    matrix: Quantized
    """[D, V]."""

    @property
    def T(self) -> PackedKernel:
        """The head that a tied embedding is."""
        width, vocab = self.matrix.shape
        return PackedKernel(self.matrix, (width,), (vocab,))


class QuantizedKernel(QuantizedWeight):
    """The variable of a packed kernel: `kernel[...]` is a `PackedKernel`. Its value has a leading axis where layers are
    stacked; `into` and `out` are shapes of one layer, and `axes` are of the value's."""

    def __getitem__(self, index: Any) -> Any:
        metadata = self.get_metadata()
        return PackedKernel(self.get_value()[index], metadata["into"], metadata["out"])


class QuantizedTable(QuantizedWeight):
    """The variable of a packed embedding: `table[...]` is a `PackedTable`."""

    def __getitem__(self, index: Any) -> Any:
        return PackedTable(self.get_value()[index])


def packed_linear(
    x: Float[Array, "..."], kernel: PackedKernel, *, inputs: int, dtype: DTypeLike | None
) -> Float[Array, "..."]:
    """`models.linear.linear` with a packed kernel: a grouped product of one group, which unpacks within its tiles. The
    kernel has no gradient.

    Raises:
        ValueError: the kernel sums over another number of axes, or over other lengths.
    """
    batch, into = x.shape[: x.ndim - inputs], x.shape[x.ndim - inputs :]
    if into != kernel.into:
        raise ValueError(
            f"x has shape {x.shape}, its last {inputs} axes are summed; the kernel sums over {kernel.into}"
        )
    # Sums and results of another dtype than x come with rows of it: a grouped product has one dtype.
    tokens = x.reshape(math.prod(batch), math.prod(into)).astype(dtype or x.dtype)
    one_group = jax.tree.map(lambda leaf: leaf[None], kernel.matrix.astype(tokens.dtype))
    with jax.ensure_compile_time_eval():  # known now, so that nothing needs to check it in every call
        sizes = jnp.array([len(tokens)], jnp.int32)
    return grouped_matmul(tokens, one_group, sizes).reshape(*batch, *kernel.out)


def packed_look_up(table: PackedTable, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of an embedding, unpacked; NaN where a token is outside the vocabulary."""
    width, vocab = table.matrix.shape
    flat = tokens.reshape(-1)
    columns = jax.tree.map(lambda leaf: leaf[:, jnp.clip(flat, 0, vocab - 1)], table.matrix)
    rows = jax.lax.stop_gradient(dequantize(columns)).T
    known = (flat >= 0) & (flat < vocab)
    rows = jnp.where(known[:, None], rows, jnp.full((), np.nan, rows.dtype))
    return rows.reshape(*tokens.shape, width)
