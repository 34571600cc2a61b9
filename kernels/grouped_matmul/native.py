"""A grouped matmul for CPU in C++, `native*.cc`, called by XLA where it keeps the arrays.

XLA's own product of a slice copies it first, and its plain product is slower than a good library's. Letters: M rows, D
inner width, F output width, E groups. What was measured: experiments/LOG.md.
"""

import functools
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..manual_axes import vary_as
from ..native_code import compiled_library, register
from ..quantized import Format, Quantized, QuantizedRows, dequantize, quantize

PLAIN, PACKED, INTEGER = (Path(__file__).with_name(f"native{part}.cc") for part in ("", "_packed", "_integer"))
INSTRUCTIONS = "a CPU with AVX512-VNNI"
"""What native_integer.cc is written for."""
PREFIX = "dynamoe_"
"""Of the names that XLA knows the handlers by."""
_first_use = threading.Lock()


def grouped_matmul_native(
    x: Float[Array, "M D"] | QuantizedRows, w: Float[Array, "E D F"] | Quantized, group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """See `grouped_matmul`. Under vmap, one after the other.

    Raises:
        NotImplementedError: it cannot be compiled here, or x is of float16.
    """
    if not isinstance(x, QuantizedRows) and x.dtype.name not in ERRORS:
        raise NotImplementedError(f"x has dtype {x.dtype}; native takes {' and '.join(ERRORS)}")
    with _first_use:
        defect = _defect(w.format if isinstance(w, Quantized) else None, isinstance(x, QuantizedRows))
    if defect:
        raise NotImplementedError(defect)
    if isinstance(x, QuantizedRows):
        assert isinstance(w, Quantized)
        return _integer_products(x, w, group_sizes)
    return _grouped_matmul(x, w, group_sizes)


@jax.custom_vjp
def _grouped_matmul(x, w, group_sizes):
    return _rows_times_matrices(x, w, group_sizes, transposed=False)


def _differentiated(x, w, group_sizes):
    return _grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _gradient(residuals, dy):
    x, w, group_sizes = residuals
    dw = None if isinstance(w, Quantized) else _call("gradient_of_matrices", w.shape, (x, dy, group_sizes), {}, x.dtype)
    return _rows_times_matrices(dy, w, group_sizes, transposed=True), dw, None


_grouped_matmul.defvjp(_differentiated, _gradient)


def _rows_times_matrices(x, w, group_sizes, *, transposed: bool):
    shape = (x.shape[0], w.shape[1 if transposed else 2])
    if not isinstance(w, Quantized):
        return _call("rows_times_matrices", shape, (x, w, group_sizes), {"transposed": transposed}, x.dtype)
    zero_points = jnp.zeros(0, jnp.int8) if w.zero_points is None else w.zero_points
    arguments = (x, w.codes, w.scales, zero_points, group_sizes)
    # Widths of attributes are C++ types.
    attributes = {"transposed": transposed, "group_size": np.int64(w.group_size)}
    return _call(f"rows_times_{w.format.name}", shape, arguments, attributes, x.dtype)


def _integer_products(x: QuantizedRows, w: Quantized, group_sizes):
    """Without a gradient: `grouped_matmul` has none for packed rows."""
    arguments = (x.codes, x.scales, w.codes, w.scales, group_sizes)
    return _call("rows_times_integers", (x.codes.shape[0], w.shape[2]), arguments, {}, jnp.float32)


def _call(
    target: str,
    shape: tuple[int, ...],
    arguments: tuple[jax.Array, ...],
    attributes: Mapping[str, Any],
    dtype: jax.typing.DTypeLike,
):
    call = jax.ffi.ffi_call(PREFIX + target, jax.ShapeDtypeStruct(shape, dtype), vmap_method="sequential")
    return vary_as(call(*arguments, **attributes), arguments[0])


@functools.cache
def _defect(format: Format | None, packed_rows: bool = False) -> str | None:
    """Why this cannot run here, found out once. A defect is also said, for what runs instead by default is slower."""
    try:
        if packed_rows:
            library = compiled_library(INTEGER)
            if not hasattr(library, "rows_times_integers"):
                return f"x is packed rows, and their products need {INSTRUCTIONS}; allowed here is an array"
            register(library, "rows_times_integers", f"{PREFIX}rows_times_integers")
        elif format is None:
            library = compiled_library(PLAIN)
            for symbol in ("rows_times_matrices", "gradient_of_matrices"):
                register(library, symbol, PREFIX + symbol)
        else:
            library = compiled_library(PACKED, FORMAT=format.name)
            register(library, "rows_times_packed", f"{PREFIX}rows_times_{format.name}")
        # On a thread of its own: this one may be tracing, for which JAX would add the test to what is traced.
        with ThreadPoolExecutor(1) as fresh:
            (fresh.submit(_self_test_of_integers) if packed_rows else fresh.submit(_self_test, format)).result()
    except Exception as error:
        defect = f"the C++ of grouped_matmul is out of order here: {error}"
        warnings.warn(f"{defect}. On CPU the slower 'blocked' is the default instead", stacklevel=2)
        return defect
    return None


SIZES = (2, 0, 30)
"""Groups of the products that a first use tests; one row more is nobody's."""
ERRORS = {"float32": 1e-6, "bfloat16": 4e-3}
"""Of the largest number, allowed in them."""


def _small_operands() -> list[np.ndarray]:
    """x, w and dy, small integers."""
    shapes = (33, 64), (3, 64, 37), (33, 37)
    return [np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 7 - 3 for shape in shapes]


def _self_test(format: Format | None) -> None:
    """A small product and its gradients against numpy's; of plain matrices in both dtypes: each has its own loops.

    Raises:
        ArithmeticError: they differ.
    """
    x, w, dy = _small_operands()

    @jax.jit
    def run(x, matrices, dy):
        found, back = jax.vjp(lambda x, w: _grouped_matmul(x, w, jnp.asarray(SIZES)), x, matrices)
        return found, *back(dy)

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        if format is None:
            all_found = [run(*(jnp.asarray(array, dtype) for array in (x, w, dy))) for dtype in ERRORS]
        else:
            matrices = quantize(jnp.asarray(w), format)
            all_found, w = [run(x, matrices, dy)[:2]], np.asarray(dequantize(matrices))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for group, mine in ((0, slice(0, 2)), (2, slice(2, 32))):
        y[mine], dx[mine], dw[group] = x[mine] @ w[group], dy[mine] @ w[group].T, x[mine].T @ dy[mine]
    for found in all_found:
        for name, array, expected in zip(("y", "dx", "dw"), found, (y, dx, dw), strict=False):
            error = ERRORS[array.dtype.name] * np.abs(expected).max()
            if not np.allclose(np.asarray(array, np.float32), expected, rtol=0, atol=error):
                raise ArithmeticError(f"{name} of a small product is wrong")


def _self_test_of_integers() -> None:
    """A small product of codes against numpy's, exactly.

    Raises:
        ArithmeticError: they differ.
    """
    x, w, _ = (array.astype(np.int8) * 42 for array in _small_operands())
    scales = np.ones((len(x), 1), np.float32), np.ones((len(w), 1, w.shape[2]), np.float32)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        arrays = (jnp.asarray(array) for array in (x, scales[0], w, scales[1], np.array(SIZES, np.int32)))
        call = functools.partial(_call, "rows_times_integers", (len(x), w.shape[2]), attributes={}, dtype=jnp.float32)
        found = jax.jit(lambda *arrays: call(arrays))(*arrays)
    y = np.zeros(found.shape)
    for group, mine in ((0, slice(0, 2)), (2, slice(2, 32))):
        y[mine] = x[mine].astype(np.int32) @ w[group].astype(np.int32)
    if not np.array_equal(found, y):
        raise ArithmeticError("a small product of integers is wrong")
