"""What the contenders of the benchmark multiply, as each kind of numbers, and the result in float64.

Letters: M rows, D inner width, F output width, E groups, C columns of a result that are checked.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..quantized import (
    FP8_E4M3,
    INT4,
    INT8,
    MXFP4,
    NF4,
    Format,
    Quantized,
    QuantizedRows,
    dequantize,
    quantize,
    quantize_rows,
)
from .shapes import Shape

ALLOWED_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""By the dtype of the result: of the largest element. bfloat16 keeps 8 bits: an operand that is unpacked to it, and the
result, are off by up to 0.4%."""
INT4_GROUP = 128
"""Rows of D that share an int4 scale, or what divides both. int8 has one scale per column."""
CHECKED = 3e9
"""Floating-point operations, above which of a result every row is checked in some columns alone."""
CHECKED_COLUMNS = 64


FLOATS = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16", "float16")}
"""The first is the main one."""


class Numbers(NamedTuple):
    """A kind of numbers. Letters of the passes' operands are those of `grouped_matmul`."""

    name: str
    dtype: str
    """Of x, dy and the result, and which packed weights stand for."""
    weights: Format | None = None
    integer_rows: bool = False
    """Also x is int8, a scale for each row; then the result is float32."""

    @property
    def allowed(self) -> float:
        return ALLOWED_ERROR["float32" if self.integer_rows else self.dtype]

    @property
    def unit(self) -> str:
        """Which products the hardware does."""
        return "int8" if self.integer_rows else self.dtype


class Operands(NamedTuple):
    """On the device."""

    x: jax.Array | QuantizedRows
    w: jax.Array | Quantized
    sizes: jax.Array
    dy: jax.Array


def numbers_here() -> tuple[Numbers, ...]:
    return numbers_on(jax.default_backend())


@functools.cache
def numbers_on(platform: str) -> tuple[Numbers, ...]:
    """The kinds for a platform, the main one first.

    On an accelerator that is bfloat16, and there is no float32: its units may round that to fewer bits, each its own.
    """
    floats = FLOATS.get(platform, ("bfloat16",))
    main = floats[0]
    formats = (INT8, INT4, FP8_E4M3, NF4, MXFP4) if platform == "gpu" else (INT8, INT4)
    packed = (*(Numbers(format.name, main, format) for format in formats), Numbers("int8 x int8", main, INT8, True))
    return (*(Numbers(name, name) for name in floats), *packed)


def host_operands(shape: Shape, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [M, D], w [E, D, F] and dy [M, F] in float32."""
    rows, inner, width = shape
    return _drawn(rows, inner), _host_matrices(groups, inner, width), np.ascontiguousarray(_drawn(rows, width)[::-1])


def operands(numbers: Numbers, shape: Shape, sizes: np.ndarray) -> Operands:
    """The same numbers as `host_operands`, rounded to this kind."""
    x, _, dy = host_operands(shape, len(sizes))
    x, dy = (jnp.asarray(array).astype(numbers.dtype) for array in (x, dy))
    rows = jax.jit(quantize_rows)(x) if numbers.integer_rows else x
    return Operands(rows, matrices(numbers, len(sizes), shape.inner, shape.width), jnp.asarray(sizes), dy)


def checked_columns(which: str, shape: Shape) -> np.ndarray:
    """The columns C of a pass's result that are checked: all, or some from the first to the last."""
    width = shape.inner if which == "dx" else shape.width
    all_of_them = 2 * math.prod(shape) <= CHECKED
    return np.arange(width) if all_of_them else np.unique(np.linspace(0, width - 1, CHECKED_COLUMNS, dtype=np.int64))


def in_float64(which: str, given: Operands, sizes: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A pass of what the operands stand for, in these columns."""
    if isinstance(given.x, QuantizedRows):
        rows = np.asarray(given.x.codes, np.float64) * np.asarray(given.x.scales, np.float64)
    else:
        rows = np.asarray(given.dy if which == "dx" else given.x, np.float64)
    if which == "dw":
        others = np.asarray(given.dy[:, columns], np.float64)
        result = np.zeros((len(sizes), rows.shape[1], len(columns)))
    else:
        others = np.asarray(_matrix_columns(given.w, columns, which == "dx"))
        result = np.zeros((len(rows), len(columns)))
    end = 0
    for group, size in enumerate(sizes):
        mine = slice(end, end := end + int(size))
        if not size:
            continue
        if which == "dw":
            result[group] = rows[mine].T @ others[mine]
        else:
            result[mine] = rows[mine] @ others[group].astype(np.float64)
    return result


@functools.partial(jax.jit, static_argnames="transposed")
def _matrix_columns(w: jax.Array | Quantized, columns: jax.Array, transposed: bool) -> jax.Array:
    wide = dequantize(w, jnp.float32) if isinstance(w, Quantized) else w
    return (wide[:, columns].swapaxes(1, 2) if transposed else wide[:, :, columns]).astype(jnp.float32)


@functools.lru_cache(maxsize=8)  # the kinds of one shape: cases that share matrices follow one another
def matrices(numbers: Numbers, groups: int, inner: int, width: int) -> jax.Array | Quantized:
    """w of `operands`."""
    w = jnp.asarray(_host_matrices(groups, inner, width)).astype(numbers.dtype)
    return w if numbers.weights is None else jax.jit(functools.partial(quantized_as, numbers))(w)


def quantized_as(numbers: Numbers, w: jax.Array) -> Quantized:
    """w in the format of these numbers."""
    assert numbers.weights is not None
    size = math.gcd(INT4_GROUP, w.shape[1]) if numbers.weights == INT4 else None
    return quantize(w, numbers.weights, group_size=size)


@functools.lru_cache(maxsize=1)
def _host_matrices(groups: int, inner: int, width: int) -> np.ndarray:
    return _drawn(groups, inner, width)


def _drawn(*shape: int) -> np.ndarray:
    """Normal numbers, some of them drawn and repeated: their count is prime, so that no two matrices are the same."""
    return np.resize(_pool(), shape)


@functools.cache
def _pool() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(4_194_301, np.float32)
