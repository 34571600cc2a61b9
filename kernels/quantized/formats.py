"""Number formats of few bits: which numbers their codes stand for, and how codes share a byte.

- int8, int4, int2: two's complement.
- fp8_e4m3: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433: largest 448, no infinities.
- nf4: 4-bit NormalFloat, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, appendix E.
- mxfp4: OCP Microscaling Formats (MX) v1.0, 2023, sections 5.2.2, 5.3.3 and 5.4.1,
  https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf: E2M1 codes in blocks of 32 with
  one power of two, E8M0.

What shares a byte comes from neighbouring rows of the second-last axis: byte row i holds the rows from i * 8 / bits on,
the first in the lowest bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8


@dataclass(frozen=True, kw_only=True)
class Format:
    """What the codes of an array mean. A number is its code's number times its group's scale."""

    name: str
    bits: int
    largest: float
    """The scale is a group's largest magnitude divided by this. Of integers: half a step more than the largest code,
    for so far numbers round to it."""
    dtype: np.dtype
    """Of the buffer that holds the codes: the number's own, or uint8."""
    table: tuple[float, ...] = ()
    """The numbers of codes 0, 1, ...; where only half of the codes are here, the highest bit is the sign. Empty where
    the code is the number."""
    block: int | None = None
    """The usual group size; None: all of D."""
    power_of_two: bool = False
    """Scales are powers of two, stored as E8M0, the exponent plus 127 (255: NaN); and a group is always a block."""

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    @property
    def is_integer(self) -> bool:
        return not self.table and self.dtype != jnp.float8_e4m3fn

    @property
    def range(self) -> tuple[int, int]:
        """Of an integer format, the least code and the greatest."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def numbers(self, stored: Shaped[Array, "..."], slot: jax.Array | int) -> Float[Array, "..."]:
        """The numbers, in float32, of the codes that stand in the stored bytes at `slot`, counted from the lowest bits.

        The slot broadcasts against the bytes. Shifts and selects alone, no gather from a table, so that
        compilers vectorize it. 8-bit floats may also come as their bits, in uint8.
        """
        if self.dtype == jnp.float8_e4m3fn:
            return _float8(stored)
        if self.bits == 8:
            return stored.astype(jnp.float32)
        wide, low = stored.astype(jnp.int32), self.bits * jnp.asarray(slot, jnp.int32)
        if self.is_integer:
            # Up to the highest bits and back down: the shift down repeats the sign.
            up = jnp.left_shift(wide, 32 - self.bits - low)
            return jnp.right_shift(up, 32 - self.bits).astype(jnp.float32)
        code = jnp.right_shift(wide, low) & (2**self.bits - 1)
        number = _select(self.table, code)
        return jnp.where(code < len(self.table), number, -number)

    def scales(self, stored: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """The scales in float32, from what is stored of them."""
        if not self.power_of_two:
            return stored
        # Made of float32's bits: a power function need not be exact.
        wide = stored.astype(jnp.int32)
        bits = jnp.where(wide == 0, 1 << 22, wide << 23)
        return jax.lax.bitcast_convert_type(jnp.where(wide == 255, 0x7FC00000, bits), jnp.float32)

    def codes(self, numbers: Float[Array, "..."]) -> Shaped[Array, "..."]:
        """The codes nearest to numbers that are divided by their scale: in uint8 not yet packed, or in `dtype`."""
        if self.is_integer:
            least, greatest = self.range
            codes = jnp.clip(jnp.round(numbers), least, greatest).astype(jnp.int8)
            return codes if self.bits == 8 else jax.lax.bitcast_convert_type(codes, jnp.uint8)
        if not self.table:
            return jnp.clip(numbers, -self.largest, self.largest).astype(self.dtype)
        if len(self.table) == 2**self.bits:
            return _nearest(self.table, range(len(self.table)), numbers)
        # Floating point: of two numbers equally near the one with an even code, and zero keeps its sign.
        order = sorted(range(len(self.table)), key=lambda code: code % 2)
        sign = jnp.signbit(numbers).astype(jnp.uint8) * len(self.table)
        return _nearest(self.table, order, jnp.abs(numbers)) | sign.astype(jnp.uint8)

    def pack(self, codes: Shaped[Array, "*lead D F"]) -> Shaped[Array, "*lead D_bytes F"]:
        """Put codes into bytes."""
        if self.bits == 8:
            return codes
        slots = codes.reshape(*codes.shape[:-2], -1, self.per_byte, codes.shape[-1]) & (2**self.bits - 1)
        packed = slots[..., 0, :]
        for slot in range(1, self.per_byte):
            packed |= slots[..., slot, :] << (self.bits * slot)
        return packed


def _float8(stored: jax.Array) -> jax.Array:
    """Numbers of e4m3, out of their bits: XLA on CPU widens whole arrays of the type before it reads any."""
    bits = stored if stored.dtype == jnp.uint8 else jax.lax.bitcast_convert_type(stored, jnp.uint8)
    wide = bits.astype(jnp.int32)
    size = wide & 0x7F
    # The exponent's bias is 7, float32's 127. Below the smallest exponent the step is 2^-9.
    normal = jax.lax.bitcast_convert_type((size << 20) + (120 << 23), jnp.float32)
    number = jnp.where(size < 8, size.astype(jnp.float32) * 2.0**-9, normal)
    number = jnp.where(size == 0x7F, np.float32(np.nan), number)
    return jnp.where(wide < 0x80, number, -number)


def _select(table: Sequence[float], code: jax.Array) -> jax.Array:
    """The table's number of each code, bit by bit from the highest; higher bits of the code are ignored."""
    if len(table) == 1:
        return jnp.full_like(code, table[0], jnp.float32)
    half = len(table) // 2
    return jnp.where((code & half) != 0, _select(table[half:], code), _select(table[:half], code))


def _nearest(table: Sequence[float], order: Sequence[int], numbers: jax.Array) -> UInt8[Array, "..."]:
    """The code of the nearest number in the table; of two that are equally near the first in `order`."""
    best = jnp.full_like(numbers, jnp.inf)
    codes = jnp.zeros(numbers.shape, jnp.uint8)
    for code in order:
        distance = jnp.abs(numbers - table[code])
        codes = jnp.where(distance < best, jnp.uint8(code), codes)
        best = jnp.minimum(distance, best)
    return codes


def exponents_of(scales: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """E8M0 of the smallest powers of two that are at least the scales; NaN stays NaN."""
    mantissa, exponent = jnp.frexp(scales)  # in [1/2, 1): a power of two is one half
    exponent = jnp.clip(exponent - (mantissa == 0.5).astype(exponent.dtype), -127, 127) + 127
    return jnp.where(jnp.isnan(scales), 255, exponent).astype(jnp.uint8)


def _integer(bits: int) -> Format:
    dtype = np.dtype(np.int8 if bits == 8 else np.uint8)
    return Format(name=f"int{bits}", bits=bits, largest=2 ** (bits - 1) - 0.5, dtype=dtype)


_BYTE = np.dtype(np.uint8)
_NORMAL_FLOAT = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

INT8, INT4, INT2 = map(_integer, (8, 4, 2))
FP8_E4M3 = Format(name="fp8_e4m3", bits=8, largest=448.0, dtype=np.dtype(jnp.float8_e4m3fn))
NF4 = Format(name="nf4", bits=4, largest=1.0, dtype=_BYTE, table=_NORMAL_FLOAT, block=64)
MXFP4 = Format(
    name="mxfp4",
    bits=4,
    largest=6.0,
    dtype=_BYTE,
    table=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    block=32,
    power_of_two=True,
)
FORMATS = {format.name: format for format in (INT8, INT4, INT2, FP8_E4M3, NF4, MXFP4)}
SMALLEST_SCALE = math.sqrt(float(np.finfo(np.float32).tiny))
"""A group below this is taken for zeros, with scale 1: a number divided by a smaller scale may overflow."""
