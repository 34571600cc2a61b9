"""Packed matrices in the grouped matmul for TPU, interpreted, against what they stand for in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dynamoe.kernels.grouped_matmul import mosaic_tpu
from dynamoe.kernels.grouped_matmul.mosaic_tpu import EXACT_DEPTH, grouped_matmul_mosaic_tpu
from dynamoe.kernels.grouped_matmul.tiles import Tiles
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
)

ROWS, GROUPS, INNER, WIDTH = 27, 4, 96, 7
TILES = Tiles(8, 64, 4)
"""The last tile of D and F reaches past the edge, in the codes as in the scales."""
SIZES = np.array([5, 0, 13, 2], np.int32)
KINDS = [(INT8, None, False), (INT4, 16, True), (INT2, 32, False), (FP8_E4M3, None, False), (NF4, 32, False)]


@functools.partial(jax.jit, static_argnums=4)
def run(x: jax.Array, w: Quantized, dy: jax.Array, sizes: jax.Array, tiles: Tiles) -> list[jax.Array]:
    """y and dx."""
    y, back = jax.vjp(lambda x: grouped_matmul_mosaic_tpu(x, w, sizes, tiles), x)
    return [y, *back(dy)]


@pytest.mark.parametrize(
    ("format", "group_size", "zero_points"),
    [*KINDS, (MXFP4, 32, False)],
    ids=lambda value: value.name if isinstance(value, Format) else str(value),
)
def test_tiles_are_unpacked_to_what_their_codes_stand_for(format, group_size, zero_points):
    random = np.random.default_rng(0)
    shapes = (ROWS, INNER), (GROUPS, INNER, WIDTH), (ROWS, WIDTH)
    x, w, dy = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)
    packed = quantize(w, format, group_size=group_size, zero_points=zero_points)
    x64, w64, dy64 = (np.asarray(array, np.float64) for array in (x, dequantize(packed), dy))
    y, dx = np.zeros_like(dy64), np.zeros_like(x64)
    for row, group in enumerate(np.repeat(np.arange(GROUPS), SIZES)):
        y[row], dx[row] = x64[row] @ w64[group], w64[group] @ dy64[row]
    x, dy = (array.at[SIZES.sum() :].set(jnp.nan) for array in (x, dy))
    with pltpu.force_tpu_interpret_mode(True):
        found = run(x, packed, dy, jnp.asarray(SIZES), TILES)
    for name, array, expected in zip(("y", "dx"), found, (y, dx), strict=True):
        np.testing.assert_allclose(array, expected, atol=3e-5, err_msg=name)


@pytest.mark.parametrize("integers", [True, False])
def test_sums_of_integers_are_exact_also_where_the_chip_has_floats_alone(monkeypatch, integers):
    monkeypatch.setattr(mosaic_tpu, "_multiplies_integers", lambda: integers)
    # Up to 1,050 * 127 * 127, above 2^24, where float32 steps by 2; then 7, and all the way down again.
    column = np.repeat([127, 1, -127, 0], [1050, 7, 1050, 5]).astype(np.int8)
    x = QuantizedRows(jnp.asarray(np.tile(np.abs(column), (ROWS, 1))), jnp.full((ROWS, 1), 0.5))
    w = Quantized(
        codes=jnp.asarray(np.tile(column[:, None], (GROUPS, 1, 2))),
        scales=jnp.asarray([[[2.0, 4.0]]] * GROUPS),
        zero_points=None,
        format=INT8,
        group_size=len(column),
        dtype=jnp.dtype(jnp.float32),
    )
    with pltpu.force_tpu_interpret_mode(True):
        y = jax.jit(lambda x, w, sizes: grouped_matmul_mosaic_tpu(x, w, sizes))(x, w, jnp.asarray(SIZES))
    assert len(column) > EXACT_DEPTH
    np.testing.assert_array_equal(y[: SIZES.sum()], [[7, 14]] * SIZES.sum())
    np.testing.assert_array_equal(y[SIZES.sum() :], 0)


def test_small_groups_of_scales_are_refused():
    w = quantize(jnp.ones((GROUPS, INNER, WIDTH)), INT4, group_size=4)
    with (
        pltpu.force_tpu_interpret_mode(True),
        pytest.raises(
            NotImplementedError, match="packed in groups of 4 rows; mosaic_tpu takes multiples of 8, or all of D"
        ),
    ):
        grouped_matmul_mosaic_tpu(jnp.ones((ROWS, INNER)), w, jnp.asarray(SIZES))
