"""How large the tiles of a grouped matmul are: the fastest by a roofline among those that fit in the chip's VMEM.

A roofline is an estimate for choosing, not a measurement. Letters: M rows, D inner width, F output width, E groups.
"""

import itertools
from typing import NamedTuple

from jax.experimental.pallas import tpu as pltpu

from .passes import Pass

LANES = 128
STEP_SECONDS = 0.35e-6
"""What a grid step costs besides moving and multiplying; JAX' own guide to Pallas pipelines says so,
https://docs.jax.dev/en/latest/pallas/grid_blockspec.html."""
ROWS = (128, 256, 512)
WIDTHS = (128, 256, 512, 1024, 2048)
"""Of depth and columns, besides the whole."""
LARGEST = 2**22
"""Elements of depth x columns: the compiler unrolls a tile's product, and takes a minute for larger ones."""
LARGEST_PACKED = 2**20
"""The same where the tile is unpacked as well."""
FLOAT32_PASSES = 6
"""Passes of bfloat16 that a float32 product of the highest precision takes on the matrix unit."""


class Tiles(NamedTuple):
    """Rows, depth and columns of a tile. A pass for dw writes [depth, columns] and sums over rows."""

    rows: int
    depth: int
    columns: int

    def clipped(self, rows: int, depth: int, columns: int) -> "Tiles":
        """No larger than the arrays: a tile of a whole axis may have any size."""
        return Tiles(min(self.rows, rows), min(self.depth, depth), min(self.columns, columns))


def choose_tiles(work: Pass) -> Tiles:
    """The tiles of a pass."""
    depths = [
        size for size in WIDTHS if size < work.depth and size % work.depth_unit == 0 and size <= (work.deepest or size)
    ]
    if not work.deepest or work.depth <= work.deepest or not depths:
        depths.append(work.depth)
    columns = [size for size in WIDTHS if size < work.columns and size % work.column_unit == 0] + [work.columns]
    candidates = [
        Tiles(*sizes).clipped(work.rows, work.depth, work.columns) for sizes in itertools.product(ROWS, depths, columns)
    ]
    largest = LARGEST_PACKED if work.packed else LARGEST
    fitting = [
        tiles
        for tiles in candidates
        if tiles.depth * tiles.columns <= largest and vmem_bytes(work, tiles) <= vmem_limit()
    ]
    # Where nothing fits, a packed matrix must be taken whole and the compiler has the last word.
    return min(fitting, key=lambda tiles: (_seconds(work, tiles), tiles)) if fitting else min(candidates)


def vmem_limit() -> int:
    """Bytes that one kernel may use: half of the chip's VMEM; the rest is the compiler's, to prefetch what is next."""
    return chip().vmem_capacity_bytes // 2


def vmem_bytes(work: Pass, tiles: Tiles) -> int:
    """What a pass holds in VMEM: blocks twice, for the next is moved in while one is used, sums and intermediates."""
    row, deep, column = (-(-size // LANES) * LANES for size in tiles)
    x, other, matrix = row * deep, row * column, deep * column
    factors, out = (x + other, matrix) if work.outer else (x + matrix, other)
    bits = 2 * (work.bits * (x + other) + work.matrix_bits * matrix) + 2 * 32 * out
    if work.bits == 32:
        bits += 3 * 16 * factors  # the factors of a float32 product are split into three of bfloat16
    if work.outer:
        bits += work.bits * factors  # and those of dw selected from
    if work.packed:
        bits += work.bits * matrix  # what is multiplied
    return bits // 8


def _seconds(work: Pass, tiles: Tiles) -> float:
    wholes = (work.rows, work.depth, work.columns)
    row_tiles, deep_tiles, column_tiles = (-(-whole // size) for whole, size in zip(wholes, tiles, strict=True))
    groups = min(work.groups, work.rows)
    visits = row_tiles + groups - 1
    if work.outer:
        rows_read, others_read, matrices = row_tiles * column_tiles, row_tiles * deep_tiles, work.groups
    elif deep_tiles == 1:
        # A group's matrix stays for all its visits, and rows for all their groups.
        rows_read, others_read, matrices = row_tiles * column_tiles, row_tiles, groups
    else:
        rows_read, others_read, matrices = visits * column_tiles, row_tiles, visits
    moved = tiles.rows * (rows_read * work.depth + others_read * work.columns) * work.bits
    moved += matrices * work.depth * work.columns * work.matrix_bits
    multiplied = visits * tiles.rows * deep_tiles * tiles.depth * column_tiles * tiles.columns
    passes = FLOAT32_PASSES if work.bits == 32 else 1
    busy = max(2 * multiplied * passes / chip().bf16_ops_per_second, moved / 8 / chip().mem_bw_bytes_per_second)
    # JAX' figures are of one core; where two are one device, they share the tiles that are independent.
    cores = min(chip().num_cores, column_tiles * (deep_tiles if work.outer else 1))
    return (busy + visits * deep_tiles * column_tiles * STEP_SECONDS) / cores


def chip() -> pltpu.TpuInfo:
    """The chip that this is traced for; where it is none, in an interpreter, one with little memory."""
    if pltpu.is_tpu_device():
        return pltpu.get_tpu_info()
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 1)
