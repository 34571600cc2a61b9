"""How the kernels of y and dx walk their tiles: persistent blocks, one warpgroup that copies and others that multiply.

As many blocks as there are multiprocessors walk the visits of `visits.py` times the column tiles, in an
order that keeps neighbours in the L2 cache. Columns are those of the output. What is copied and multiplied, and how
sums are stored, the kernels say. Rows of nobody become zero at the end.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..passes import Pass
from .target import PARAMETERS
from .visits import ALIGNMENT, RowVisits

STRIP = 8
"""Column tiles that are walked side by side, so that they share rows in the cache."""
SHARED_MEMORY = 227 * 1024
"""Bytes that a block may use."""
MOST_STAGES = 6
LARGE_SUMS = 128 * 64
FEW_REGISTERS, MORE_REGISTERS = 40, 120
"""Of a thread of the warpgroup that copies, beside large sums and beside small ones. It spills some with few, but what
it has the warpgroups that multiply have not. Three warpgroups start with 168 each, so all together may ask for 504 and
not for 512, as they would with 128: they would wait for the rest for ever."""


class Tile(NamedTuple):
    """Sizes of a kernel's tile."""

    rows: int
    """Of x and y; in the pass for dw, of dw."""
    depth: int
    """What a step sums over."""
    columns: int
    stages: int
    """Steps in flight between memory and multiplication."""

    @property
    def warpgroups(self) -> int:
        """That multiply."""
        return 2 if self.columns >= 128 else 1

    @property
    def width(self) -> int:
        """Columns of one warpgroup."""
        return self.columns // self.warpgroups


def choose_tile(large: bool, columns: int, dtype: Any) -> Tile:
    """The tile of a pass without packed matrices.

    Args:
        large: whether it has 128 rows, or 64.
    """
    bytes_each = jnp.dtype(dtype).itemsize
    tile = Tile(128 if large else 64, 128 // bytes_each, widest(columns), 1)
    return with_stages(tile, bytes_each * tile.depth * (tile.rows + tile.columns))


def widest(columns: int) -> int:
    """The columns of a tile that divides them."""
    return next(size for size in (256, 128, 64) if columns % size == 0)


def with_stages(tile: Tile, step_bytes: int) -> Tile:
    """The tile with all the stages that fit into shared memory, given what a step copies."""
    stored = 2 * 2 * 64 * min(64, tile.width) * tile.warpgroups
    return tile._replace(stages=min(MOST_STAGES, (SHARED_MEMORY - stored - 2048) // step_bytes))


class Input(NamedTuple):
    """An array that is copied tile by tile along the depth."""

    array: Any
    """In global memory; of two axes."""
    block: tuple[int, int]
    index: Callable[[Any], tuple[Any, Any]]
    """From the step to the block."""
    transforms: tuple[Any, ...] = ()


def persistent(kernel: Callable[..., None], tile: Tile, multiprocessors: int, name: str, **options: Any) -> Any:
    """The kernel on all multiprocessors, with its warpgroups; `options` are those of `plgpu.kernel`."""
    return plgpu.kernel(
        kernel,
        grid=(multiprocessors,),
        grid_names=("multiprocessor",),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=PARAMETERS,
        **options,
    )


def pipeline(
    tile: Tile,
    steps: Any,
    inputs: Sequence[Input],
    multiply_step: Any = None,
    around: Any = None,
    running: int = 1,
) -> Any:
    """Copy the inputs step by step and multiply them. To be called with `allocations`.

    Args:
        running: so many steps' products may still run when `multiply_step` returns.
    """

    def nothing(*_):
        return None

    return plgpu.emit_pipeline_warp_specialized(
        multiply_step or nothing,
        grid=(steps,),
        memory_registers=FEW_REGISTERS if tile.rows * tile.width > LARGE_SUMS else MORE_REGISTERS,
        in_specs=[
            plgpu.BlockSpec(one.block, one.index, transforms=one.transforms, delay_release=running) for one in inputs
        ],
        wg_axis="warpgroup",
        num_compute_wgs=tile.warpgroups,
        max_concurrent_steps=tile.stages,
        compute_context=around or nothing,
    )


def rows_of_visit(x: Any, visits: RowVisits, visit: Any, tile: Tile) -> Any:
    """The visit's rows; past the array's end they are zero."""
    return x.at[pl.ds(pl.multiple_of(visits.first[visit], ALIGNMENT), tile.rows), :]


def walk_rows(
    visits: RowVisits,
    tile: Tile,
    steps: int,
    column_tiles: int,
    drained: Any,
    *,
    sums: tuple[tuple[int, int], ...],
    inputs: Callable[[Any, Any], Sequence[Input]],
    multiply_step: Callable[..., None],
    store: Callable[..., None],
    finish: Callable[..., list[Any]] = lambda totals, *_: totals,
    running: int = 1,
) -> None:
    """The body of a kernel of y or dx.

    Args:
        visits: the plan, in global memory.
        drained: a barrier that each warpgroup that multiplies arrives at.
        sums: shapes of one warpgroup's sums.
        inputs: of a visit and a column tile.
        multiply_step: gets the inputs' tiles and the sums.
        store: gets the values of the sums, the visit and the column tile.
        finish: what is done to sums, but not to the zeros of rows of nobody, before they are stored.
        running: so many steps' products may still run when `multiply_step` returns.
    """
    warpgroup = jax.lax.axis_index("warpgroup")
    zero = jnp.int32(0)
    example = inputs(zero, zero)

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(tile, steps, example, running=running).get_allocations(*(one.array for one in example)),
        collective_axes="warpgroup",
    )
    def walk(allocations):
        @plgpu.nd_loop((visits.counts[0] * column_tiles,), collective_axes="multiprocessor")
        def product(loop):
            visit, column_tile = plgpu.planar_snake(loop.index[0], (visits.counts[0], column_tiles), 1, STRIP)

            def around(run):
                def with_sums(*sums):
                    run(sums)
                    totals = [one[...] for one in sums]
                    plgpu.barrier_arrive(drained)
                    store(finish(totals, visit, column_tile), visit, column_tile)

                pl.run_scoped(with_sums, *(plgpu.WGMMAAccumulatorRef(shape) for shape in sums))

            def step(_, *tiles_and_sums):
                *tiles, carried = tiles_and_sums
                multiply_step(tiles, carried)
                return carried

            of_visit = inputs(visit, column_tile)
            pipeline(tile, steps, of_visit, step, around, running)(
                *(one.array for one in of_visit), allocations=allocations
            )

            @pl.when(warpgroup == tile.warpgroups)
            def wait_for_the_last_product():
                # The pipeline does not: it never says when the tiles of its last step may be overwritten.
                plgpu.barrier_wait(drained)

    @pl.when(warpgroup < tile.warpgroups)
    def walk_rows_of_nobody():
        @plgpu.nd_loop((visits.counts[1] - visits.counts[0], column_tiles), collective_axes="multiprocessor")
        def clear(loop):
            zeros = [jnp.zeros(shape, jnp.float32) for shape in sums]
            store(zeros, visits.counts[0] + loop.index[0], loop.index[1])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def candidates(work: Pass) -> Iterator[Tile]:
    """What to try on a GPU for a pass without packed matrices, the rule's choice first."""
    bytes_each = work.bits // 8
    dtype = jnp.dtype(f"uint{work.bits}")
    first = choose_tile(is_large(work), work.columns, dtype)
    yield first
    for rows in (128, 64):
        if work.outer and work.depth % rows:
            continue
        for columns in (256, 128, 64):
            if work.columns % columns:
                continue
            tile = Tile(rows, 128 // bytes_each, columns, 1)
            fitting = with_stages(tile, bytes_each * tile.depth * (rows + columns))
            for stages in {fitting.stages, min(4, fitting.stages)}:
                if (tile := fitting._replace(stages=stages)) != first:
                    yield tile


def is_large(work: Pass) -> bool:
    """Whether tiles have 128 rows, by the rule."""
    return work.depth % 128 == 0 if work.outer else work.rows > 64 * work.groups
