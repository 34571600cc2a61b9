"""A grouped matmul for Hopper GPUs in Pallas Mosaic GPU: TMA, warp specialization and `wgmma`.

One kernel for y and for dx (`rows.py`), one for dw (`outer.py`), one for matrices of packed
integers (`packed.py`). All are persistent and walk a plan that is computed on the device, so group sizes are
data and not shape, and the work grows with M / tile + E and not with M / tile * E.

Letters: M rows, D inner width, F output width, E groups. Not yet run on a GPU: interpreted on CPU and compiled ahead of
time, so it is no platform's default.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int
from jaxtyping import Float8e4m3fn as Float8

from ...manual_axes import vary_as
from ...quantized import Quantized, QuantizedRows
from ...traced_device import device_kind
from ..passes import Pass, outer_pass, product_pass
from ..tuned import Key, tuned_tiles
from .outer import outer_products
from .packed import times_packed
from .packed_dx import times_packed_transposed
from .rows import times_matrices
from .target import check_target, count_multiprocessors
from .visits import ALIGNMENT
from .walk import Tile, choose_tile, is_large

DTYPES = (jnp.bfloat16, jnp.float16)
UNIT = 64
"""What D and F are multiples of: a row of a tile that is swizzled best, 128 bytes."""


def grouped_matmul_mosaic_gpu(
    x: Float[Array, "M D"] | QuantizedRows,
    w: Float[Array, "E D F"] | Quantized,
    group_sizes: Int[Array, " E"],
    tiles: Tile | None = None,
    multiprocessors: int | None = None,
) -> Float[Array, "M F"]:
    """See `grouped_matmul`. Under vmap, one after the other.

    Args:
        x: an array of bfloat16 or float16.
        tiles: of every pass; None: each pass chooses from its shapes.
        multiprocessors: as many blocks walk the tiles; None: those of the GPU that this is traced for.

    Raises:
        NotImplementedError: this is not traced for a Hopper GPU, nor inside the interpreter of one; or it does not take
            the dtype, the shapes, or the format of w.
    """
    check_target()
    rows = _checked(x, w)
    if not rows.shape[0]:
        return jnp.zeros((0, w.shape[2]), rows.dtype)
    return _grouped_matmul(tiles, multiprocessors or count_multiprocessors(), rows, w, group_sizes)


def fp8_grouped_matmul(
    x: Float8[Array, "M D"],
    w_transposed: Float8[Array, "E F D"],
    x_scales: Float[Array, "M 1"],
    w_scales: Float[Array, "E 1 F"],
    group_sizes: Int[Array, " E"],
    tiles: Tile | None = None,
    multiprocessors: int | None = None,
) -> Float[Array, "M F"]:
    """`grouped_matmul` of numbers of 8 bits with a scale for each row and each column. It has no gradient.

    The tensor cores of Hopper keep fewer bits than float32 has while they sum products of fp8 (DeepSeek-V3 technical
    report, 2024, section 3.3.2, https://arxiv.org/abs/2412.19437, says about 14).

    Args:
        x: codes [M, D], float8_e4m3fn.
        w_transposed: codes [E, F, D], float8_e4m3fn, with D last: fp8 products take no other order.
        x_scales: [M, 1], float32: a number is its code times its row's scale.
        w_scales: [E, 1, F], float32, likewise of columns.
        group_sizes: see `grouped_matmul`.
        tiles: see `grouped_matmul_mosaic_gpu`.
        multiprocessors: likewise.

    Returns:
        y [M, F], bfloat16.

    Raises:
        NotImplementedError: see `grouped_matmul_mosaic_gpu`.
    """
    check_target()
    for name, codes in (("x", x), ("w_transposed", w_transposed)):
        if codes.dtype != jnp.float8_e4m3fn:
            raise NotImplementedError(f"{name} has dtype {codes.dtype}; fp8_grouped_matmul takes float8_e4m3fn")
    groups, columns, inner = w_transposed.shape
    if inner % (2 * UNIT) or columns % UNIT:
        raise NotImplementedError(
            f"w_transposed has D = {inner} and F = {columns}; fp8_grouped_matmul takes multiples of {2 * UNIT} and of "
            f"{UNIT}"
        )
    if not x.shape[0]:
        return jnp.zeros((0, columns), jnp.bfloat16)
    if tiles is None:
        tiles = choose_tile(x.shape[0] > 64 * groups, columns, x.dtype)
    rows = _in_eights(x)
    scales = _in_eights(x_scales).reshape(-1), w_scales.reshape(groups, columns)
    y = times_matrices(
        rows,
        w_transposed,
        group_sizes,
        tile=tiles,
        transposed=True,
        multiprocessors=multiprocessors or count_multiprocessors(),
        scales=scales,
    )
    return vary_as(y[: x.shape[0]], x)


def _checked(x, w) -> jax.Array:
    if isinstance(x, QuantizedRows):
        raise NotImplementedError("x is packed rows; mosaic_gpu takes an array")
    if x.dtype not in DTYPES:
        raise NotImplementedError(
            f"x has dtype {x.dtype}; mosaic_gpu takes {' and '.join(dtype.__name__ for dtype in DTYPES)}"
        )
    if not isinstance(w, Quantized) and w.dtype != x.dtype:
        raise NotImplementedError(f"w has dtype {w.dtype} and x {x.dtype}; mosaic_gpu takes one dtype, or a packed w")
    if w.shape[1] % UNIT or w.shape[2] % UNIT:
        raise NotImplementedError(f"w has D = {w.shape[1]} and F = {w.shape[2]}; mosaic_gpu takes multiples of {UNIT}")
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(tile, multiprocessors, x, w, group_sizes):
    return _times_matrices(x, w, group_sizes, tile, multiprocessors, transposed=False)


def _differentiated(tile, multiprocessors, x, w, group_sizes):
    return _grouped_matmul(tile, multiprocessors, x, w, group_sizes), (x, w, group_sizes)


def _gradient(tile, multiprocessors, residuals, dy):
    x, w, group_sizes = residuals
    dx = _times_matrices(dy, w, group_sizes, tile, multiprocessors, transposed=True)
    dw = None if isinstance(w, Quantized) else _outer_products(x, dy, group_sizes, tile, multiprocessors)
    return dx, dw, None


_grouped_matmul.defvjp(_differentiated, _gradient)


def _times_matrices(x, w, group_sizes, tile, multiprocessors, *, transposed: bool):
    if isinstance(w, Quantized):
        times = times_packed_transposed if transposed else times_packed
        times = functools.partial(times, tile=tile, multiprocessors=multiprocessors)
    else:
        if tile is None:
            tile = _tile(product_pass(x, x, w, transposed), x.dtype)
        times = functools.partial(times_matrices, tile=tile, transposed=transposed, multiprocessors=multiprocessors)

    @sequential_vmap
    def call(x, w, group_sizes):
        return times(_in_eights(x), w, group_sizes)[: x.shape[0]]

    return vary_as(call(x, w, group_sizes), x)


def _outer_products(x, dy, group_sizes, tile, multiprocessors):
    if tile is None:
        tile = _tile(outer_pass(x, x, dy, group_sizes.shape[0]), x.dtype)

    @sequential_vmap
    def call(x, dy, group_sizes):
        return outer_products(_in_eights(x), _in_eights(dy), group_sizes, tile=tile, multiprocessors=multiprocessors)

    return vary_as(call(x, dy, group_sizes), x)


def _tile(work: Pass, dtype: jax.typing.DTypeLike) -> Tile:
    """What was measured on this kind of GPU, or else the rule's."""
    return tuned_tiles(Key.of("mosaic_gpu", work), device_kind(), Tile) or choose_tile(
        is_large(work), work.columns, dtype
    )


def _in_eights(rows: jax.Array) -> jax.Array:
    """With rows of nobody at the end, where their number is no multiple of 8."""
    return jnp.pad(rows, ((0, -rows.shape[0] % ALIGNMENT), (0, 0)))
