"""Triton kernels of a grouped matmul with packed matrices, which are unpacked in their tile: y, and the gradient dx.

As `plain.py`, whose letters and tiles these are. How codes share a byte and what they stand for:
`kernels/quantized/formats.py`.
"""

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from .plain import group_rows, load, place


@triton.jit
@no_type_check
def numbers(codes, SLOT: tl.constexpr, FORMAT: tl.constexpr, HARDWARE: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers that stand in bytes at `SLOT`, counted from the lowest bits: `Format.numbers` of the same name.

    In the dtype of the product, exactly, but for nf4, whose numbers are rounded to it.
    """
    if FORMAT == "int8":
        return codes.to(tl.int8, bitcast=True).to(DTYPE)
    elif FORMAT == "fp8_e4m3":
        return eight_bit_float(codes, HARDWARE).to(DTYPE)
    elif FORMAT == "int4":
        return four_bit_integer((codes >> (4 * SLOT)) & 15, DTYPE)
    elif FORMAT == "nf4":
        return normal_float((codes >> (4 * SLOT)) & 15).to(DTYPE)
    else:
        tl.static_assert(FORMAT == "mxfp4")
        return four_bit_float((codes >> (4 * SLOT)) & 15).to(DTYPE)


@triton.jit
@no_type_check
def four_bit_integer(code, DTYPE: tl.constexpr):
    """Two's complement. In 16 bits without a conversion, of which a GPU does few: the code, made positive, is put in
    the lowest bits of 128 or 1024, where steps are 1, and what is too much is subtracted."""
    positive = code ^ 8
    if DTYPE == tl.bfloat16:
        return (positive.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    elif DTYPE == tl.float16:
        return (positive.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    else:
        return positive.to(tl.float32) - 8.0


@triton.jit
@no_type_check
def eight_bit_float(codes, HARDWARE: tl.constexpr):
    """e4m3: the exponent's bias is 7, float32's 127; below the smallest exponent the step is 2^-9."""
    if HARDWARE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = codes.to(tl.int32)
    size = wide & 0x7F
    number = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    number = tl.where(size < 8, size.to(tl.float32) * 0.001953125, number)
    number = tl.where(size == 0x7F, float("nan"), number)
    return tl.where(wide < 0x80, number, -number)


@triton.jit
@no_type_check
def four_bit_float(code):
    """E2M1: the exponent's bias is 1, float32's 127; below the smallest exponent there is 0 and a half."""
    size = (code & 7).to(tl.int32)
    number = ((size << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    number = tl.where(size < 2, size.to(tl.float32) * 0.5, number)
    return tl.where(code < 8, number, -number)


@triton.jit
@no_type_check
def normal_float(code):
    """nf4, selected bit by bit: of the sixteen numbers eight, four, two, one."""
    low, middle = (code & 1) != 0, (code & 2) != 0
    a = tl.where(low, -0.6961928009986877, -1.0)
    b = tl.where(low, -0.39491748809814453, -0.5250730514526367)
    c = tl.where(low, -0.18477343022823334, -0.28444138169288635)
    d = tl.where(low, 0.0, -0.09105003625154495)
    e = tl.where(low, 0.16093020141124725, 0.07958029955625534)
    f = tl.where(low, 0.33791524171829224, 0.24611230194568634)
    g = tl.where(low, 0.5626170039176941, 0.44070982933044434)
    h = tl.where(low, 1.0, 0.7229568362236023)
    ab, cd, ef, gh = tl.where(middle, b, a), tl.where(middle, d, c), tl.where(middle, f, e), tl.where(middle, h, g)
    high, highest = (code & 4) != 0, (code & 8) != 0
    return tl.where(highest, tl.where(high, gh, ef), tl.where(high, cd, ab))


@triton.jit
@no_type_check
def scale_row(scales, at, inside, POWERS_OF_TWO: tl.constexpr):
    """Scales in float32; of E8M0 made of float32's bits, 0 being 2^-127 and 255 NaN."""
    stored = tl.load(scales + at, mask=inside, other=0)
    if not POWERS_OF_TWO:
        return stored
    wide = stored.to(tl.int32)
    number = tl.where(wide == 0, 1 << 22, wide << 23).to(tl.float32, bitcast=True)
    return tl.where(wide == 255, float("nan"), number)


@triton.jit
@no_type_check
def packed_product(
    x,
    row_scales,
    codes,
    scales,
    zero_points,
    group_sizes,
    y,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_BYTE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    POWERS_OF_TWO: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    INTEGERS: tl.constexpr,
    HARDWARE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BUNCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = x @ w for packed w. A step's depth lies within one group of scales: codes are multiplied as they are, and the
    sums by the scales, which costs less where rows are few and rounds nothing."""
    COLUMN_TILES: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    BYTES: tl.constexpr = TILE_DEPTH // PER_BYTE
    ONE_SCALE: tl.constexpr = GROUP_SIZE == DEPTH
    SCALES_EACH: tl.constexpr = DEPTH // GROUP_SIZE
    SUMS: tl.constexpr = tl.int32 if INTEGERS else tl.float32
    tl.static_assert(ONE_SCALE or GROUP_SIZE % TILE_DEPTH == 0)
    start, end = group_rows(group_sizes, ROWS, GROUPS, LANES)
    until = tl.cumsum(tl.cdiv(end - start, TILE_ROWS) * COLUMN_TILES, 0)
    for tile in tl.range(tl.program_id(0), tl.max(until, 0), PROGRAMS):
        group, first, last, across = place(tile, start, end, until, LANES, TILE_ROWS, COLUMN_TILES, BUNCH)
        row, column = first + tl.arange(0, TILE_ROWS), across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        own, inside = row < last, column < COLUMNS
        owner = tl.minimum(group, GROUPS - 1).to(tl.int64)
        deep, byte = tl.arange(0, TILE_DEPTH), tl.arange(0, BYTES)
        x_at = x + (tl.minimum(row, last - 1).to(tl.int64) * DEPTH)[:, None] + deep[None, :]
        codes_at = codes + owner * (DEPTH // PER_BYTE * COLUMNS) + byte[:, None] * COLUMNS
        codes_at += column[None, :]
        scale_at = owner * (SCALES_EACH * COLUMNS) + column
        sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), SUMS)
        for done in tl.range(0, tl.where(group < GROUPS, DEPTH, 0), TILE_DEPTH):
            a = load(x_at, own, deep < DEPTH - done, False, DEPTH % TILE_DEPTH != 0)
            down = byte * PER_BYTE < DEPTH - done
            stored = load(codes_at, down, inside, DEPTH % TILE_DEPTH != 0, COLUMNS % TILE_COLUMNS != 0)
            at = scale_at + done // GROUP_SIZE * COLUMNS
            so_far = sums if ONE_SCALE else tl.zeros((TILE_ROWS, TILE_COLUMNS), SUMS)
            if INTEGERS:
                so_far = tl.dot(a, stored.to(tl.int8, bitcast=True), so_far, out_dtype=tl.int32)
            elif PER_BYTE == 1:
                b = numbers(stored, 0, FORMAT, HARDWARE, a.dtype)
                if ZERO_POINTS:
                    b -= tl.load(zero_points + at, mask=inside, other=0).to(a.dtype)[None, :]
                so_far = tl.dot(a, b, so_far, input_precision=PRECISION)
            else:
                even, odd = tl.split(tl.reshape(a, (TILE_ROWS, BYTES, 2)))
                b, c = numbers(stored, 0, FORMAT, HARDWARE, a.dtype), numbers(stored, 1, FORMAT, HARDWARE, a.dtype)
                if ZERO_POINTS:
                    zero = tl.load(zero_points + at, mask=inside, other=0).to(a.dtype)[None, :]
                    b, c = b - zero, c - zero
                so_far = tl.dot(odd, c, tl.dot(even, b, so_far, input_precision=PRECISION), input_precision=PRECISION)
            if ONE_SCALE:
                sums = so_far
            else:
                sums += so_far * scale_row(scales, at, inside, POWERS_OF_TWO)[None, :]
            x_at += TILE_DEPTH
            codes_at += BYTES * COLUMNS
        result = sums.to(tl.float32)
        if ONE_SCALE:
            result *= scale_row(scales, scale_at, inside, POWERS_OF_TWO)[None, :]
        if INTEGERS:
            result *= tl.load(row_scales + row, mask=own, other=0)[:, None]
        # Rows of nobody have no sums, and are not to have their scales' NaN.
        result = tl.where(group < GROUPS, result, 0.0)
        y_at = y + (row.to(tl.int64) * COLUMNS)[:, None] + column[None, :]
        tl.store(y_at, result.to(y.dtype.element_ty), mask=own[:, None] & inside[None, :])


@triton.jit
@no_type_check
def packed_gradient(
    dy,
    codes,
    scales,
    zero_points,
    group_sizes,
    dx,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_BYTE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    POWERS_OF_TWO: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    HARDWARE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BUNCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = dy @ w^T for packed w, stored [E, columns / PER_BYTE, depth]. A tile's columns lie in one group of scales.

    Scales run along the depth here, so the matrix is unpacked to the dtype of the product, as `dequantize` does.
    """
    COLUMN_TILES: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    BYTES: tl.constexpr = TILE_COLUMNS // PER_BYTE
    SCALES_EACH: tl.constexpr = COLUMNS // GROUP_SIZE
    tl.static_assert(GROUP_SIZE == COLUMNS or GROUP_SIZE % TILE_COLUMNS == 0)
    start, end = group_rows(group_sizes, ROWS, GROUPS, LANES)
    until = tl.cumsum(tl.cdiv(end - start, TILE_ROWS) * COLUMN_TILES, 0)
    for tile in tl.range(tl.program_id(0), tl.max(until, 0), PROGRAMS):
        group, first, last, across = place(tile, start, end, until, LANES, TILE_ROWS, COLUMN_TILES, BUNCH)
        row, column = first + tl.arange(0, TILE_ROWS), across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        byte = across * BYTES + tl.arange(0, BYTES)
        own, inside = row < last, byte < COLUMNS // PER_BYTE
        owner = tl.minimum(group, GROUPS - 1).to(tl.int64)
        deep = tl.arange(0, TILE_DEPTH)
        dy_at = dy + (tl.minimum(row, last - 1).to(tl.int64) * DEPTH)[:, None] + deep[None, :]
        codes_at = codes + owner * (COLUMNS // PER_BYTE * DEPTH) + byte[None, :] * DEPTH + deep[:, None]
        at = owner * (SCALES_EACH * DEPTH) + (across * TILE_COLUMNS // GROUP_SIZE) * DEPTH + deep
        evens = tl.zeros((TILE_ROWS, BYTES), tl.float32)
        odds = tl.zeros((TILE_ROWS, BYTES), tl.float32)
        for done in tl.range(0, tl.where(group < GROUPS, DEPTH, 0), TILE_DEPTH):
            here = deep < DEPTH - done
            a = load(dy_at, own, here, False, DEPTH % TILE_DEPTH != 0)
            stored = load(codes_at, here, inside, DEPTH % TILE_DEPTH != 0, COLUMNS % TILE_COLUMNS != 0)
            scale = scale_row(scales, at, here, POWERS_OF_TWO)[:, None]
            zero = tl.zeros((TILE_DEPTH, 1), tl.float32)
            if ZERO_POINTS:
                zero = tl.load(zero_points + at, mask=here, other=0).to(tl.float32)[:, None]
            b = (numbers(stored, 0, FORMAT, HARDWARE, tl.float32) - zero) * scale
            evens = tl.dot(a, b.to(a.dtype), evens, input_precision=PRECISION)
            if PER_BYTE == 2:
                c = (numbers(stored, 1, FORMAT, HARDWARE, tl.float32) - zero) * scale
                odds = tl.dot(a, c.to(a.dtype), odds, input_precision=PRECISION)
            dy_at += TILE_DEPTH
            codes_at += TILE_DEPTH
            at += TILE_DEPTH
        result = tl.interleave(evens, odds) if PER_BYTE == 2 else evens
        at_row = dx + (row.to(tl.int64) * COLUMNS)[:, None] + column[None, :]
        tl.store(at_row, result.to(dx.dtype.element_ty), mask=own[:, None] & (column < COLUMNS)[None, :])
