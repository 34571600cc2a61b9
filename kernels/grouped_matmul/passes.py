"""What a kernel of a grouped matmul has to do, as far as the choice of its tiles goes.

Letters: M rows, D inner width, F output width, E groups.
"""

import math
from dataclasses import dataclass

import jax

from ..quantized import Quantized, QuantizedRows

LARGEST = 128
"""Of a tile's edge along groups of scales."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a kernel does: [rows, depth] times a [depth, columns] of each of the groups, or, for dw, their sums."""

    rows: int
    depth: int
    columns: int
    groups: int
    bits: int
    """Of an element of x."""
    matrix_bits: int
    """Of an element of w as it is stored."""
    numbers: str = ""
    """The dtype of x, and of packed matrices the format and the size of its groups: what tiles were measured for."""
    transposed: bool = False
    """The matrices are read transposed, as dx reads them."""
    outer: bool = False
    """The pass is dw: it sums over rows and writes a [depth, columns] for each group."""
    depth_unit: int = 1
    column_unit: int = 1
    """A tile's depth and columns are multiples of these, or whole: packed matrices cannot be cut anywhere."""
    deepest: int | None = None
    """The largest depth of a tile; None: any."""
    widest: int | None = None
    """The largest number of its columns; None: any."""

    @property
    def packed(self) -> bool:
        return self.matrix_bits < self.bits


def pass_of(which: str, x: jax.Array | QuantizedRows, w: jax.Array | Quantized, dy: jax.Array) -> Pass:
    """What the kernel of "forward", "dx" or "dw" has to do."""
    rows = dy if which == "dx" else x.codes if isinstance(x, QuantizedRows) else x
    if which == "dw":
        return outer_pass(rows, rows, dy, w.shape[0])
    if isinstance(w, Quantized):
        return packed_pass(rows, w, which == "dx")
    return product_pass(rows, rows, w, which == "dx")


def product_pass(places: jax.Array, x: jax.Array, w: jax.Array, transposed: bool) -> Pass:
    """Of as many rows as there are places."""
    columns, bits = w.shape[1 if transposed else 2], 8 * x.dtype.itemsize
    return Pass(
        rows=places.shape[0],
        depth=x.shape[1],
        columns=columns,
        groups=w.shape[0],
        bits=bits,
        matrix_bits=bits,
        numbers=x.dtype.name,
        transposed=transposed,
    )


def outer_pass(places: jax.Array, x: jax.Array, dy: jax.Array, groups: int) -> Pass:
    """Of as many rows as there are places."""
    bits = 8 * x.dtype.itemsize
    return Pass(
        rows=places.shape[0],
        depth=x.shape[1],
        columns=dy.shape[1],
        groups=groups,
        bits=bits,
        matrix_bits=bits,
        numbers=x.dtype.name,
        outer=True,
    )


def packed_pass(rows: jax.Array, w: Quantized, transposed: bool) -> Pass:
    """With tiles that lie in one group of scales."""
    within = None if w.group_size == w.shape[1] else math.gcd(LARGEST, w.group_size)
    return Pass(
        rows=rows.shape[0],
        depth=rows.shape[1],
        columns=w.shape[1 if transposed else 2],
        groups=w.shape[0],
        bits=8 * rows.dtype.itemsize,
        matrix_bits=w.format.bits,
        numbers=f"{rows.dtype.name} x {w.format.name} {w.group_size}",
        transposed=transposed,
        deepest=None if transposed else within,
        widest=within if transposed else None,
    )
