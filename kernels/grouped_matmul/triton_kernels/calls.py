"""A grouped matmul for every CUDA GPU, in Triton through jax-triton: y, dx and dw, of plain and of packed matrices.

The kernels are in `plain.py` and `packed.py`; here they get their tiles and their arguments.
Sums run in float32, of float32 in three products of tf32 each, which keep its precision. Not yet run on a GPU:
interpreted on CPU and compiled ahead of time, so it is no platform's default.

Letters: M rows, D inner width, F output width, E groups.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...quantized import Quantized, QuantizedRows
from ...triton_call import Launch, capability, interpreted, refuse_without_gpu, triton_call
from ..passes import Pass, outer_pass, packed_pass, product_pass
from .tiles import LEAST, GpuTiles, choose_tiles, programs

BUNCH = 8
"""Row tiles that go down a column before the next column: a bunch's rows stay in the cache."""
FORMATS = ("int8", "int4", "fp8_e4m3", "nf4", "mxfp4")
FP8_CAPABILITY = 89
"""From which on the hardware converts 8-bit floats."""


def grouped_matmul_triton(
    x: Float[Array, "M D"] | QuantizedRows,
    w: Float[Array, "E D F"] | Quantized,
    group_sizes: Int[Array, " E"],
    tiles: GpuTiles | None = None,
) -> Float[Array, "M F"]:
    """See `grouped_matmul`. Under vmap, one after the other.

    Args:
        tiles: of every pass; None: each chooses.

    Raises:
        NotImplementedError: this is not traced for a GPU nor in Triton's interpreter, jax-triton is not installed, or w
            is packed in a format or in groups that the kernels do not take.
    """
    refuse_without_gpu("triton")
    if isinstance(w, Quantized):
        _check_packed(w, tiles)
    if w.shape[1] * w.shape[2] >= 2**31:
        raise NotImplementedError(f"w has matrices {w.shape[1]} x {w.shape[2]}; triton takes less than 2^31 elements")
    return _grouped_matmul(tiles, x, w, group_sizes)


def _check_packed(w: Quantized, tiles: GpuTiles | None) -> None:
    if w.format.name not in FORMATS:
        raise NotImplementedError(f"w is packed as {w.format.name}; triton takes {', '.join(FORMATS)}")
    least = LEAST * w.format.per_byte
    if not _one_scale(w) and w.group_size % least:
        raise NotImplementedError(
            f"w is packed in groups of {w.group_size} rows; triton takes multiples of {least}, or all of D"
        )
    if tiles is not None and not _one_scale(w) and (w.group_size % tiles.depth or w.group_size % tiles.columns):
        raise ValueError(f"tiles are {tiles} and w has groups of {w.group_size} rows; a tile must lie in one of them")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(tiles, x, w, group_sizes):
    if isinstance(w, Quantized):
        return packed_product(x, w, group_sizes, tiles=tiles)
    return product(x, w, group_sizes, tiles=tiles)


def _differentiated(tiles, x, w, group_sizes):
    return _grouped_matmul(tiles, x, w, group_sizes), (x, w, group_sizes)


def _gradient(tiles, residuals, dy):
    x, w, group_sizes = residuals
    if isinstance(w, Quantized):
        return packed_gradient(dy, w, group_sizes, tiles=tiles), None, None
    dx = product(dy, w, group_sizes, transposed=True, tiles=tiles)
    return dx, outer_products(x, dy, group_sizes, tiles=tiles), None


_grouped_matmul.defvjp(_differentiated, _gradient)


def product(
    x: Float[Array, "N _"],
    w: Float[Array, "E _ _"],
    group_sizes: Int[Array, " E"],
    *,
    transposed: bool = False,
    source: Int[Array, " M"] | None = None,
    target: Int[Array, " M"] | None = None,
    factor: Float[Array, " M"] | None = None,
    outputs: int | None = None,
    tiles: GpuTiles | None = None,
) -> Float[Array, "_ _"]:
    """y[target[i]] = factor[i] * x[source[i]] @ w[group of row i], or with w[group] transposed; no gradient.

    Args:
        source: the row of x of each of the M rows, N for one of nobody, which gives zeros; None: M = N, its own.
        target: the row of y of each; `outputs` for one that is not written; None: its own. Rows of y that no row is for
            stay as they are, which may be anything.
        factor: of each row; None: 1.
        outputs: rows of y; None: M.
    """
    from .plain import product as kernel

    work = product_pass(x if source is None else source, x, w, transposed)
    tiles = tiles or choose_tiles(work)
    outputs = work.rows if outputs is None else outputs
    constants = _constants(work, tiles) | {
        "READABLE": x.shape[0],
        "WRITABLE": outputs,
        "GATHERS": source is not None,
        "SCATTERS": target is not None,
        "SCALES": factor is not None,
        "TRANSPOSED": transposed,
    }
    # A kernel has all its arguments: what it does not look at is an array that it has.
    index = [group_sizes if given is None else given for given in (source, target, factor)]
    out = jax.ShapeDtypeStruct((outputs, work.columns), x.dtype)
    return triton_call(_launch(kernel, work, tiles, constants), x, w, group_sizes, *index, out=out)


def outer_products(
    x: Float[Array, "N D"],
    dy: Float[Array, "O F"],
    group_sizes: Int[Array, " E"],
    *,
    source: Int[Array, " M"] | None = None,
    target: Int[Array, " M"] | None = None,
    tiles: GpuTiles | None = None,
) -> Float[Array, "E D F"]:
    """dw[e] = the sum over group e's rows i of the outer products of x[source[i]] and dy[target[i]]; no gradient.

    Args:
        source, target: the rows of x and of dy of each of the M rows; past their end for one of nobody; None: its own.
    """
    from .plain import outer as kernel

    work = outer_pass(x if source is None else source, x, dy, group_sizes.shape[0])
    tiles = tiles or choose_tiles(work)
    constants = {
        "ROWS": work.rows,
        "INNER": work.depth,
        "WIDTH": work.columns,
        **_groups(work.groups),
        "READABLE": x.shape[0],
        "WRITABLE": dy.shape[0],
        "GATHERS": source is not None,
        "SCATTERS": target is not None,
        "TILE_ROWS": tiles.rows,
        "TILE_INNER": tiles.depth,
        "TILE_WIDTH": tiles.columns,
        "PRECISION": "tf32x3",
    }
    index = [group_sizes if given is None else given for given in (source, target)]
    out = jax.ShapeDtypeStruct((work.groups, work.depth, work.columns), x.dtype)
    return triton_call(_launch(kernel, work, tiles, constants), x, dy, group_sizes, *index, out=out)


def packed_product(x: jax.Array | QuantizedRows, w: Quantized, group_sizes: jax.Array, *, tiles: GpuTiles | None):
    """x @ w for packed w; with packed x, too, the products are of integers."""
    from .packed import packed_product as kernel

    rows, scales = (x.codes, x.scales.reshape(-1)) if isinstance(x, QuantizedRows) else (x, group_sizes)
    work = packed_pass(rows, w, transposed=False)
    tiles = tiles or choose_tiles(work)
    constants = _constants(work, tiles) | _format(w) | {"INTEGERS": isinstance(x, QuantizedRows)}
    dtype = jnp.float32 if isinstance(x, QuantizedRows) else x.dtype
    out = jax.ShapeDtypeStruct((rows.shape[0], w.shape[2]), dtype)
    launch = _launch(kernel, work, tiles, constants)
    return triton_call(launch, rows, scales, *_leaves(w, group_sizes), group_sizes, out=out)


def packed_gradient(dy: jax.Array, w: Quantized, group_sizes: jax.Array, *, tiles: GpuTiles | None):
    """dy @ w^T for packed w."""
    from .packed import packed_gradient as kernel

    work = packed_pass(dy, w, transposed=True)
    tiles = tiles or choose_tiles(work)
    out = jax.ShapeDtypeStruct((dy.shape[0], w.shape[1]), dy.dtype)
    launch = _launch(kernel, work, tiles, _constants(work, tiles) | _format(w))
    return triton_call(launch, dy, *_leaves(w, group_sizes), group_sizes, out=out)


def _one_scale(w: Quantized) -> bool:
    return w.group_size == w.shape[1]


def _leaves(w: Quantized, placeholder: jax.Array) -> tuple[jax.Array, ...]:
    codes = w.codes
    if codes.dtype == jnp.float8_e4m3fn:
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    return codes, w.scales, placeholder if w.zero_points is None else w.zero_points


def _format(w: Quantized) -> dict[str, Any]:
    return {
        "FORMAT": w.format.name,
        "PER_BYTE": w.format.per_byte,
        "GROUP_SIZE": w.group_size,
        "POWERS_OF_TWO": w.format.power_of_two,
        "ZERO_POINTS": w.zero_points is not None,
        "HARDWARE": not interpreted() and capability() >= FP8_CAPABILITY,
    }


def _constants(work: Pass, tiles: GpuTiles) -> dict[str, Any]:
    return {
        "ROWS": work.rows,
        "DEPTH": work.depth,
        "COLUMNS": work.columns,
        **_groups(work.groups),
        "TILE_ROWS": tiles.rows,
        "TILE_DEPTH": tiles.depth,
        "TILE_COLUMNS": tiles.columns,
        "BUNCH": BUNCH,
        "PRECISION": "tf32x3",
    }


def _groups(groups: int) -> dict[str, int]:
    """One lane for each group and one for the rows of nobody."""
    return {"GROUPS": groups, "LANES": 1 << groups.bit_length()}


def _launch(kernel: Any, work: Pass, tiles: GpuTiles, constants: dict[str, Any]) -> Launch:
    return Launch(
        name="grouped_matmul" + ("_dw" if work.outer else "_dx" if work.transposed else ""),
        kernel=kernel,
        programs=programs(work, tiles),
        constants=constants,
        warps=tiles.warps,
        stages=tiles.stages,
    )
