"""`grouped_matmul` against loops in float64, in value and gradient, for every implementation."""

import functools
import importlib.util
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from dynamoe.kernels import grouped_matmul
from dynamoe.kernels.grouped_matmul.api import IMPLEMENTATIONS
from dynamoe.kernels.grouped_matmul.blocked import FEW_ROWS, block_sizes
from dynamoe.kernels.grouped_matmul.shapes import routed_counts, scaled_sizes

FOR_GPU = ("triton", "mosaic_gpu")
"""Their own interpreters have their own rules: `test_triton.py`, `test_mosaic_gpu.py`."""
EVERY_IMPLEMENTATION = pytest.mark.parametrize(
    "implementation", [name for name in IMPLEMENTATIONS if name not in FOR_GPU]
)
MANY, FEW, GROUPS, INNER, WIDTH = 330, 24, 5, 12, 7
"""Rows for blocks of several sizes, and for the way of a few rows."""
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2, jnp.float16: 2e-3}


@pytest.fixture(autouse=True, scope="module")
def kernels_for_tpu_are_interpreted() -> Iterator[None]:
    """By Pallas' plain interpreter, which is fast; `test_mosaic_tpu.py` also simulates a TPU."""
    with pltpu.force_tpu_interpret_mode(True):
        yield


def operands(rows: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w and dy."""
    random = np.random.default_rng(0)
    shapes = (rows, INNER), (GROUPS, INNER, WIDTH), (rows, WIDTH)
    x, w, dy = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    return x, w, dy


def in_loops(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: np.ndarray) -> list[np.ndarray]:
    """y, dx and dw, row by row in float64."""
    x64, w64, dy64 = (np.asarray(array, np.float64) for array in (x, w, dy))
    y, dx, dw = np.zeros_like(dy64), np.zeros_like(x64), np.zeros_like(w64)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[row] = x64[row] @ w64[group]
        dx[row] = dy64[row] @ w64[group].T
        dw[group] += np.outer(x64[row], dy64[row])
    return [y, dx, dw]


@functools.cache
def compiled(implementation: str | None) -> Callable[..., list[jax.Array]]:
    """y, dx and dw of an implementation, compiled once for each shape."""

    def run(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> list[jax.Array]:
        y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return [y, *back(dy)]

    return jax.jit(run)


def assert_close(found: list[jax.Array], expected: list[np.ndarray], dtype: jax.typing.DTypeLike = jnp.float32) -> None:
    for name, array, oracle in zip(("y", "dx", "dw"), found, expected, strict=True):
        scale = max(np.abs(oracle).max(), 1.0)
        np.testing.assert_allclose(np.asarray(array, np.float64), oracle, atol=TOLERANCE[dtype] * scale, err_msg=name)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [MANY, pytest.param(FEW, marks=pytest.mark.smoke)])
def test_values_and_gradients_are_those_of_loops(implementation, rows, dtype):
    x, w, dy = operands(rows, dtype)
    sizes = scaled_sizes([4, 0, 1, 11, 2], rows)
    found = compiled(implementation)(x, w, dy, jnp.asarray(sizes))
    assert [array.dtype for array in found] == [dtype] * 3
    assert_close(found, in_loops(x, w, dy, sizes), dtype)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize(
    "sizes",
    [
        (0, 0, 0, 0, 0),
        (MANY, 0, 0, 0, 0),
        (0, 0, 0, 0, MANY),
        (0, 0, 1, 0, 0),
        (128, 0, 0, 128, 74),
        (1, 63, 65, 129, 72),
        (256, 0, 0, 0, 0),
    ],
)
def test_empty_groups_and_full_blocks_are_those_of_loops(implementation, sizes):
    x, w, dy = operands(MANY)
    found = compiled(implementation)(x, w, dy, jnp.asarray(sizes, jnp.int32))
    assert_close(found, in_loops(x, w, dy, np.asarray(sizes)))


@given(cuts=st.lists(st.integers(0, MANY), min_size=GROUPS, max_size=GROUPS), few=st.booleans())
def test_any_group_sizes_are_right(cuts, few):
    rows = FEW if few else MANY
    ends = np.minimum(sorted(cuts), rows)
    sizes = np.diff(ends, prepend=0).astype(np.int32)
    x, w, dy = operands(rows)
    assert_close(compiled("blocked")(x, w, dy, jnp.asarray(sizes)), in_loops(x, w, dy, sizes))


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_rows_past_the_sum_leak_nothing(implementation, rows):
    x, w, dy = operands(rows)
    sizes = np.array([3, 0, 5, 0, 9], np.int32)
    expected = in_loops(x, w, dy, sizes)
    x, dy = (array.at[sizes.sum() :].set(jnp.nan) for array in (x, dy))
    assert_close(compiled(implementation)(x, w, dy, jnp.asarray(sizes)), expected)


def test_other_group_sizes_do_not_compile_again():
    x, w, dy = operands(MANY)
    run = compiled("blocked")
    run(x, w, dy, jnp.array([1, 2, 3, 4, 5]))
    before = run._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    run(x, w, dy, jnp.array([100, 0, 0, 0, 50]))
    assert run._cache_size() == before  # pyright: ignore[reportFunctionMemberAccess]


@EVERY_IMPLEMENTATION
def test_scan_and_checkpoint_change_nothing(implementation):
    x, w, dy = operands(MANY)
    sizes = jnp.array([[30, 30, 30, 30, 30], [150, 0, 0, 0, 0]])

    def total(x, w, sizes):
        return jnp.sum(grouped_matmul(x, w, sizes, implementation=implementation) * dy)

    @jax.jit
    def scanned(x, w):
        step = jax.checkpoint(lambda sum, sizes: (sum + total(x, w, sizes), None))
        return jax.lax.scan(step, jnp.zeros(()), sizes)[0]

    found = jax.grad(scanned, (0, 1))(x, w)
    each = [in_loops(x, w, dy, np.asarray(one))[1:] for one in sizes]
    for array, first, second in zip(found, *each, strict=True):
        np.testing.assert_allclose(array, first + second, atol=1e-3)


@pytest.mark.parametrize("implementation", ["native", "blocked", "mosaic_tpu", "reference"])
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_vmap_is_a_loop_over_examples(implementation, rows):
    x, w, dy = operands(rows)
    sizes = jnp.stack([jnp.asarray(scaled_sizes(counts, rows)) for counts in ([1, 2, 3, 4, 5], [0, 9, 0, 1, 0])])
    xs = jnp.stack([x, 2 * x])

    @jax.jit
    def run(xs, w, sizes):
        each = jax.vmap(lambda x, w, sizes: grouped_matmul(x, w, sizes, implementation=implementation), (0, None, 0))
        y, back = jax.vjp(lambda xs, w: each(xs, w, sizes), xs, w)
        return y, *back(jnp.stack([dy, dy]))

    y, dx, dw = run(xs, w, sizes)
    first, second = (in_loops(x, w, dy, np.asarray(size)) for x, size in zip(xs, sizes, strict=True))
    assert_close([y[0], dx[0], dw], [first[0], first[1], first[2] + second[2]])
    assert_close([y[1], dx[1], dw], [second[0], second[1], first[2] + second[2]])


def multiply_on_each_device() -> None:
    """Each device has its own rows and group sizes; all share the weights."""
    with pltpu.force_tpu_interpret_mode(True):
        _multiply_on_each_device()


def _multiply_on_each_device() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows, own = PartitionSpec("data"), [np.array([70, 0, 5, 50, 25]), np.array([0, MANY, 0, 0, 0])]
    x, w, dy = operands(2 * MANY)
    sizes = jnp.asarray(np.concatenate(own), jnp.int32)
    for implementation in ("native", "blocked", "xla", "mosaic_tpu"):
        local = functools.partial(grouped_matmul, implementation=implementation)
        # Pallas' interpreter mixes values that vary over devices with those that do not.
        checked = {"check_vma": implementation != "mosaic_tpu"}
        spread = jax.shard_map(local, mesh=mesh, in_specs=(rows, PartitionSpec(), rows), out_specs=rows, **checked)

        def run(x, w, spread=spread):
            y, back = jax.vjp(lambda x, w: spread(x, w, sizes), x, w)
            return [y, *back(dy)]

        halves = [in_loops(x[half], w, dy[half], own[i]) for i, half in enumerate((slice(0, MANY), slice(MANY, None)))]
        (y0, dx0, dw0), (y1, dx1, dw1) = halves
        assert_close(jax.jit(run)(x, w), [np.concatenate([y0, y1]), np.concatenate([dx0, dx1]), dw0 + dw1])


def test_under_shard_map_the_gradient_of_shared_weights_is_summed(run_with_devices):
    run_with_devices(2, multiply_on_each_device)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("sizes", [(MANY + 1, 0, 0, 0, 0), (70, 70, 70, 70, 70), (10, -1, 10, 10, 10)])
def test_traced_group_sizes_out_of_bounds_poison_the_output(implementation, sizes):
    y, _, _ = compiled(implementation)(*operands(MANY), jnp.asarray(sizes, jnp.int32))
    assert jnp.isnan(y).sum() == 1 and jnp.isnan(y[0, 0])


def test_a_matmul_without_rows_groups_or_width_is_empty_or_zero():
    empty = jnp.zeros(0, jnp.int32)
    assert grouped_matmul(jnp.zeros((0, 3)), jnp.zeros((2, 3, 4)), jnp.zeros(2, jnp.int32)).shape == (0, 4)
    assert grouped_matmul(jnp.zeros((5, 3)), jnp.zeros((2, 3, 0)), jnp.array([1, 4])).shape == (5, 0)
    np.testing.assert_array_equal(grouped_matmul(jnp.ones((5, 3)), jnp.zeros((0, 3, 4)), empty), np.zeros((5, 4)))
    np.testing.assert_array_equal(
        grouped_matmul(jnp.ones((5, 0)), jnp.zeros((1, 0, 4)), jnp.array([5])), jnp.zeros((5, 4))
    )


def test_float16_is_multiplied_by_the_first_that_takes_it():
    x, w, dy = operands(MANY, jnp.float16)
    sizes = scaled_sizes([4, 0, 1, 11, 2], MANY)
    found = compiled(None)(x, w, dy, jnp.asarray(sizes))
    assert [array.dtype for array in found] == [jnp.float16] * 3
    assert_close(found, in_loops(x, w, dy, sizes), jnp.float16)
    with pytest.raises(NotImplementedError, match="x has dtype float16; native takes float32 and bfloat16"):
        grouped_matmul(x, w, jnp.asarray(sizes), implementation="native")
    with pytest.raises(NotImplementedError, match="x has dtype float16; mosaic_tpu takes float32 and bfloat16"):
        grouped_matmul(x, w, jnp.asarray(sizes), implementation="mosaic_tpu")


def test_a_kernel_for_gpus_says_so_elsewhere():
    with pytest.raises(NotImplementedError, match="mosaic_gpu is for Hopper GPUs .*; the device is cpu"):
        grouped_matmul(X, W, SIZES, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="triton is for GPUs; the platform is cpu"):
        grouped_matmul(X, W, SIZES, implementation="triton")


def test_what_tritons_interpreter_needs_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match="Triton's interpreter needs triton: pip install 'dynamoe.parity.'"):
        grouped_matmul(X, W, SIZES, implementation="triton")


X, W, SIZES = jnp.zeros((6, 4)), jnp.zeros((3, 4, 5)), jnp.array([1, 2, 3])


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("x", "w", "sizes", "message"),
    [
        (X[0], W, SIZES, r"x has shape \(4,\); it must be \[M, D\]"),
        (X, W[0], SIZES, r"w has shape \(4, 5\); it must be \[E, D, F\]"),
        (X, W, SIZES[None], r"group_sizes has shape \(1, 3\); it must be \[E\]"),
        (X[:, 1:], W, SIZES, r"x has shape \(6, 3\) and w \(3, 4, 5\); D, x's second axis and w's, must be one number"),
        (X, W, SIZES[1:], r"group_sizes has length 2; w has 3 groups: it must be as long"),
        (X, W, jnp.array([1.0, 2.0, 3.0]), "group_sizes has dtype float32; it must be of integers"),
        (X.astype(jnp.int16), W, SIZES, "x has dtype int16; allowed are float32, bfloat16, float16"),
        (X, W.astype(jnp.bfloat16), SIZES, "w has dtype bfloat16 and x float32; they must be of one dtype"),
        (X, W, jnp.array([1, -2, 3]), r"group_sizes\[1\] is -2; a group has 0 rows or more"),
        (X, W, jnp.array([3, 2, 2]), "group_sizes sum to 7; x has 6 rows: they must sum to at most that"),
    ],
)
def test_arguments_that_do_not_fit_are_named(unchecked, x, w, sizes, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, w, sizes)


def test_an_unknown_implementation_is_named():
    with pytest.raises(
        ValueError,
        match="implementation is 'fast'; allowed are None, 'native', 'blocked', 'xla', 'mosaic_tpu', 'mosaic_gpu', "
        "'triton', 'reference'",
    ):
        grouped_matmul(X, W, SIZES, implementation="fast")


@pytest.mark.parametrize(("rows", "groups"), [(129, 1), (4096, 8), (4096, 64), (4096, 1024), (10**6, 2), (20, 3)])
@pytest.mark.parametrize("matrix", [1, 96 * 32, 512 * 1024])
def test_blocks_fit_the_rows_and_descend(rows, groups, matrix):
    sizes = block_sizes(rows, groups, matrix)
    assert sorted(set(sizes), reverse=True) == list(sizes)
    assert 1 <= len(sizes) <= 10 and max(sizes) <= rows


def test_the_tests_reach_both_ways_and_several_block_sizes():
    assert FEW <= FEW_ROWS < MANY
    assert block_sizes(MANY, GROUPS, INNER * WIDTH) == (128, 96, 64)


def test_scaled_sizes_give_what_rounding_leaves_to_the_largest_remainders():
    # shares of 10 rows by 1 : 2 : 4 are 1.43, 2.86 and 5.71; two rows are left
    np.testing.assert_array_equal(scaled_sizes([1, 2, 4], 10), [1, 3, 6])


def test_a_data_folder_without_the_counts_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("DYNAMOE_DATA", raising=False)
    assert routed_counts() == {}
    monkeypatch.setenv("DYNAMOE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="DYNAMOE_DATA is .*; it has no moe_routing/olmoe_mixtral_routing.npz"):
        routed_counts()
