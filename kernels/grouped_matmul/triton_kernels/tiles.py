"""How large the tiles of the Triton kernels are: what was measured on this kind of GPU, or else a rule.

The rule is not measured. It follows from what limits a kernel: with many rows for a group the matrix units, for which
tiles are as large as registers hold the sums of; with few the reading of the matrices, for which loads are to be many
and rows no more than there are. Letters: M rows, D inner width, F output width, E groups.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ...traced_device import device_kind, multiprocessors
from ...triton_call import capability, interpreted
from ..passes import Pass
from ..tuned import Key, tuned_tiles

SHARED_BYTES = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""What a block may use, by compute capability: CUDA C++ Programming Guide, table "Technical Specifications"."""
THREADS = 2048
"""That a multiprocessor holds, about."""
REGISTERS_PER_THREAD = 128
"""That a program takes, about: half of what it may, which is what half as many programs leave for each."""
SCRATCH = 16384
MOST_SUMS = 128
"""Of a thread: they take as many registers, of 255."""
ROWS = (16, 32, 64)
"""Of tiles where few rows are a group's."""
WIDE = 90, 120
"""Compute capabilities from and below which the matrix units read shared memory themselves (Hopper, Blackwell of data
centres): elsewhere both factors take registers, and tiles are smaller."""
LEAST = 16
"""Elements that an edge of a product in Triton has at least."""
FEW = 64
"""Rows of a group up to which reading its matrix takes the time, about."""


class GpuTiles(NamedTuple):
    """Rows, depth and columns of a tile, each a power of two; a pass for dw writes [depth, columns], and sums rows."""

    rows: int
    depth: int
    columns: int
    warps: int = 4
    stages: int = 3


def choose_tiles(work: Pass) -> GpuTiles:
    """The tiles of a pass on the GPU that is traced for: those in its table, or else the rule's."""
    if interpreted():
        return _fitting(work, GpuTiles(32, 32, 32, stages=1))
    tuned = tuned_tiles(Key.of("triton", work), device_kind(), GpuTiles)
    return rule(work) if tuned is None else _fitting(work, tuned)


def rule(work: Pass) -> GpuTiles:
    """Where nothing was measured. float32 takes three products of tf32 at once, and so the registers of three."""
    large = WIDE[0] <= capability() < WIDE[1]
    if work.bits == 32:
        depth, columns, warps = (32, 128, 8) if large else (16, 64, 8)
    else:
        depth, columns, warps = (64, 256, 8) if large else (64, 128, 8)
    if work.packed:
        rows, columns, warps = (128, 128, 8) if large else (64, 128 if work.bits < 32 else 64, 4)
        return _fitting_few(work) or _fitting(work, GpuTiles(rows, depth, columns, warps=warps, stages=4))
    if work.outer:
        inner = 64 if work.bits == 32 and not large else 128
        return _fitting(work, GpuTiles(depth, inner, columns, warps=warps * inner // 128, stages=4))
    return _fitting_few(work) or _fitting(work, GpuTiles(128, depth, columns, warps=warps, stages=4))


def _fitting_few(work: Pass) -> GpuTiles | None:
    """For decoding: as few rows as there are, deep steps, and few stages, so that several programs load at once."""
    if work.rows > FEW * work.groups:
        return None
    rows = next(rows for rows in ROWS if rows * work.groups >= work.rows)
    depth, columns = (128, 128) if work.bits < 32 else (32, 128) if capability() == WIDE[0] else (16, 64)
    return _fitting(work, GpuTiles(rows, depth, columns, warps=4, stages=5 if work.packed else 3))


def candidates(work: Pass) -> Iterator[GpuTiles]:
    """What to try on a GPU, the rule's choice first."""
    few = work.rows <= FEW * work.groups and not work.outer
    half = 2 if work.bits == 32 else 1
    tried = itertools.product(
        ROWS if few else (64, 128),
        (64 // half, 128 // half),
        (64, 128) if few else (128, 256),
        (4, 8),
        (3, 4, 6) if few else (3, 4),
    )
    seen = {rule(work)}
    yield from seen
    for rows, depth, columns, warps, stages in tried:
        sizes = (depth, rows, columns) if work.outer else (rows, depth, columns)
        tiles = _fitting(work, GpuTiles(*sizes, warps=warps, stages=stages))
        sums = (tiles.depth if work.outer else tiles.rows) * tiles.columns
        if tiles not in seen and sums <= MOST_SUMS * 32 * warps:
            seen.add(tiles)
            yield tiles


def programs(work: Pass, tiles: GpuTiles) -> int:
    """As many as the GPU holds at once, or as there are tiles at most: each takes one after the other."""
    column_tiles = -(-work.columns // tiles.columns)
    if work.outer:
        most = work.groups * -(-work.depth // tiles.depth) * column_tiles
    else:
        most = (-(-work.rows // tiles.rows) + work.groups) * column_tiles
    if interpreted():
        return min(most, 2)
    by_threads = THREADS * 32 // REGISTERS_PER_THREAD // (32 * tiles.warps)
    by_memory = _shared_limit() // shared_bytes(work, tiles)
    return min(most, multiprocessors() * max(1, min(by_threads, by_memory)))


def shared_bytes(work: Pass, tiles: GpuTiles) -> int:
    """Of the factors' tiles, which are loaded ahead, and what sums and their layouts take besides, about."""
    row, deep, column = tiles.rows, tiles.depth, tiles.columns
    if work.outer:
        bits = work.bits * row * (deep + column)
    else:
        bits = work.bits * row * deep + work.matrix_bits * deep * column
    unpacked = work.bits * deep * (row + column) if work.packed else 0
    return (tiles.stages * bits + unpacked) // 8 + SCRATCH


def _fitting(work: Pass, tiles: GpuTiles) -> GpuTiles:
    """No larger than the axes need, and with no more stages than fit into the memory of a block."""
    rows, depth, columns = tiles[:3]
    # Codes that share a byte are multiplied apart, each by a half of the tile; of int8 rows the least depth is double.
    shares = 8 // work.matrix_bits if work.packed and work.matrix_bits < 8 else 1
    least_depth = 2 * LEAST if work.bits == 8 else LEAST if work.transposed else LEAST * shares
    least_columns = LEAST * shares if work.transposed else LEAST
    tiles = tiles._replace(
        rows=min(rows, _covering(work.rows)),
        depth=min(depth, max(_covering(work.depth), least_depth), work.deepest or depth),
        columns=min(columns, max(_covering(work.columns), least_columns), work.widest or columns),
    )
    if not interpreted():
        while tiles.stages > 1 and shared_bytes(work, tiles) > _shared_limit():
            tiles = tiles._replace(stages=tiles.stages - 1)
    return tiles


def _shared_limit() -> int:
    """Of a card that the table does not know, the least in it."""
    return SHARED_BYTES.get(capability(), min(SHARED_BYTES.values()))


def _covering(size: int) -> int:
    """The least power of two that is no less, at least as large as an edge must be."""
    return max(LEAST, 1 << (size - 1).bit_length())
