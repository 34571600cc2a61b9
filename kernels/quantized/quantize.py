"""From an array to its packed form and back. In float32 held to qwix 0.1.8, bit by bit, for every format that it has.

Letters: M rows, D the axis that products sum over, F output width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from .formats import INT8, SMALLEST_SCALE, Format, exponents_of
from .packed import DTYPES, Quantized, checked_dtype


def quantize(
    array: Float[Array, "*lead D F"], format: Format, *, group_size: int | None = None, zero_points: bool = False
) -> Quantized:
    """Round an array to the nearest numbers of a format, group by group along D.

    Without zero points a group's largest magnitude goes to the format's largest number; with them, the interval of the
    group's numbers and zero goes to that of the codes. A group that holds NaN or infinity becomes NaN; one of zeros
    stays zeros. mxfp4 differs from section 6.3 of its specification: the power of two is rounded up, as qwix does, so
    that a block's largest number is never cut off.

    Args:
        array: float32 or bfloat16; computed in float32.
        format: one of `FORMATS`.
        group_size: neighbours along D that share a scale, a divisor of D; None: the format's block (nf4: 64,
            mxfp4: 32, and no other), or all of D.
        zero_points: also shift each group; integers alone.

    Raises:
        ValueError: D does not divide into groups, or groups not into bytes; the format does not have such groups or
            zero points; or dtype or rank are others.
    """
    size = _checked_group_size(array, format, group_size, zero_points)
    *lead, inner, width = array.shape
    grouped = array.astype(jnp.float32).reshape(*lead, inner // size, size, width)
    points = None
    if zero_points:
        least, greatest = format.range
        low = jnp.minimum(jnp.min(grouped, axis=-2), 0.0)
        scales = _usable((jnp.maximum(jnp.max(grouped, axis=-2), 0.0) - low) / (greatest - least))
        points = jnp.clip(jnp.round(_zero_for_nan(least - low / scales)), least, greatest)
    else:
        scales = _usable(jnp.max(jnp.abs(grouped), axis=-2) / format.largest)
    stored = exponents_of(scales) if format.power_of_two else scales
    numbers = grouped / format.scales(stored)[..., None, :]
    if points is not None:
        numbers += points[..., None, :]
        points = points.astype(jnp.int8)
    codes = format.codes(_zero_for_nan(numbers).reshape(array.shape))
    return Quantized(
        codes=format.pack(codes),
        scales=stored,
        zero_points=points,
        format=format,
        group_size=size,
        dtype=jnp.dtype(array.dtype),
    )


def dequantize(array: Quantized, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*lead D F"]:
    """The numbers that a packed array stands for, computed in float32.

    Args:
        array: any number of leading axes.
        dtype: float32 or bfloat16; None: the dtype that the array stands for.
    """
    dtype = array.dtype if dtype is None else checked_dtype(dtype)
    format, width = array.format, array.shape[-1]
    lead, groups = array.shape[:-2], array.shape[-2] // array.group_size
    # A slot of the byte is an axis of its own: all is elementwise, and one loop for a compiler.
    stored = array.codes.reshape(*lead, groups, array.group_size // format.per_byte, 1, width)
    slots = jnp.arange(format.per_byte).reshape(*(1 for _ in lead), 1, 1, format.per_byte, 1)
    numbers = format.numbers(stored, slots)
    if array.zero_points is not None:
        numbers -= array.zero_points[..., None, None, :].astype(jnp.float32)
    scales = format.scales(array.scales)[..., None, None, :]
    return (numbers * scales).reshape(array.shape).astype(dtype)


class QuantizedRows(NamedTuple):
    """Activations for products of integers: row m is codes[m] * scales[m]."""

    codes: Int8[Array, "M D"]
    scales: Float[Array, "M 1"]


def quantize_rows(x: Float[Array, "M D"]) -> QuantizedRows:
    """Round each row to int8 with a scale of its own. A row that holds NaN or infinity becomes NaN."""
    wide = x.astype(jnp.float32)
    scales = _usable(jnp.max(jnp.abs(wide), axis=1, keepdims=True, initial=0.0) / INT8.largest)
    return QuantizedRows(INT8.codes(_zero_for_nan(wide / scales)), scales)


def _usable(scales: jax.Array) -> jax.Array:
    scales = jnp.where(scales < SMALLEST_SCALE, 1.0, scales)
    return jnp.where(jnp.isfinite(scales), scales, np.float32(np.nan))


def _zero_for_nan(numbers: jax.Array) -> jax.Array:
    """What rounding NaN to an integer gives is not defined; its scale says that it is NaN."""
    return jnp.where(jnp.isnan(numbers), 0.0, numbers)


def _checked_group_size(array: jax.Array, format: Format, group_size: int | None, zero_points: bool) -> int:
    if array.ndim < 2:
        raise ValueError(f"array has shape {array.shape}; it must be [..., D, F]")
    if array.dtype not in DTYPES:
        raise ValueError(f"array has dtype {array.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    inner = array.shape[-2]
    if format.power_of_two and group_size not in (None, format.block):
        raise ValueError(f"group_size is {group_size}; {format.name} has groups of {format.block} alone")
    size = group_size if group_size is not None else format.block or inner
    if size < 1 or inner % size:
        raise ValueError(f"group_size is {size}; it must divide D, the second-last axis, which is {inner}")
    if size % format.per_byte:
        raise ValueError(
            f"a group has {size} rows of D; {format.name} packs {format.per_byte} of them into a byte, so it must be a "
            f"multiple of {format.per_byte}"
        )
    if zero_points and not format.is_integer:
        raise ValueError(f"zero_points is True; the codes of {format.name} are not integers and have none")
    return size
