"""The grouped matmul for Hopper GPUs: its plan against plain Python, its kernels, interpreted, against float64.

JAX' interpreter simulates a GPU's memories, its warpgroups, TMA copies and barriers. It checks for races what kernels
read and write themselves and what TMA brings, not what `wgmma` reads or TMA takes away. Past the arrays' edges it reads
NaN, where TMA has zeros.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode

from dynamoe.kernels.grouped_matmul.mosaic_gpu_kernels.calls import fp8_grouped_matmul, grouped_matmul_mosaic_gpu
from dynamoe.kernels.grouped_matmul.mosaic_gpu_kernels.visits import RowVisits, visits_from_group_starts
from dynamoe.kernels.grouped_matmul.mosaic_gpu_kernels.walk import SHARED_MEMORY, Tile, choose_tile
from dynamoe.kernels.quantized import FORMATS, INT4, INT8, Format, Quantized, dequantize, quantize

ROWS, GROUPS, INNER, WIDTH = 124, 4, 128, 64
"""The rows are no multiple of 8."""
SMALL = Tile(64, 64, 64, 2)
TWO_WARPGROUPS = Tile(64, 64, 128, 2)
SIZES = (20, 0, 70, 13)
"""Groups that share eights and tiles, an empty one, and rows of nobody that do not begin at a multiple of 8."""
PLANS = [(192, 4, 64), (64, 1, 64), (8, 6, 64), (640, 9, 128)]
"""Rows, groups and rows of a tile."""


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RaceDetectionState]]:
    """Inside it kernels are interpreted. The states of the race detector, one for each kernel; none may find a race."""
    found: list[RaceDetectionState] = []

    def recorded(**threads: int) -> RaceDetectionState:
        found.append(RaceDetectionState(**threads))
        return found[-1]

    monkeypatch.setattr(interpreter, "RaceDetectionState", recorded)
    with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized")):
        yield found
    interpreter.reset_gpu_interpret_mode_state()  # a kernel that failed leaves its memory behind
    # JAX itself only prints a race.
    assert found and not any(state.races_found for state in found)


def owners(sizes: Sequence[int], rows: int) -> list[int | None]:
    """The group of each row."""
    found: list[int | None] = np.repeat(np.arange(len(sizes)), sizes).tolist()
    return found + [None] * (rows - len(found))


@functools.cache
def compiled_plan(rows: int, tile: int) -> Callable[[np.ndarray], RowVisits]:
    return jax.jit(lambda sizes: visits_from_group_starts(sizes, rows, tile))


def plan(sizes: np.ndarray, rows: int, tile: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """Group, first row, own start and own end of each visit that counts, and how many of them multiply."""
    visits = compiled_plan(rows, tile)(sizes)
    multiplying, count = (int(one) for one in visits.counts)
    return list(zip(*(np.asarray(column).tolist()[:count] for column in visits[:4]), strict=True)), multiplying


@pytest.mark.parametrize(("rows", "groups", "tile"), PLANS)
@given(data=st.data())
def test_every_row_is_written_by_its_group_or_cleared(rows, groups, tile, data):
    cuts = data.draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups))
    sizes = np.diff(np.minimum(sorted(cuts), rows), prepend=0).astype(np.int32)
    of_row = owners(sizes.tolist(), rows)
    steps, multiplying = plan(sizes, rows, tile)
    assert multiplying <= -(-rows // tile) + groups - 1
    written: list[set[int | None]] = [set() for _ in range(rows)]
    for number, (group, first, start, end) in enumerate(steps):
        assert first % 8 == 0 and 0 <= start < end <= tile
        for row in range(first + start, first + end):
            written[row].add(group if number < multiplying else None)
    assert written == [{group} for group in of_row]


def test_only_at_the_edges_of_a_large_group_a_part_of_a_tile_is_written():
    steps, _ = plan(np.array([100, 155, 385], np.int32), 640, 64)
    assert [(group, start, end) for group, _, start, end in steps if end - start < 64] == [
        *((0, 0, 60), (1, 4, 64), (1, 0, 63), (2, 7, 64))
    ]


@pytest.mark.parametrize("sizes", [[1000, 1, 1, 1], [-5, 400, -3, 2], [2**31 - 1, 1, 0, 0], [2**31 - 1] * 4])
def test_sizes_that_break_their_bounds_visit_no_row_outside(sizes):
    steps, _ = plan(np.array(sizes, np.int32), 192, 64)
    assert all(0 <= group < 4 and 0 <= first + start < first + end <= 192 for group, first, start, end in steps)


def operands(
    groups: int, dtype: jax.typing.DTypeLike = jnp.bfloat16, inner: int = INNER, width: int = WIDTH
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w and dy."""
    random = np.random.default_rng(0)
    shapes = (ROWS, inner), (groups, inner, width), (ROWS, width)
    x, w, dy = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    return x, w, dy


@functools.cache
def compiled(tile: Tile) -> Callable[..., list[jax.Array]]:
    @jax.jit
    def run(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> list[jax.Array]:
        """y, dx and dw."""
        y, back = jax.vjp(lambda x, w: grouped_matmul_mosaic_gpu(x, w, sizes, tile, 2), x, w)
        return [y, *back(dy)]

    return run


def as_float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32), np.float64)


def expected_product(x: np.ndarray, w: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    y = np.zeros((len(x), w.shape[2]))
    for row, group in enumerate(owners(sizes, len(x))):
        if group is not None:
            y[row] = x[row] @ w[group]
    return y


def assert_near(found: jax.Array, expected: np.ndarray, name: str = "y") -> None:
    # Sums are exact to float32; one rounding to bfloat16 is 2**-9.
    np.testing.assert_allclose(as_float64(found), expected, rtol=2**-8, atol=1e-3, err_msg=name)


def assert_right(sizes: Sequence[int], tile: Tile = SMALL, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> None:
    """Against float64, with NaN in every row of nobody."""
    # With one tile of columns there is one step, with two warpgroups there are two.
    x, w, dy = operands(len(sizes), dtype, tile.columns, tile.columns)
    x64, w64, dy64 = as_float64(x), as_float64(w), as_float64(dy)
    dw = np.zeros_like(w64)
    for row, group in enumerate(owners(sizes, ROWS)):
        if group is not None:
            dw[group] += np.outer(x64[row], dy64[row])
    expected = expected_product(x64, w64, sizes), expected_product(dy64, w64.swapaxes(1, 2), sizes), dw
    x, dy = (array.at[sum(sizes) :].set(jnp.nan) for array in (x, dy))
    found = compiled(tile)(x, w, dy, jnp.asarray(sizes, jnp.int32))
    for name, one, wanted in zip(("y", "dx", "dw"), found, expected, strict=True):
        assert_near(one, wanted, name)


def test_groups_that_share_tiles_are_right(races):
    assert_right(SIZES)
    assert len(races) == 3  # one kernel for each of y, dx and dw


def test_two_warpgroups_are_right(races):
    assert_right(SIZES, TWO_WARPGROUPS)


def test_float16_is_right(races):
    assert_right(SIZES, dtype=jnp.float16)


def test_empty_groups_one_group_and_whole_tiles_are_right_and_do_not_compile_again(races):
    assert_right((0, ROWS, 0, 0))
    before = compiled(SMALL)._cache_size()
    assert_right((0, 0, 0, 0))
    assert_right((64, 8, 0, 52))
    assert compiled(SMALL)._cache_size() == before


def test_many_groups_are_right(races):
    sizes = np.zeros(40, np.int32)
    sizes[[0, 3, 20, 21, 39]] = 5, 1, 9, 2, 66
    assert_right(sizes.tolist())


def test_a_group_sees_no_nan_of_its_neighbour(races):
    x, w, dy = operands(GROUPS)
    x, dy = (array.at[20:90].set(jnp.nan) for array in (x, dy))
    y, dx, dw = compiled(SMALL)(x, w, dy, jnp.asarray(SIZES, jnp.int32))
    for rows in (y, dx):
        of_row = np.isnan(as_float64(rows)).any(axis=1)
        assert of_row[20:90].all() and not of_row[:20].any() and not of_row[90:].any()
    assert np.isnan(as_float64(dw)).any(axis=(1, 2)).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("format", "group_size", "zero_points"),
    [(INT8, None, False), (INT8, 64, True), (INT4, 32, False), (INT4, 64, True)],
)
def test_packed_matrices_are_unpacked_exactly(races, format: Format, group_size, zero_points):
    # One warpgroup or two, and one step or several.
    x, w, _ = operands(GROUPS, width=128 if zero_points else 64)
    packed = quantize(w, format, group_size=group_size, zero_points=zero_points)
    expected = expected_product(as_float64(x), as_float64(dequantize(packed)), SIZES)
    x = x.at[sum(SIZES) :].set(jnp.nan)
    y = jax.jit(grouped_matmul_mosaic_gpu)(x, packed, jnp.asarray(SIZES, jnp.int32))
    assert_near(y, expected)


@pytest.mark.parametrize(("format", "zero_points"), [(INT8, True), (INT4, False)])
def test_gradients_through_packed_matrices_are_right(races, format: Format, zero_points):
    x, w, dy = operands(GROUPS, width=128)
    packed = quantize(w, format, zero_points=zero_points)
    expected = expected_product(as_float64(dy), as_float64(dequantize(packed)).swapaxes(1, 2), SIZES)
    dy = dy.at[sum(SIZES) :].set(jnp.nan)

    @jax.jit
    def gradient(x: jax.Array, w: Quantized, dy: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: grouped_matmul_mosaic_gpu(x, w, sizes), x)[1](dy)[0]

    assert_near(gradient(x, packed, dy, jnp.asarray(SIZES, jnp.int32)), expected)


def test_fp8_is_right(races):
    x, w, _ = operands(GROUPS, width=128)
    random = np.random.default_rng(1)
    x, w = x.astype(jnp.float8_e4m3fn), w.swapaxes(1, 2).astype(jnp.float8_e4m3fn)
    x_scales = jnp.asarray(random.uniform(0.5, 2, (ROWS, 1)), jnp.float32)
    w_scales = jnp.asarray(random.uniform(0.5, 2, (GROUPS, 1, 128)), jnp.float32)
    x64 = as_float64(x) * np.asarray(x_scales, np.float64)
    w64 = as_float64(w).swapaxes(1, 2) * np.asarray(w_scales, np.float64)
    x_scales = x_scales.at[sum(SIZES) :].set(jnp.nan)
    y = jax.jit(fp8_grouped_matmul, static_argnums=(5, 6))(
        x, w, x_scales, w_scales, jnp.asarray(SIZES, jnp.int32), Tile(64, 128, 128, 2), 2
    )
    assert_near(y, expected_product(x64, w64, SIZES))


def test_a_platform_that_is_no_hopper_gpu_is_named():
    x, w, _ = operands(GROUPS)
    with pytest.raises(NotImplementedError, match="is for Hopper GPUs .*; the device is cpu"):
        grouped_matmul_mosaic_gpu(x, w, jnp.asarray(SIZES, jnp.int32))


def refused(x: jax.Array, w: object) -> pytest.ExceptionInfo[NotImplementedError]:
    with force_gpu_interpret_mode(), pytest.raises(NotImplementedError) as refusal:
        jax.eval_shape(grouped_matmul_mosaic_gpu, x, w, jnp.asarray(SIZES, jnp.int32))
    return refusal


def test_what_it_does_not_take_is_named():
    x, w, _ = operands(GROUPS, jnp.float32)
    assert refused(x, w).match("x has dtype float32; mosaic_gpu takes bfloat16 and float16")
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    assert refused(x[:, :72], w[:, :72]).match("D = 72 and F = 64; mosaic_gpu takes multiples of 64")
    assert refused(x, w.astype(jnp.float16)).match("w has dtype float16 and x bfloat16")
    for format, size in (("nf4", 64), ("mxfp4", 32), ("fp8_e4m3", 128)):
        assert refused(x, quantize(w, FORMATS[format])).match(
            f"packed as {format} in groups of {size} rows; .* int8 and int4"
        )
    assert refused(x, quantize(w, INT4, group_size=16)).match("int4 in groups of 16 rows; .* a multiple of 32 rows")
    small_groups = quantize(w, INT4, group_size=64)
    with (
        force_gpu_interpret_mode(),
        pytest.raises(NotImplementedError, match="the gradient of x takes multiples of 128"),
    ):
        jax.eval_shape(
            jax.grad(lambda x, sizes: grouped_matmul_mosaic_gpu(x, small_groups, sizes).astype(jnp.float32).sum()),
            x,
            jnp.asarray(SIZES, jnp.int32),
        )


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("columns", [64, 128, 192, 1024, 14336])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_chosen_tiles_divide_the_columns_and_fit(large, columns, dtype):
    tile = choose_tile(large, columns, dtype)
    assert columns % tile.columns == 0 and tile.stages >= 2
    step = jnp.dtype(dtype).itemsize * tile.depth * (tile.rows + tile.columns)
    assert tile.stages * step + 4 * 64 * min(64, tile.width) * tile.warpgroups < SHARED_MEMORY
