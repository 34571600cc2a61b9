"""How large the tiles of a grouped matmul are: the fastest by a roofline among those that fit in the chip's VMEM.

A roofline is an estimate for choosing, not a measurement. Letters: M rows, D inner width, F output width, E groups.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128
STEP_SECONDS = 0.35e-6
"""What a grid step costs besides moving and multiplying; JAX' own guide to Pallas pipelines says so,
https://docs.jax.dev/en/latest/pallas/grid_blockspec.html."""
ROWS = (128, 256, 512)
WIDTHS = (256, 512, 1024, 2048)
"""Of depth and columns, besides the whole."""
LARGEST = 2**22
"""Elements of depth x columns: the compiler unrolls a tile's product, and takes a minute for larger ones."""
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


def choose_tiles(
    rows: int, depth: int, columns: int, groups: int, dtype: jax.typing.DTypeLike, *, outer: bool = False
) -> Tiles:
    """The tiles of a pass over `rows`, `depth` and `columns`.

    Args:
        outer: the pass is dw: it sums over rows and writes one [depth, columns] for each group.
    """
    bytes_each = jnp.dtype(dtype).itemsize
    wide = [
        {Tiles(size, size, size) for size in WIDTHS if size < whole} | {Tiles(whole, whole, whole)}
        for whole in (depth, columns)
    ]
    candidates = {
        Tiles(row, deep.depth, column.columns).clipped(rows, depth, columns)
        for row, deep, column in itertools.product(ROWS, *wide)
    }
    fitting = [
        tiles
        for tiles in candidates
        if tiles.depth * tiles.columns <= LARGEST and vmem_bytes(tiles, bytes_each, outer=outer) <= vmem_limit()
    ]
    smallest = Tiles(ROWS[0], WIDTHS[0], WIDTHS[0]).clipped(rows, depth, columns)
    return min(
        fitting or [smallest],
        key=lambda tiles: (_seconds(tiles, rows, depth, columns, groups, bytes_each, outer=outer), tiles),
    )


def vmem_limit() -> int:
    """Bytes that one kernel may use: half of the chip's VMEM; the rest is the compiler's, to prefetch what comes next."""
    return _chip().vmem_capacity_bytes // 2


def vmem_bytes(tiles: Tiles, bytes_each: int, *, outer: bool = False) -> int:
    """What a pass holds in VMEM: blocks twice, for the next is moved in while one is used, sums and intermediates."""
    row, deep, column = (_padded(size) for size in tiles)
    left, right, out = (row * deep, row * column, deep * column) if outer else (row * deep, deep * column, row * column)
    # The factors of a float32 product are split into three of bfloat16; those of dw are selected from.
    copies = (3 * 2 if bytes_each == 4 else 0) + (bytes_each if outer else 0)
    return 2 * bytes_each * (left + right + out) + copies * (left + right) + 2 * 4 * out


def _seconds(tiles: Tiles, rows: int, depth: int, columns: int, groups: int, bytes_each: int, *, outer: bool) -> float:
    row_tiles, deep_tiles, column_tiles = (
        -(-whole // size) for whole, size in zip((rows, depth, columns), tiles, strict=True)
    )
    visits = row_tiles + min(groups, rows) - 1
    if outer:
        moved = rows * (depth * column_tiles + columns * deep_tiles) + groups * depth * columns
    else:
        # With the whole depth in a tile, a group's matrix stays for all its visits, and so do rows for all groups.
        matrices, row_reads = (min(groups, rows), row_tiles) if deep_tiles == 1 else (visits, visits)
        moved = row_reads * tiles.rows * depth * column_tiles + matrices * depth * columns + rows * columns
    multiplied = visits * tiles.rows * deep_tiles * tiles.depth * column_tiles * tiles.columns
    chip, passes = _chip(), FLOAT32_PASSES if bytes_each == 4 else 1
    busy = max(2 * multiplied * passes / chip.bf16_ops_per_second, moved * bytes_each / chip.mem_bw_bytes_per_second)
    return busy + visits * deep_tiles * column_tiles * STEP_SECONDS


def _chip() -> pltpu.TpuInfo:
    """The chip that this is traced for; where it is none, in an interpreter, the smallest of the current ones."""
    if pltpu.is_tpu_device():
        return pltpu.get_tpu_info()
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 1)


def _padded(size: int) -> int:
    return -(-size // LANES) * LANES
