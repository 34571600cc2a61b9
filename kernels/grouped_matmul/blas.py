"""A grouped matmul for CPU whose products are a BLAS library's, read and written where XLA keeps the arrays.

XLA's own product of a slice copies it first, which costs as much again where matrices are small. Here a group's rows
are cut into tiles of fixed size, so that results do not depend on who computes which; the tiles go in runs of about
equal cost to the threads, a run being one call of the library. float32 alone.

The library is OpenBLAS out of the wheel scipy-openblas32: an instance of its own, so that running it on one thread does
not slow the caller's numpy. Letters: M rows, D inner width, F output width, E groups, T tiles. What was measured:
experiments/LOG.md.
"""

import ctypes
import functools
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..cpu_ffi import register
from ..quantized import Quantized, QuantizedRows
from .blocked import FEW_ROWS, grouped_matmul_blocked

ROWS = 256
"""Of a tile of the product or of dx, at most."""
SHARE, NARROWEST = 1 / 16, 64
"""A tile of dw is a group's whole matrix or, where the group has more than this share of all rows, so many of the
matrix' rows at least: every tile packs the group's dy again."""
WORTH_A_THREAD = 4e6
"""Floating-point operations below which waking another thread costs more than it brings."""
RUNS_PER_THREAD = 4
"""More even out what else the machine does; each costs a call."""
TARGETS = {which: f"dynamoe_grouped_matmul_{which}" for which in ("forward", "dx", "dw")}
_first_use = threading.Lock()


@jax.custom_vjp
def _grouped_matmul(x, w, group_sizes):
    return _call("forward", (x.shape[0], w.shape[2]), x, w, group_sizes)


def _differentiated(x, w, group_sizes):
    return _grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _gradient(residuals, dy):
    x, w, group_sizes = residuals
    return _call("dx", x.shape, dy, w, group_sizes), _call("dw", w.shape, x, dy, group_sizes), None


_grouped_matmul.defvjp(_differentiated, _gradient)


def _call(which: str, shape: tuple[int, ...], *arguments: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    result = jax.ffi.ffi_call(TARGETS[which], result, vmap_method="sequential")(*arguments)
    # Under shard_map the call's result is taken to be the same on all devices; it varies as its arguments do.
    varying, known = (jax.typeof(array).manual_axis_type.varying for array in (arguments[0], result))
    return jax.lax.pcast(result, tuple(varying - known), to="varying") if varying - known else result


def grouped_matmul_blas(
    x: Float[Array, "M D"] | QuantizedRows, w: Float[Array, "E D F"] | Quantized, group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """See `grouped_matmul`. Under vmap, one after the other. Few rows go the way that `blocked` has for them."""
    if isinstance(w, Quantized) or isinstance(x, QuantizedRows):
        raise NotImplementedError("x or w is packed; allowed are arrays of float32")
    if x.dtype != jnp.float32:
        raise NotImplementedError(f"x has dtype {x.dtype}; allowed is float32")
    with _first_use:
        defect = _defect()
    if defect:
        raise NotImplementedError(defect)
    if x.shape[0] <= FEW_ROWS:  # Reading the matrices is all the cost; the library would pack each for a row or two.
        return grouped_matmul_blocked(x, w, group_sizes)
    return _grouped_matmul(x, w, group_sizes)


class Tiles(NamedTuple):
    """Products a @ b -> c of each tile: its sizes, and where its operands start, in elements."""

    m: np.ndarray
    n: np.ndarray
    k: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


def _forward(arguments: list[np.ndarray], results: list[np.ndarray]) -> None:
    (x, w, sizes), (y,) = arguments, results
    _rows_times_matrices(x, w, sizes, y, transposed=False)


def _dx(arguments: list[np.ndarray], results: list[np.ndarray]) -> None:
    (dy, w, sizes), (dx,) = arguments, results
    _rows_times_matrices(dy, w, sizes, dx, transposed=True)


def _rows_times_matrices(x: np.ndarray, w: np.ndarray, sizes: np.ndarray, y: np.ndarray, transposed: bool) -> None:
    starts, counts = _bounds(sizes, len(x))
    y[starts[-1] + counts[-1] :] = 0
    group, first, m = _cut(counts, -(-counts // ROWS))
    row, inner, width = starts[group] + first, x.shape[1], y.shape[1]
    n, k = np.full_like(m, width), np.full_like(m, inner)
    _multiply(Tiles(m, n, k, row * inner, group * w[0].size, row * width), x, w, y, b_transposed=transposed)


def _dw(arguments: list[np.ndarray], results: list[np.ndarray]) -> None:
    """dw[e] = x_e^T dy_e."""
    (x, dy, sizes), (dw,) = arguments, results
    starts, counts = _bounds(sizes, len(x))
    dw[counts == 0] = 0
    _, inner, width = dw.shape
    tiles = np.minimum(np.ceil(counts / (SHARE * len(x))).astype(np.int64), max(inner // NARROWEST, 1))
    group, first, m = _cut(np.where(counts, inner, 0), tiles)
    row, n, k = starts[group], np.full_like(m, width), counts[group]
    places = row * inner + first, row * width, (group * inner + first) * width
    _multiply(Tiles(m, n, k, *places), x, dy, dw, a_transposed=True)


def _cut(counts: np.ndarray, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut each group's `counts` into `tiles` nearly equal parts: every tile's group, where it begins, its size."""
    group = np.repeat(np.arange(len(counts)), tiles)
    index = np.arange(len(group)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = counts[group] * index // tiles[group]
    return group, first, counts[group] * (index + 1) // tiles[group] - first


def _bounds(sizes: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Each group's first row and its number of rows.

    Clipped: sizes that break their bounds, which the caller reports, must not lead outside the arrays.
    """
    ends = np.minimum(np.cumsum(np.maximum(sizes, 0), dtype=np.int64), rows)
    counts = np.diff(ends, prepend=0)
    return ends - counts, counts


NO, YES, ROW_MAJOR = 111, 112, 101


def _multiply(
    tiles: Tiles,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    a_transposed: bool = False,
    b_transposed: bool = False,
) -> None:
    count = len(tiles.m)
    if not count:
        return
    # The library wants each quantity as an array over tiles, which it calls groups of one product.
    transpose_a, transpose_b = (np.full(count, YES if t else NO, np.int32) for t in (a_transposed, b_transposed))
    m, n, k = (np.ascontiguousarray(size, np.int32) for size in tiles[:3])
    strides = [np.full(count, array.shape[-1], np.int32) for array in (a, b, c)]
    places = [array.ctypes.data + place * 4 for array, place in zip((a, b, c), tiles[3:], strict=True)]
    one, zero, each = np.ones(count, np.float32), np.zeros(count, np.float32), np.ones(count, np.int32)
    columns = (transpose_a, transpose_b, m, n, k, one, places[0], strides[0], places[1], strides[1], zero, places[2])
    columns += (strides[2], each)
    addresses = [(column.ctypes.data, column.itemsize) for column in columns]
    multiply = _library().scipy_cblas_sgemm_batch

    def run(first: int, last: int) -> None:
        *at, ones = (address + first * size for address, size in addresses)
        multiply(ROW_MAJOR, *at, last - first, ones)

    _spread(run, 2.0 * tiles.m * tiles.n * tiles.k)


def _spread(run: Callable[[int, int], None], costs: np.ndarray) -> None:
    """Call `run(first, last)` for runs of tiles that make up all of them, on all threads."""
    total = np.cumsum(costs)
    threads = int(min(_threads(), max(total[-1] // WORTH_A_THREAD, 1)))
    if threads == 1:
        return run(0, len(costs))
    count = threads * RUNS_PER_THREAD
    ends = np.searchsorted(total, total[-1] * np.arange(1, count) / count, side="left") + 1
    cuts = sorted({0, len(costs), *ends.tolist()})
    runs, lock = iter(zip(cuts[:-1], cuts[1:], strict=True)), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                mine = next(runs, None)
            if mine is None:
                return
            run(*mine)

    # The calling thread works too, and takes back what no thread has begun: it never waits for a thread to be free.
    # Whatever fails, it waits for those that have begun: they write to memory that XLA frees after the call.
    helpers, begun = [], []
    try:
        for _ in range(threads - 1):
            helpers.append(_pool().submit(work))
        work()
    finally:
        begun += [helper for helper in helpers if not helper.cancel()]
        wait(begun)
    for helper in begun:
        helper.result()  # raises what it raised


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(_threads() - 1, 1), thread_name_prefix="dynamoe-blas")


@functools.cache
def _library() -> ctypes.CDLL:
    """The wheel's library, loaded from its file: importing the package would give its symbols to scipy's library."""
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the package scipy-openblas32 is not installed")
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    files = sorted(Path(spec.submodule_search_locations[0], "lib").glob(f"*openblas*{suffix}"))
    if not files:
        raise ImportError("the package scipy-openblas32 holds no library for this platform")
    library = ctypes.CDLL(str(files[0]))
    library.scipy_openblas_set_num_threads(1)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.scipy_cblas_sgemm_batch.argtypes = [number, *[pointer] * 13, number, pointer]
    library.scipy_cblas_sgemm_batch.restype = None
    return library


@functools.cache
def _defect() -> str | None:
    """Why this cannot run here, found out once; then also said, for what runs instead by default is slower."""
    try:
        _library()
        for which, function in {"forward": _forward, "dx": _dx, "dw": _dw}.items():
            register(TARGETS[which], function)
        # On a thread of its own: this one may be tracing, for which JAX would add the test to what is traced.
        with ThreadPoolExecutor(1) as fresh:
            fresh.submit(_self_test).result()
    except Exception as error:
        defect = f"BLAS is out of order here: {error}"
        warnings.warn(f"grouped_matmul: {defect}. On CPU the slower 'blocked' is the default instead", stacklevel=2)
        return defect
    return None


def _self_test() -> None:
    """A tiny product and its gradients against numpy's.

    Raises:
        ArithmeticError: they differ.
    """
    sizes = np.array([2, 0, 3], np.int32)
    x, w, dy = (np.arange(np.prod(s), dtype=np.float32).reshape(s) % 7 - 3 for s in ((6, 4), (3, 4, 5), (6, 5)))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for group, mine in ((0, slice(0, 2)), (2, slice(2, 5))):
        y[mine], dx[mine], dw[group] = x[mine] @ w[group], dy[mine] @ w[group].T, x[mine].T @ dy[mine]

    @jax.jit
    def run(x, w, dy):
        found, back = jax.vjp(lambda x, w: _grouped_matmul(x, w, jnp.asarray(sizes)), x, w)
        return found, *back(dy)

    found = run(*jax.device_put((x, w, dy), jax.local_devices(backend="cpu")[0]))
    for name, array, expected in zip(("y", "dx", "dw"), found, (y, dx, dw), strict=True):
        if not np.array_equal(array, expected):  # small integers: exact in any order
            raise ArithmeticError(f"{name} of a small product is wrong")
