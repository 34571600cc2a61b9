"""`grouped_matmul` of packed matrices against loops in float64 over what they stand for, for every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from dynamoe.kernels import grouped_matmul
from dynamoe.kernels.grouped_matmul.shapes import scaled_sizes
from dynamoe.kernels.quantized import (
    FORMATS,
    FP8_E4M3,
    INT2,
    INT4,
    INT8,
    MXFP4,
    Format,
    Quantized,
    QuantizedRows,
    dequantize,
    quantize,
    quantize_rows,
)

EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", ["native", "blocked", "xla", "reference"])
KINDS = [(format, False) for format in FORMATS.values()] + [(format, True) for format in (INT8, INT4, INT2)]
EVERY_KIND = pytest.mark.parametrize(
    ("format", "zero_points"), KINDS, ids=lambda value: value.name if isinstance(value, Format) else str(value)
)
BOTH_WAYS = pytest.mark.parametrize("rows", [24, 150])
"""A few rows, and blocks: see `blocked`."""
GROUPS, INNER, WIDTH = 5, 64, 7
SIZES = {24: scaled_sizes([4, 0, 1, 11, 2], 20), 150: scaled_sizes([4, 0, 1, 11, 2], 140)}
"""One group is empty, and some rows are nobody's."""
pack = jax.jit(quantize, static_argnames=("format", "group_size", "zero_points"))
unpack = jax.jit(dequantize)
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2}


def operands(rows: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """x, which is NaN where it is nobody's, and dy."""
    random = np.random.default_rng(0)
    x, dy = (random.standard_normal((rows, width)) for width in (INNER, WIDTH))
    x[SIZES[rows].sum() :] = np.nan
    return jnp.asarray(x, dtype), jnp.asarray(dy, dtype)


@functools.cache
def matrices(
    format: Format, zero_points: bool = False, dtype: jax.typing.DTypeLike = jnp.float32, group_size: int | None = 16
) -> Quantized:
    w = np.random.default_rng(1).standard_normal((GROUPS, INNER, WIDTH))
    return pack(jnp.asarray(w, dtype), format, group_size=format.block or group_size, zero_points=zero_points)


@functools.cache
def compiled(implementation: str | None):
    def run(x: jax.Array, w: Quantized, sizes: jax.Array, dy: jax.Array):
        y, back = jax.vjp(lambda x: grouped_matmul(x, w, sizes, implementation=implementation), x)
        return y, *back(dy)

    return jax.jit(run)


def in_loops(x: jax.Array, w: Quantized, sizes: np.ndarray, dy: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """y and dx, row by row in float64."""
    x64, w64, dy64 = (np.asarray(array, np.float64) for array in (x, unpack(w), dy))
    y, dx = np.zeros_like(dy64), np.zeros_like(x64)
    for row, group in enumerate(np.repeat(np.arange(GROUPS), sizes)):
        y[row], dx[row] = x64[row] @ w64[group], w64[group] @ dy64[row]
    return y, dx


def assert_close(found, expected, dtype: jax.typing.DTypeLike = jnp.float32) -> None:
    for array, oracle in zip(found, expected, strict=True):
        assert array.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(array, np.float64), oracle, atol=TOLERANCE[dtype] * max(np.abs(oracle).max(), 1.0)
        )


@EVERY_KIND
@pytest.mark.parametrize(
    ("implementation", "rows"),
    [("native", 24), ("native", 150), ("blocked", 24), ("blocked", 150), ("xla", 150), ("reference", 24)],
)
def test_values_and_the_gradient_of_rows_are_those_of_what_the_codes_stand_for(
    implementation, rows, format, zero_points
):
    x, dy = operands(rows)
    w = matrices(format, zero_points)
    found = compiled(implementation)(x, w, jnp.asarray(SIZES[rows]), dy)
    assert_close(found, in_loops(x, w, SIZES[rows], dy))


@pytest.mark.parametrize(
    ("implementation", "rows"),
    [("native", 24), ("native", 150), ("blocked", 24), ("blocked", 150), ("xla", 150), ("reference", 24)],
)
def test_bfloat16_is_right_to_its_own_precision(implementation, rows):
    x, dy = operands(rows, jnp.bfloat16)
    w = matrices(INT4, dtype=jnp.bfloat16)
    found = compiled(implementation)(x, w, jnp.asarray(SIZES[rows]), dy)
    assert_close(found, in_loops(x, w, SIZES[rows], dy), jnp.bfloat16)


@pytest.mark.parametrize("implementation", ["native", "blocked"])
@pytest.mark.parametrize("group_size", [2, 6, 60])
def test_groups_of_scales_of_any_size_are_right(implementation, group_size):
    x, dy = operands(24)
    w = pack(unpack(matrices(INT8))[:, :60], INT4, group_size=group_size, zero_points=True)
    found = compiled(implementation)(x[:, :60], w, jnp.asarray(SIZES[24]), dy)
    assert_close(found, in_loops(x[:, :60], w, SIZES[24], dy))


@given(cuts=st.lists(st.integers(0, 150), min_size=GROUPS, max_size=GROUPS), rows=st.sampled_from([24, 150]))
@pytest.mark.parametrize("implementation", ["native", "blocked"])
def test_any_group_sizes_are_right(implementation, cuts, rows):
    sizes = np.diff(np.minimum(sorted(cuts), rows), prepend=0).astype(np.int32)
    x, dy = (jnp.nan_to_num(array, nan=1.0) for array in operands(rows))
    found = compiled(implementation)(x, matrices(INT4), jnp.asarray(sizes), dy)
    assert_close(found, in_loops(x, matrices(INT4), sizes, dy))


@functools.cache
def multiply_integers(implementation: str | None):
    run = jax.jit(functools.partial(grouped_matmul, implementation=implementation))

    def run_or_skip(x: QuantizedRows, w: Quantized, sizes: jax.Array) -> jax.Array:
        try:
            return run(x, w, sizes)
        except NotImplementedError as refusal:
            if "AVX512-VNNI" not in str(refusal):
                raise
            pytest.skip(str(refusal))

    return run_or_skip


def integers_in_loops(x: QuantizedRows, w: Quantized, sizes: np.ndarray) -> np.ndarray:
    """The exact sums of integers times the scales, in float64."""
    codes, matrices = (np.asarray(array, np.int64) for array in (x.codes, w.codes))
    y = np.zeros((len(codes), w.shape[2]))
    for row, group in enumerate(np.repeat(np.arange(GROUPS), sizes)):
        y[row] = (codes[row] @ matrices[group]) * np.float64(x.scales[row]) * np.asarray(w.scales, np.float64)[group, 0]
    return y


@BOTH_WAYS
@EVERY_IMPLEMENTATION
def test_packed_rows_give_the_exact_sums_of_integers(implementation, rows):
    x, w = quantize_rows(operands(rows)[0]), matrices(INT8, group_size=None)
    y = multiply_integers(implementation)(x, w, jnp.asarray(SIZES[rows]))
    assert y.dtype == jnp.float32
    # Two roundings, one for each scale; and one of the sum, which float32 holds exactly here.
    np.testing.assert_allclose(y, integers_in_loops(x, w, SIZES[rows]), rtol=3e-7)


@given(cuts=st.lists(st.integers(0, 150), min_size=GROUPS, max_size=GROUPS), rows=st.sampled_from([24, 150]))
@pytest.mark.parametrize("implementation", ["native", "blocked"])
def test_integers_of_any_group_sizes_are_right(implementation, cuts, rows):
    sizes = np.diff(np.minimum(sorted(cuts), rows), prepend=0).astype(np.int32)
    x, w = quantize_rows(jnp.nan_to_num(operands(rows)[0], nan=1.0)), matrices(INT8, group_size=None)
    y = multiply_integers(implementation)(x, w, jnp.asarray(sizes))
    np.testing.assert_allclose(y, integers_in_loops(x, w, sizes), rtol=3e-7)


@BOTH_WAYS
@EVERY_IMPLEMENTATION
def test_sums_are_exact_where_float32_would_lose_digits(implementation, rows):
    # Up to 1,056 * 127 * 127, above 2^24, where float32 steps by 2; then 7 times 1, and all the way down again.
    column = np.concatenate([np.full(1056, 127), np.tile(np.eye(8)[0], 7), np.full(1056, -127)]).astype(np.int8)
    x = QuantizedRows(jnp.asarray(np.tile(np.abs(column), (rows, 1))), jnp.ones((rows, 1)))
    w = Quantized(
        codes=jnp.asarray(np.tile(column[:, None], (GROUPS, 1, 1))),
        scales=jnp.ones((GROUPS, 1, 1)),
        zero_points=None,
        format=INT8,
        group_size=len(column),
        dtype=jnp.dtype(jnp.float32),
    )
    y = multiply_integers(implementation)(x, w, jnp.asarray(SIZES[rows]))
    np.testing.assert_array_equal(y[: SIZES[rows].sum()], 7)


def test_a_packed_matrix_and_its_scales_have_no_gradient():
    x, dy = operands(24)
    w = matrices(INT4, True)
    for implementation in ("blocked", "reference"):

        def loss(x, scales, implementation=implementation):
            leaves, structure = jax.tree.flatten(w)
            packed = jax.tree.unflatten(structure, [leaves[0], scales, leaves[2]])
            return jnp.vdot(grouped_matmul(x, packed, jnp.asarray(SIZES[24]), implementation=implementation), dy)

        dx, dscales = jax.jit(jax.grad(loss, (0, 1)))(x, w.scales)
        assert_close([dx], in_loops(x, w, SIZES[24], dy)[1:])
        np.testing.assert_array_equal(dscales, 0)


@pytest.mark.parametrize("format", [INT4, FP8_E4M3, MXFP4], ids=lambda format: format.name)
@BOTH_WAYS
def test_blocked_never_holds_all_matrices_unpacked(rows, format):
    w = jax.eval_shape(lambda w: quantize(w, format), jax.ShapeDtypeStruct((64, 128, 64), jnp.float32))
    x, sizes = jax.ShapeDtypeStruct((rows, 128), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    run = jax.jit(functools.partial(grouped_matmul, implementation="blocked"))
    memory = run.lower(x, w, sizes).compile().memory_analysis()
    # Half of what float32 takes: 8-bit floats are copied once, as bytes.
    assert memory is not None and memory.temp_size_in_bytes < 2 * w.size


def in_layers() -> Quantized:
    """Two layers of matrices with different scales."""
    w = dequantize(matrices(INT4))
    return jax.vmap(lambda w: quantize(w, INT4, group_size=16, zero_points=True))(jnp.stack([w, 2 * w + 1]))


@EVERY_IMPLEMENTATION
def test_a_scan_over_stacked_layers_is_a_loop(implementation):
    x, dy = operands(24)
    layers, sizes = in_layers(), jnp.asarray(SIZES[24])

    @jax.jit
    def run(x, layers):
        step = jax.checkpoint(lambda carry, w: (carry, grouped_matmul(x, w, sizes, implementation=implementation)))
        return jax.lax.scan(step, None, layers)[1]

    y, back = jax.vjp(lambda x: run(x, layers), x)
    each = [in_loops(x, layers[i], SIZES[24], dy) for i in range(2)]
    assert_close([y[0], y[1], back(jnp.stack([dy, dy]))[0]], [each[0][0], each[1][0], each[0][1] + each[1][1]])


@pytest.mark.parametrize("implementation", ["native", "blocked", "reference"])
@BOTH_WAYS
def test_vmap_is_a_loop_over_examples(implementation, rows):
    x, dy = operands(rows)
    x = jnp.nan_to_num(x, nan=1.0)
    layers, sizes = in_layers(), jnp.asarray(SIZES[rows])
    other = jnp.asarray(SIZES[rows][::-1].copy())
    run = functools.partial(grouped_matmul, implementation=implementation)
    y = jax.jit(jax.vmap(run, (0, None, 0)))(jnp.stack([x, 2 * x]), layers[0], jnp.stack([sizes, other]))
    expected = [in_loops(x, layers[0], SIZES[rows], dy)[0], in_loops(2 * x, layers[0], SIZES[rows][::-1], dy)[0]]
    assert_close([y[0], y[1]], expected)
    y = jax.jit(jax.vmap(run, (None, 0, None)))(x, layers, sizes)
    assert_close([y[0], y[1]], [in_loops(x, layers[i], SIZES[rows], dy)[0] for i in range(2)])


def multiply_on_each_device(implementation: str) -> None:
    """Each device has its own rows and group sizes; all share the packed weights."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    own = PartitionSpec("data")
    run = functools.partial(grouped_matmul, implementation=implementation)
    spread = jax.shard_map(run, mesh=mesh, in_specs=(own, PartitionSpec(), own), out_specs=own)
    w = matrices(INT8, group_size=None)
    x, dy = operands(150)
    sizes = jnp.asarray(np.concatenate([SIZES[150], SIZES[150]]))

    def both_passes(x, dy):
        y, back = jax.vjp(lambda x: spread(x, w, sizes), x)
        return y, *back(dy)

    found = jax.jit(both_passes)(*(jnp.concatenate([array, array]) for array in (x, dy)))
    assert_close(found, [np.concatenate([half, half]) for half in in_loops(x, w, SIZES[150], dy)])

    rows = quantize_rows(operands(24)[0])
    sizes = jnp.asarray(np.concatenate([SIZES[24], SIZES[24]]))
    try:
        y = jax.jit(spread)(jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), rows), w, sizes)
    except NotImplementedError as refusal:
        assert implementation == "native" and "AVX512-VNNI" in str(refusal)
        return
    half = integers_in_loops(rows, w, SIZES[24])
    np.testing.assert_allclose(y, np.concatenate([half, half]), rtol=3e-7)


@pytest.mark.parametrize("implementation", ["native", "blocked"])
def test_under_shard_map_devices_share_packed_weights(run_with_devices, implementation):
    run_with_devices(2, multiply_on_each_device, implementation)


@EVERY_IMPLEMENTATION
def test_traced_group_sizes_out_of_bounds_poison_the_output(implementation):
    x, dy = operands(24)
    x = jnp.nan_to_num(x, nan=1.0)
    y, _ = compiled(implementation)(x, matrices(INT4), jnp.array([25, 0, 0, 0, 0]), dy)
    assert jnp.isnan(y).sum() == 1 and jnp.isnan(y[0, 0])
    w = matrices(INT8, group_size=None)
    y = multiply_integers(implementation)(quantize_rows(x), w, jnp.array([5, -1, 0, 0, 0]))
    assert jnp.isnan(y).sum() == 1 and jnp.isnan(y[0, 0])


def test_without_a_name_what_takes_packed_weights_runs():
    x, dy = operands(24)
    found = compiled(None)(x, matrices(INT4), jnp.asarray(SIZES[24]), dy)
    assert_close(found, in_loops(x, matrices(INT4), SIZES[24], dy))


def test_packed_rows_without_width_or_groups_are_zeros():
    rows = QuantizedRows(jnp.zeros((5, 4), jnp.int8), jnp.ones((5, 1)))
    w = quantize(jnp.zeros((0, 4, 3)), INT8)
    np.testing.assert_array_equal(grouped_matmul(rows, w, jnp.zeros(0, jnp.int32)), np.zeros((5, 3), np.float32))


X, SIZE = jnp.zeros((6, 4)), jnp.array([1, 2, 3])
W = quantize(jnp.ones((3, 4, 5)), INT8)
ROWS = quantize_rows(X)


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (X, W[0], r"w has shape \(4, 5\); it must be \[E, D, F\]"),
        (X[:, 1:], W, r"x has shape \(6, 3\) and w \(3, 4, 5\); D"),
        (X, W[:2], "group_sizes has length 3; w has 2 groups"),
        (X, W.astype(jnp.bfloat16), "w has dtype bfloat16 and x float32; they must be of one dtype"),
        (
            ROWS,
            jnp.ones((3, 4, 5)),
            "x is packed rows and w an array of float32; with packed rows w must be packed int8",
        ),
        (ROWS, quantize(jnp.ones((3, 4, 5)), INT4), "x is packed rows and w int4 in groups of 4; .* must be int8"),
        (
            ROWS,
            quantize(jnp.ones((3, 4, 5)), INT8, group_size=2),
            "x is packed rows and w int8 in groups of 2; with packed rows w must be int8, with one group, all of D",
        ),
        (ROWS, quantize(jnp.ones((3, 4, 5)), INT8, zero_points=True), "w int8 in groups of 4 with zero points; with"),
        (
            ROWS._replace(scales=jnp.ones((6, 2))),
            W,
            r"x has codes int8\[6, 4\] and scales \[6, 2\]; they must be int8\[M, D\] and \[M, 1\]",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(unchecked, x, w, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, w, SIZE)
