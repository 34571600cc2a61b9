"""The Triton kernels in Triton's interpreter, against float64: values, gradients, and what no row may touch.

The interpreter needs torch, so these tests run beside those that hold models to transformers (make test-parity).
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamoe.kernels import grouped_matmul
from dynamoe.kernels.grouped_matmul.triton_kernels.calls import grouped_matmul_triton
from dynamoe.kernels.grouped_matmul.triton_kernels.tiles import GpuTiles
from dynamoe.kernels.quantized import (
    FP8_E4M3,
    INT2,
    INT4,
    INT8,
    MXFP4,
    NF4,
    Format,
    Quantized,
    QuantizedRows,
    dequantize,
    quantize,
    quantize_rows,
)

packed_kernels = importlib.util.find_spec("dynamoe.kernels.grouped_matmul.triton_kernels.packed")
# Set before Python starts: triton decides at its import, and torch may import it.
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1: make test-parity"),
]

ROWS, GROUPS, INNER, WIDTH = 75, 5, 50, 37
"""The last tile of each axis reaches past the edge of the array."""
SIZES = np.array([20, 0, 33, 1, 9], np.int32)
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Of the largest element."""


def operands(dtype: Any, inner: int = INNER) -> list[jax.Array]:
    """x, w and dy."""
    random = np.random.default_rng(0)
    shapes = (ROWS, inner), (GROUPS, inner, WIDTH), (ROWS, WIDTH)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def in_loops(x: Any, w: Any, dy: Any, sizes: np.ndarray) -> list[np.ndarray]:
    """y, dx and dw, row by row in float64."""
    x, w, dy = (np.asarray(array, np.float64) for array in (x, w, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[row], dx[row] = x[row] @ w[group], w[group] @ dy[row]
        dw[group] += np.outer(x[row], dy[row])
    return [y, dx, dw]


@functools.cache
def compiled(packed: bool) -> Callable[..., list[jax.Array]]:
    """y, dx and, of plain matrices, dw."""

    def run(x: Any, w: Any, dy: jax.Array, sizes: jax.Array) -> list[jax.Array]:
        def product(x: Any, w: Any) -> jax.Array:
            return grouped_matmul(x, w, sizes, implementation="triton")

        if packed:
            y, back = jax.vjp(lambda x: product(x, w), x)
        else:
            y, back = jax.vjp(product, x, w)
        return [y, *back(dy)]

    return jax.jit(run)


def assert_close(found: Sequence[jax.Array], expected: Sequence[np.ndarray], dtype: Any) -> None:
    for name, array, oracle in zip(("y", "dx", "dw"), found, expected, strict=False):
        allowed = TOLERANCE[jnp.dtype(dtype).name] * max(np.abs(oracle).max(), 1.0)
        np.testing.assert_allclose(np.asarray(array, np.float64), oracle, rtol=0, atol=allowed, err_msg=name)


def assert_right(sizes: np.ndarray, dtype: Any = jnp.float32) -> None:
    """With NaN in every row of nobody."""
    x, w, dy = operands(dtype)
    expected = in_loops(x, w, dy, sizes)
    x, dy = (array.at[int(sizes.sum()) :].set(jnp.nan) for array in (x, dy))
    found = compiled(False)(x, w, dy, jnp.asarray(sizes))
    assert [array.dtype for array in found] == [jnp.dtype(dtype)] * 3
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_values_and_gradients_are_those_of_loops(dtype):
    assert_right(SIZES, dtype)


@given(cuts=st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS))
@settings(max_examples=8)
def test_any_group_sizes_are_right(cuts):
    assert_right(np.diff(sorted(cuts), prepend=0).astype(np.int32))


@pytest.mark.parametrize("sizes", [(0, 0, 0, 0, 0), (ROWS, 0, 0, 0, 0), (0, 0, 0, 0, ROWS), (32, 32, 0, 0, 11)])
def test_empty_groups_one_group_and_whole_tiles_are_right(sizes):
    assert_right(np.array(sizes, np.int32))


def test_sizes_that_break_their_bounds_stay_inside_the_arrays_and_are_marked():
    x, w, dy = operands(jnp.float32)
    for sizes in ([100, 1, 1, 1, 1], [-5, 40, -3, 2, 99]):
        y, dx, dw = compiled(False)(x, w, dy, jnp.asarray(sizes, jnp.int32))
        assert bool(jnp.isnan(y[0, 0])) and y.shape == dy.shape
        assert bool(jnp.isfinite(dx).all()) and bool(jnp.isfinite(dw).all())


@pytest.mark.parametrize(
    ("format", "group_size", "zero_points"),
    [
        (INT8, None, False),
        (INT8, 32, True),
        (INT4, None, False),
        (INT4, 32, True),
        (FP8_E4M3, None, False),
        (NF4, 64, False),
        (MXFP4, 32, False),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else str(value),
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_tiles_are_unpacked_to_what_their_codes_stand_for(format, group_size, zero_points, dtype):
    x, w, dy = operands(dtype, inner=128)
    packed = quantize(w, format, group_size=group_size, zero_points=zero_points)
    expected = in_loops(x, dequantize(packed, jnp.float32), dy, SIZES)
    x, dy = (array.at[int(SIZES.sum()) :].set(jnp.nan) for array in (x, dy))
    assert_close(compiled(True)(x, packed, dy, jnp.asarray(SIZES)), expected[:2], dtype)


@pytest.mark.parametrize("format", [INT8, INT4, FP8_E4M3, NF4, MXFP4], ids=lambda format: format.name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_every_code_is_its_number(format, dtype):
    # The identity times every byte: what comes out is the matrix itself.
    codes = np.arange(256, dtype=np.uint8)[None, :, None].view(format.dtype)
    if format == FP8_E4M3:
        codes[0, [0x7F, 0xFF]] = 0  # NaN, which would be in every sum
    scales = jnp.ones((1, 1, 1), jnp.float32)
    if format.power_of_two:
        scales = jnp.full((1, 256 * format.per_byte // 32, 1), 127, jnp.uint8)
    packed = Quantized(
        codes=jnp.asarray(codes),
        scales=scales,
        zero_points=None,
        format=format,
        group_size=256 * format.per_byte // scales.shape[1],
        dtype=jnp.dtype(dtype),
    )
    size = packed.shape[1]
    y = grouped_matmul(jnp.eye(size, dtype=dtype), packed, jnp.array([size]), implementation="triton")
    rounded = np.asarray(dequantize(packed, jnp.float32)[0].astype(dtype))
    np.testing.assert_array_equal(y, rounded)


def test_a_scale_that_is_nan_reaches_its_own_column_alone():
    x, w, _ = operands(jnp.float32, inner=128)
    packed = quantize(w, MXFP4)
    packed = Quantized(**{**vars(packed), "scales": packed.scales.at[2, 1, 3].set(255)})
    y = np.asarray(grouped_matmul(x, packed, jnp.asarray(SIZES), implementation="triton"))
    assert np.isnan(y[20:53, 3]).all() and np.isfinite(np.delete(y, 3, axis=1)).all() and np.isfinite(y[53:]).all()


def test_products_of_integers_are_exact():
    x, w, _ = operands(jnp.float32, inner=128)
    rows, packed = quantize_rows(x), quantize(w, INT8)
    found = grouped_matmul(rows, packed, jnp.asarray(SIZES), implementation="triton")
    expected = grouped_matmul(rows, packed, jnp.asarray(SIZES), implementation="blocked")
    assert isinstance(rows, QuantizedRows) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_formats_and_groups_that_are_not_taken_are_named():
    x, w, _ = operands(jnp.float32, inner=128)
    with pytest.raises(NotImplementedError, match="w is packed as int2; triton takes int8, int4, fp8_e4m3, nf4, mxfp4"):
        grouped_matmul(x, quantize(w, INT2), jnp.asarray(SIZES), implementation="triton")
    with pytest.raises(NotImplementedError, match="in groups of 8 rows; triton takes multiples of 32, or all of D"):
        grouped_matmul(x, quantize(w, INT4, group_size=8), jnp.asarray(SIZES), implementation="triton")


def test_under_vmap_one_follows_the_other():
    x, w, _ = operands(jnp.float32)
    several = jnp.stack([x, 2 * x])
    y = jax.vmap(lambda x: grouped_matmul(x, w, jnp.asarray(SIZES), implementation="triton"))(several)
    np.testing.assert_allclose(y[0], in_loops(x, w, jnp.zeros((ROWS, WIDTH)), SIZES)[0], atol=1e-5)
    np.testing.assert_allclose(y[1], 2 * y[0], rtol=1e-6)


@pytest.mark.parametrize("inner", [16, 20, 33])
def test_packed_matrices_of_few_rows_are_right(inner):
    x, w, dy = operands(jnp.float32, inner=inner)
    for format in (INT8, INT4) if inner % 2 == 0 else (INT8,):
        packed = quantize(w, format)
        expected = in_loops(x, dequantize(packed), dy, SIZES)
        assert_close(compiled(True)(x, packed, dy, jnp.asarray(SIZES)), expected[:2], jnp.float32)
    rows = quantize_rows(x)
    found = grouped_matmul(rows, quantize(w, INT8), jnp.asarray(SIZES), implementation="triton")
    np.testing.assert_allclose(found, grouped_matmul(rows, quantize(w, INT8), jnp.asarray(SIZES)), rtol=1e-6)


def test_tiles_that_reach_over_groups_of_scales_are_refused():
    x, w, _ = operands(jnp.float32, inner=128)
    with pytest.raises(ValueError, match="w has groups of 32 rows; a tile must lie in one of them"):
        grouped_matmul_triton(x, quantize(w, INT4, group_size=32), jnp.asarray(SIZES), GpuTiles(16, 64, 16))


@pytest.mark.parametrize(("dtype", "bits", "too_much"), [(jnp.bfloat16, 0x4300, 136), (jnp.float16, 0x6400, 1032)])
def test_a_code_in_the_lowest_bits_of_a_float_is_that_much_too_large(dtype, bits, too_much):
    # The interpreter cannot subtract in bfloat16, so that the kernel's numbers are looked up in its text.
    source = Path(str(packed_kernels.origin)).read_text()
    assert f"| {bits:#x}).to(tl.{jnp.dtype(dtype).name}, bitcast=True) - {too_much}.0" in source
    code = np.arange(16, dtype=np.int16)
    numbers = ((code ^ 8) | bits).astype(np.uint16).view(jnp.dtype(dtype)) - jnp.dtype(dtype).type(too_much)
    np.testing.assert_array_equal(numbers.astype(np.float32), (code ^ 8) - 8)
