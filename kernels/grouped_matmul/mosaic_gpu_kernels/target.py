"""Where a Mosaic GPU kernel is to run: on a Hopper GPU, here or absent, or in JAX' interpreter of one.

The interpreter of JAX 0.10.2 reads the operands of `wgmma` from memory alone and cannot transpose them. There an
operand that is transposed, or held in registers, is staged: written to shared memory first. The chip takes either as it
is. Nor does the interpreter know layouts of registers, which are asked for on the chip alone.
"""

import inspect
from typing import Any, NamedTuple

import jax
from jax._src import config as jax_config
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...traced_device import device_kind, multiprocessors

HOPPERS = ("H100", "H200", "H800", "H20")
_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
"""Of what `plgpu.load` reads, all: JAX 0.10 asks for it, 0.12 takes none."""
PARAMETERS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def interpreted() -> bool:
    """Whether this is traced inside `force_gpu_interpret_mode`, for which there is no public question."""
    # One setting serves the interpreters of TPUs and of GPUs; the type of its value says which is meant.
    return type(jax_config.pallas_tpu_interpret_mode_context_manager.value).__name__ == "InterpretGPUParams"


def check_target() -> None:
    """Refuse other chips.

    Raises:
        NotImplementedError: this is not traced for a Hopper GPU, nor inside the interpreter of one.
    """
    found = device_kind()
    if not interpreted() and not any(name in found for name in HOPPERS):
        raise NotImplementedError(
            f"mosaic_gpu is for Hopper GPUs ({', '.join(HOPPERS)}); the device is {found}. Allowed besides are a "
            "compile for one that is not present (dynamoe.kernels.aot) and JAX' force_gpu_interpret_mode()"
        )


def count_multiprocessors() -> int:
    """Of the GPU that this is traced for."""
    if interpreted():
        return 1
    return multiprocessors()


def swizzled(width: int, dtype: Any) -> tuple[Any, Any]:
    """How a tile of `width` columns lies in shared memory for `wgmma` and for copies without bank conflicts."""
    bytes_each = jax.numpy.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(8 * bytes_each * width)
    return plgpu.TilingTransform((8, swizzle // bytes_each)), plgpu.SwizzleTransform(swizzle)


class Operand(NamedTuple):
    """A factor of `multiply`: rows and columns of a tile in shared memory, perhaps transposed."""

    tile: Any
    axis: int = 0
    """The axis along which this warpgroup takes a part."""
    start: Any = 0
    size: int | None = None
    """None: all of the tile."""
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As the product sees it."""
        rows, columns = (self.size or n if axis == self.axis else n for axis, n in enumerate(self.tile.shape))
        return (columns, rows) if self.transposed else (rows, columns)

    def reference(self) -> Any:
        part = self.tile
        if self.size is not None:
            part = part.at[(slice(None),) * self.axis + (pl.ds(self.start, self.size),)]
        return part.transpose((1, 0)) if self.transposed else part

    def numbers(self) -> jax.Array:
        """In registers."""
        if not interpreted():
            numbers = self.reference()[...]
            return plgpu.layout_cast(numbers, plgpu.Layout.WGMMA_TRANSPOSED) if self.transposed else numbers
        whole = self.tile[...]
        if self.size is not None:
            whole = jax.lax.dynamic_slice_in_dim(whole, self.start, self.size, self.axis)
        return whole.T if self.transposed else whole


def put_transposed(tile: Any, numbers: jax.Array) -> None:
    """Write the transpose of sums to shared memory."""
    if interpreted():
        tile[...] = numbers.T
    else:
        tile.transpose((1, 0))[...] = plgpu.layout_cast(numbers, plgpu.Layout.WGMMA_TRANSPOSED)


def along_rows(tile: Any, row: int, start: Any, shape: tuple[int, int]) -> jax.Array:
    """A part of a row of a tile, as a column that is repeated beside itself."""
    if interpreted():
        column = jax.lax.dynamic_slice_in_dim(tile[...][row], start, shape[0])
    else:
        column = _load_line(tile.at[row, pl.ds(start, shape[0])], 1)
    return jax.lax.broadcast_in_dim(column, shape, (0,))


def repeated(line: Any, axis: int, shape: tuple[int, ...]) -> jax.Array:
    """A line of numbers in shared memory along an axis of sums or factors, repeated along the other."""
    numbers = line[...] if interpreted() else _load_line(line, 1 - axis)
    return jax.lax.broadcast_in_dim(numbers, shape, (axis,))


def _load_line(line: Any, across: int) -> jax.Array:
    return plgpu.load(line, *_INDEX, layout=plgpu.Layout.WGMMA.reduce(across), optimized=False)


def as_factor(numbers: jax.Array) -> jax.Array:
    """Laid out in registers as the first factor of a product."""
    return numbers if interpreted() else plgpu.layout_cast(numbers, plgpu.Layout.WGMMA)


def stage_for(*operands: jax.ShapeDtypeStruct | None, warpgroups: int) -> tuple[Any, ...]:
    """Shared memory where the interpreter finds the operands that it cannot take; None: as it is."""
    return tuple(
        plgpu.SMEM((warpgroups, *operand.shape), operand.dtype)
        for operand in operands
        if operand is not None and interpreted()
    )


def multiply(sums: Any, a: Operand | jax.Array, b: Operand, stages: tuple[Any, ...], warpgroup: Any) -> None:
    """Add the product to the sums. It may still run when this returns: see `plgpu.wgmma_wait`."""
    left = iter(stages)
    plgpu.wgmma(sums, *(_taken(operand, left, warpgroup) for operand in (a, b)))


def _taken(operand: Operand | jax.Array, left: Any, warpgroup: Any) -> Any:
    if isinstance(operand, Operand) and not (operand.transposed and interpreted()):
        return operand.reference()
    if not interpreted():
        return operand
    stage = next(left).at[warpgroup]
    stage[...] = operand.numbers() if isinstance(operand, Operand) else operand
    return stage
