"""A tile of a group's matrix for a TPU kernel, whether the matrix is plain or packed.

What is packed enters VMEM packed, its codes and the scales of its groups, and is unpacked there: the bytes of a tile
are reinterpreted as numbers of four or two bits along the rows, in the order in which `kernels.quantized` packs them.
Letters: E groups, D inner width, F output width.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..quantized import Quantized

REGISTER_ROWS = {1: 32, 4: 8}
"""Rows of a vector register, by bytes of an element. A block has a multiple of them, or all rows there are."""
OF_BITS = {2: jnp.int2, 4: jnp.int4}

Index = Callable[..., tuple[Any, Any, Any]]


def matrix_bits(w: jax.Array | Quantized) -> int:
    """Of an element, without scales."""
    return w.format.bits if isinstance(w, Quantized) else 8 * w.dtype.itemsize


def inner_unit(w: jax.Array | Quantized) -> int:
    """A tile has a multiple of so many rows of D, or all of them.

    Raises:
        NotImplementedError: groups of this size cannot be told apart inside vector registers.
    """
    if not isinstance(w, Quantized):
        return 1
    unit = REGISTER_ROWS[1] * w.format.per_byte
    if w.scales.shape[-2] == 1:
        return unit
    if w.group_size % REGISTER_ROWS[4]:
        raise NotImplementedError(
            f"w is packed in groups of {w.group_size} rows; mosaic_tpu takes multiples of {REGISTER_ROWS[4]}, "
            "or all of D"
        )
    of_groups = [
        w.group_size * REGISTER_ROWS[leaf.dtype.itemsize] for leaf in (w.scales, w.zero_points) if leaf is not None
    ]
    return math.lcm(unit, *of_groups)


def matrix_spec(w: jax.Array | Quantized, inner: int, width: int, index: Index) -> Any:
    """The blocks of `inner` rows of D and `width` columns of F.

    Args:
        index: from the grid's step to the group, and to the block along D and along F.
    """
    block = pl.BlockSpec((None, inner, width), index)
    if not isinstance(w, Quantized):
        return block
    codes = pl.BlockSpec((None, inner // w.format.per_byte, width), index)
    if w.scales.shape[-2] == 1:

        def for_all_rows(*step):
            group, _, column = index(*step)
            return group, 0, column

        scales = pl.BlockSpec((None, 1, width), for_all_rows)
    else:
        scales = pl.BlockSpec((None, inner // w.group_size, width), index)
    return replace(w, codes=codes, scales=scales, zero_points=None if w.zero_points is None else scales)


def load_matrix(w: Any) -> jax.Array:
    """The tile as numbers, given its blocks."""
    if not isinstance(w, Quantized):
        return w[...]
    codes, format = w.codes[...], w.format
    if format.bits < 8:
        codes = pltpu.bitcast(codes, OF_BITS[format.bits]).astype(jnp.int32)
    # A code that stands alone in its word is what stands in the lowest bits of a byte.
    numbers = codes.astype(jnp.float32) if not format.table else format.numbers(codes, 0)
    scales = format.scales(w.scales[...])
    by_scale = numbers.reshape(scales.shape[0], -1, numbers.shape[1]) if scales.shape[0] > 1 else numbers[None]
    if w.zero_points is not None:
        by_scale -= w.zero_points[...].astype(jnp.float32)[:, None, :]
    return (by_scale * scales[:, None, :]).reshape(numbers.shape).astype(w.dtype)
