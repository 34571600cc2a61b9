"""How `blocked` reads w, plain or packed: a group's matrix, or a few rows of each row's own matrix.

Letters: M rows, D inner width, F output width, E groups.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp

from ..quantized import Quantized, QuantizedRows, dequantize


def sliceable(w: jax.Array | Quantized) -> jax.Array | Quantized:
    """The same, with 8-bit floats as their bits.

    XLA on CPU would widen all of them to 16 bits before it takes a slice; so it only copies them.
    """
    if not isinstance(w, Quantized) or w.codes.dtype != jnp.float8_e4m3fn:
        return w
    return replace(w, codes=jax.lax.bitcast_convert_type(w.codes, jnp.uint8))


def take(array, index):
    """The entry of the leading axis. The index is in bounds: care about negative ones would be a kernel of its own."""
    return jax.lax.dynamic_index_in_dim(array, index, keepdims=False, allow_negative_indices=False)


def take_matrix(w: jax.Array | Quantized, group: jax.Array, x: jax.Array | QuantizedRows):
    """A group's matrix [D, F] for a product with rows of x: unpacked, unless the rows are packed too."""
    matrix = jax.tree.map(lambda leaf: take(leaf, group), w)
    return dequantize(matrix, x.dtype) if isinstance(w, Quantized) and not isinstance(x, QuantizedRows) else matrix


def multiply_block(rows: jax.Array | QuantizedRows, matrix: jax.Array | Quantized, contract: int) -> jax.Array:
    """The product with a matrix of `take_matrix` over its axis `contract`, in the dtype of the rows."""
    if isinstance(rows, QuantizedRows):
        assert isinstance(matrix, Quantized) and contract == 0
        return _dot(rows.codes, matrix.codes, 0, jnp.int32).astype(jnp.float32) * rows.scales * matrix.scales
    return _dot(rows, matrix, contract, jnp.float32).astype(rows.dtype)


def _dot(rows, matrix, contract: int, sums: jax.typing.DTypeLike) -> jax.Array:
    return jax.lax.dot_general(rows, matrix, (((1,), (contract,)), ((), ())), preferred_element_type=sums)


def step_size(w: jax.Array | Quantized) -> int:
    """So many rows of its matrix a row of x meets in a step of `multiply_step`: whole bytes, and of one scale."""
    limit = math.gcd(8, w.shape[1])
    # A group of scales holds whole bytes, at most four codes each; so the divisor does too.
    return math.gcd(limit, w.group_size) if isinstance(w, Quantized) else limit


def multiply_step(columns: jax.Array, w: jax.Array | Quantized, group: jax.Array, i: jax.Array) -> jax.Array:
    """The part [M, F] of the product that step i adds: `columns` of x [M, step] times these rows of each row's matrix.

    The gathers, the unpacking and the sum fuse: what is unpacked is never stored. Sums are of the columns' dtype.
    """
    step = columns.shape[1]
    if not isinstance(w, Quantized):
        rows = [_gather(w, group, i * step + k).astype(columns.dtype) for k in range(step)]
        return _weighted_sum(columns, rows)
    per_byte, steps_per_scale = w.format.per_byte, w.group_size // step
    rows = []
    for k in range(step // per_byte):
        stored = _gather(w.codes, group, i * (step // per_byte) + k)
        rows += [w.format.numbers(stored, slot) for slot in range(per_byte)]
    if w.zero_points is not None:
        zero = _gather(w.zero_points, group, i // steps_per_scale).astype(jnp.float32)
        rows = [row - zero for row in rows]
    return _weighted_sum(columns, rows) * w.format.scales(_gather(w.scales, group, i // steps_per_scale))


def _gather(leaf: jax.Array, group: jax.Array, row: jax.Array) -> jax.Array:
    """This row of each one's matrix [M, F], out of [E, rows, F]."""
    flat = leaf.reshape(-1, leaf.shape[2])
    return flat.at[group * leaf.shape[1] + row].get(mode="promise_in_bounds")


def _weighted_sum(columns: jax.Array, rows: list[jax.Array]) -> jax.Array:
    first, *others = (columns[:, k : k + 1] * row for k, row in enumerate(rows))
    return sum(others, first)
