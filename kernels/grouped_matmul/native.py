"""A grouped matmul for CPU in C++, `native.cc`, called by XLA where it keeps the arrays.

XLA's own product of a slice copies it first, and its plain product is slower than a good library's. Letters: M rows, D
inner width, F output width, E groups. What was measured: experiments/LOG.md.
"""

import functools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..native_code import compiled_library, register

SOURCE = Path(__file__).with_name("native.cc")
TARGETS = {symbol: f"dynamoe_{symbol}" for symbol in ("rows_times_matrices", "gradient_of_matrices")}
_first_use = threading.Lock()


def grouped_matmul_native(
    x: Float[Array, "M D"], w: Float[Array, "E D F"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """See `grouped_matmul`. Under vmap, one after the other."""
    with _first_use:
        defect = _defect()
    if defect:
        raise NotImplementedError(defect)
    return _grouped_matmul(x, w, group_sizes)


@jax.custom_vjp
def _grouped_matmul(x, w, group_sizes):
    return _rows_times_matrices(x, w, group_sizes, transposed=False)


def _differentiated(x, w, group_sizes):
    return _grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _gradient(residuals, dy):
    x, w, group_sizes = residuals
    dw = _call("gradient_of_matrices", w.shape, x, dy, group_sizes)
    return _rows_times_matrices(dy, w, group_sizes, transposed=True), dw, None


_grouped_matmul.defvjp(_differentiated, _gradient)


def _rows_times_matrices(x, w, group_sizes, *, transposed: bool):
    shape = (x.shape[0], w.shape[1 if transposed else 2])
    return _call("rows_times_matrices", shape, x, w, group_sizes, transposed=transposed)


def _call(symbol: str, shape: tuple[int, ...], x: jax.Array, *others: jax.Array, **attributes: bool) -> jax.Array:
    result = jax.ShapeDtypeStruct(shape, x.dtype)
    result = jax.ffi.ffi_call(TARGETS[symbol], result, vmap_method="sequential")(x, *others, **attributes)
    # Under shard_map the call's result is taken to be the same on all devices; it varies as its arguments do.
    varying, known = (jax.typeof(array).manual_axis_type.varying for array in (x, result))
    return jax.lax.pcast(result, tuple(varying - known), to="varying") if varying - known else result


@functools.cache
def _defect() -> str | None:
    """Why this cannot run here, found out once; then also said, for what runs instead by default is slower."""
    try:
        library = compiled_library(SOURCE)
        for symbol, target in TARGETS.items():
            register(library, symbol, target)
        # On a thread of its own: this one may be tracing, for which JAX would add the test to what is traced.
        with ThreadPoolExecutor(1) as fresh:
            fresh.submit(_self_test).result()
    except Exception as error:
        defect = f"the C++ of grouped_matmul is out of order here: {error}"
        warnings.warn(f"{defect}. On CPU the slower 'blocked' is the default instead", stacklevel=2)
        return defect
    return None


def _self_test() -> None:
    """A small product and its gradients against numpy's.

    Raises:
        ArithmeticError: they differ.
    """
    sizes = np.array([2, 0, 30], np.int32)
    x, w, dy = (np.arange(np.prod(s), dtype=np.float32).reshape(s) % 7 - 3 for s in ((33, 9), (3, 9, 37), (33, 37)))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for group, mine in ((0, slice(0, 2)), (2, slice(2, 32))):
        y[mine], dx[mine], dw[group] = x[mine] @ w[group], dy[mine] @ w[group].T, x[mine].T @ dy[mine]

    @jax.jit
    def run(x, w, dy):
        found, back = jax.vjp(lambda x, w: _grouped_matmul(x, w, jnp.asarray(sizes)), x, w)
        return found, *back(dy)

    found = run(*jax.device_put((x, w, dy), jax.local_devices(backend="cpu")[0]))
    for name, array, expected in zip(("y", "dx", "dw"), found, (y, dx, dw), strict=True):
        if not np.array_equal(array, expected):  # small integers: exact in any order
            raise ArithmeticError(f"{name} of a small product is wrong")
