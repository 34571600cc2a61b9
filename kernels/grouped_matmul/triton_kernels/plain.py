"""A grouped matmul as Triton kernels: rows times matrices, and the sums of outer products for dw.

A program takes one output tile after the other, `PROGRAMS` tiles apart. Which group a tile belongs to is found inside
the kernel, from the group sizes: a group has its rows in whole tiles from its own first row on, so there are at most
(M / tile + E) row tiles, and no plan is computed before. Rows of nobody are one group more, with a depth of 0: their
sums are the zeros that they are to be. Neighbouring tiles share rows or columns, for the cache.

Rows are read where `source` says and written where `target` says, where a kernel gathers or scatters (ScatterMoE, Tan
et al. 2024, https://arxiv.org/abs/2403.08245): then no permuted copy of them is ever in memory. What is read for a row
of nobody, or past a group's end, reaches no other row: products keep rows apart, and dw masks both of its factors.

Letters: M rows, D inner width, F output width, E groups. A product contracts over its depth, D forward and F for dx.
What is in capital letters is known at compile time.
"""

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
@no_type_check
def group_rows(group_sizes, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """First row, and row after the last, of each group [LANES], as `groups.group_bounds`; group E: rows of nobody."""
    lane = tl.arange(0, LANES)
    size = tl.load(group_sizes + lane, mask=lane < GROUPS, other=0)
    size = tl.minimum(tl.maximum(size, 0), ROWS)
    until = tl.cumsum(size, 0)
    start = tl.minimum(until - size, ROWS)
    return start, tl.where(lane == GROUPS, ROWS, tl.minimum(until, ROWS))


@triton.jit
@no_type_check
def entry(array, group, LANES: tl.constexpr):
    """array[group]; Triton indexes no tensor of registers."""
    return tl.sum(tl.where(tl.arange(0, LANES) == group, array, 0), 0)


@triton.jit
@no_type_check
def place(
    tile,
    start,
    end,
    until,
    LANES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    BUNCH: tl.constexpr,
):
    """A tile's group, its own first row, the row after the group's last, and its column tile.

    `until` counts the tiles of all groups up to each. Inside a group they go down `BUNCH` row tiles, then on to the
    next column: so neighbours share rows of x as well as matrices.
    """
    group = tl.sum((until <= tile).to(tl.int32), 0)
    first, last = entry(start, group, LANES), entry(end, group, LANES)
    row_tiles = tl.cdiv(last - first, TILE_ROWS)
    inside = tile - (entry(until, group, LANES) - row_tiles * COLUMN_TILES)
    bunch = inside // (BUNCH * COLUMN_TILES) * BUNCH
    high, inside = tl.minimum(row_tiles - bunch, BUNCH), inside % (BUNCH * COLUMN_TILES)
    return group, first + (bunch + inside % high) * TILE_ROWS, last, inside // high


@triton.jit
@no_type_check
def moved(index, rows, MOVES: tl.constexpr):
    """Where these rows are read or written: in 64 bits, for M * D may not fit in 32."""
    return (tl.load(index + rows) if MOVES else rows).to(tl.int64)


@triton.jit
@no_type_check
def load(at, down, across, DOWN_ENDS: tl.constexpr, ACROSS_ENDS: tl.constexpr):
    """A tile, with zeros where `down` or `across` is false; each is looked at only where the array ends in a tile."""
    if DOWN_ENDS:
        if ACROSS_ENDS:
            return tl.load(at, mask=down[:, None] & across[None, :], other=0)
        return tl.load(at, mask=down[:, None], other=0)
    if ACROSS_ENDS:
        return tl.load(at, mask=across[None, :], other=0)
    return tl.load(at)


@triton.jit
@no_type_check
def product(
    x,
    w,
    group_sizes,
    source,
    target,
    factor,
    y,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    READABLE: tl.constexpr,
    WRITABLE: tl.constexpr,
    GATHERS: tl.constexpr,
    SCATTERS: tl.constexpr,
    SCALES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BUNCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[target[i]] = factor[i] * x[source[i]] @ w[group of i], or with the transposed w, stored [E, columns, depth]."""
    COLUMN_TILES: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    DEEP: tl.constexpr = 1 if TRANSPOSED else COLUMNS
    ACROSS: tl.constexpr = DEPTH if TRANSPOSED else 1
    start, end = group_rows(group_sizes, ROWS, GROUPS, LANES)
    until = tl.cumsum(tl.cdiv(end - start, TILE_ROWS) * COLUMN_TILES, 0)
    for tile in tl.range(tl.program_id(0), tl.max(until, 0), PROGRAMS):
        group, first, last, across = place(tile, start, end, until, LANES, TILE_ROWS, COLUMN_TILES, BUNCH)
        row, column = first + tl.arange(0, TILE_ROWS), across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        deep, own, inside = tl.arange(0, TILE_DEPTH), row < last, column < COLUMNS
        read = moved(source, tl.minimum(row, last - 1), GATHERS)
        readable = (read >= 0) & (read < READABLE)
        x_at = x + (tl.where(readable, read, 0) * DEPTH)[:, None] + deep[None, :]
        matrix = w + tl.minimum(group, GROUPS - 1).to(tl.int64) * (DEPTH * COLUMNS)
        w_at = matrix + deep[:, None] * DEEP + column[None, :] * ACROSS
        sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
        for done in tl.range(0, tl.where(group < GROUPS, DEPTH, 0), TILE_DEPTH):
            here = deep < DEPTH - done
            a = load(x_at, own, here, False, DEPTH % TILE_DEPTH != 0)
            b = load(w_at, here, inside, DEPTH % TILE_DEPTH != 0, COLUMNS % TILE_COLUMNS != 0)
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
            x_at += TILE_DEPTH
            w_at += TILE_DEPTH * DEEP
        if GATHERS:
            sums = tl.where(readable[:, None], sums, 0.0)
        if SCALES:
            sums *= tl.load(factor + row, mask=own, other=0).to(tl.float32)[:, None]
        write = moved(target, tl.minimum(row, ROWS - 1), SCATTERS)
        y_at = y + (write * COLUMNS)[:, None] + column[None, :]
        kept = (own & (write >= 0) & (write < WRITABLE))[:, None] & inside[None, :]
        tl.store(y_at, sums.to(y.dtype.element_ty), mask=kept)


@triton.jit
@no_type_check
def outer(
    x,
    dy,
    group_sizes,
    source,
    target,
    dw,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    READABLE: tl.constexpr,
    WRITABLE: tl.constexpr,
    GATHERS: tl.constexpr,
    SCATTERS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_INNER: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw[group] = the sum over its rows i of the outer products of x[source[i]] and dy[target[i]]; 0 without rows."""
    DOWN: tl.constexpr = (INNER + TILE_INNER - 1) // TILE_INNER
    ACROSS: tl.constexpr = (WIDTH + TILE_WIDTH - 1) // TILE_WIDTH
    start, end = group_rows(group_sizes, ROWS, GROUPS, LANES)
    for tile in tl.range(tl.program_id(0), GROUPS * DOWN * ACROSS, PROGRAMS):
        group = tile // (DOWN * ACROSS)
        first, last = entry(start, group, LANES), entry(end, group, LANES)
        inner = (tile % DOWN) * TILE_INNER + tl.arange(0, TILE_INNER)
        width = ((tile // DOWN) % ACROSS) * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
        in_inner, in_width = inner < INNER, width < WIDTH
        sums = tl.zeros((TILE_INNER, TILE_WIDTH), tl.float32)
        for done in tl.range(first, last, TILE_ROWS):
            row = done + tl.arange(0, TILE_ROWS)
            own, row = row < last, tl.minimum(row, last - 1)
            read, write = moved(source, row, GATHERS), moved(target, row, SCATTERS)
            own = own & (read >= 0) & (read < READABLE) & (write >= 0) & (write < WRITABLE)
            a = load(x + (read * INNER)[:, None] + inner[None, :], own, in_inner, True, INNER % TILE_INNER != 0)
            b = load(dy + (write * WIDTH)[:, None] + width[None, :], own, in_width, True, WIDTH % TILE_WIDTH != 0)
            sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
        at = dw + group.to(tl.int64) * (INNER * WIDTH) + inner[:, None] * WIDTH + width[None, :]
        tl.store(at, sums.to(dw.dtype.element_ty), mask=in_inner[:, None] & in_width[None, :])
