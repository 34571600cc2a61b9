"""`native`, the grouped matmul in C++: what its panels cut, other CPUs, threads, and machines without a compiler."""

import os
import platform
import stat
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.kernels import grouped_matmul, native_code
from dynamoe.kernels.grouped_matmul import api, native
from dynamoe.kernels.quantized import INT4, INT8, Quantized, QuantizedRows, dequantize, quantize, quantize_rows

SIZES = np.array([9, 1, 700, 0, 8, 30, 3], np.int32)
"""A few rows that go without panels, one row more than those, and a group of more rows than a task."""
ROWS, GROUPS, INNER, WIDTH = SIZES.sum() + 5, len(SIZES), 1031, 541
"""Deeper and wider than a panel of either dtype, and a multiple of nothing."""


def operands(dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w and dy; what is nobody's is NaN."""
    random = np.random.default_rng(0)
    x, w, dy = (
        random.standard_normal(shape, np.float32) for shape in ((ROWS, INNER), (GROUPS, INNER, WIDTH), (ROWS, WIDTH))
    )
    x[SIZES.sum() :] = dy[SIZES.sum() :] = np.nan
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(dy, dtype)


def passes(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
    """y, dx and dw."""
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="native"), x, w)
    return y, *back(dy)


run = jax.jit(passes)


def in_float64(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[np.ndarray, ...]:
    x64, w64, dy64 = (np.asarray(array, np.float64) for array in (x, w, dy))
    y, dx, dw = np.zeros_like(dy64), np.zeros_like(x64), np.zeros_like(w64)
    end = 0
    for group, size in enumerate(SIZES):
        mine = slice(end, end := end + size)
        y[mine], dx[mine], dw[group] = x64[mine] @ w64[group], dy64[mine] @ w64[group].T, x64[mine].T @ dy64[mine]
    return y, dx, dw


def assert_close(found, expected, error: float) -> None:
    for name, array, oracle in zip(("y", "dx", "dw"), found, expected, strict=True):
        difference = np.abs(np.asarray(array, np.float64) - oracle).max()
        assert difference <= error * np.abs(oracle).max(), name


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 2e-6), (jnp.bfloat16, 4e-3)])
def test_products_of_many_panels_are_those_of_float64(dtype, error):
    x, w, dy = operands(dtype)
    found = run(x, w, dy, jnp.asarray(SIZES))
    assert [array.dtype for array in found] == [dtype] * 3
    assert_close(found, in_float64(x, w, dy), error)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for other x86 CPUs")
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_on_cpus_of_fewer_instructions_it_is_the_same(cpu, monkeypatch, tmp_path):
    if cpu == "x86-64-v4" and "avx512dq" not in native_code._cpu():
        pytest.skip("this CPU has no AVX-512")
    quick = {"-march=native": f"-march={cpu}", "-O3": "-O1"}
    options = tuple(quick.get(option, option) for option in native_code._options())
    monkeypatch.setattr(native_code, "_options", lambda: options)
    monkeypatch.setenv(native_code.CACHE, str(tmp_path))
    monkeypatch.setattr(native, "PREFIX", f"dynamoe_{cpu}_")
    assert native._defect.__wrapped__(None) is None
    for dtype, error in ((jnp.float32, 2e-6), (jnp.bfloat16, 4e-3)):
        x, w, dy = operands(dtype)
        # Another function for JAX: what it traced for `run` calls this CPU's own library.
        found = jax.jit(lambda *arrays: passes(*arrays))(x, w, dy, jnp.asarray(SIZES))
        assert_close(found, in_float64(x, w, dy), error)
    if cpu == "x86-64-v3":  # one without AVX512-VNNI, which is no defect to warn of
        assert "need a CPU with AVX512-VNNI" in native._defect.__wrapped__(None, True)


def test_in_bfloat16_an_infinity_in_the_last_row_of_an_odd_depth_stays_one():
    # Its pair has no second row: zero times what stands for that must not be zero times infinity.
    x, w = jnp.ones((12, 3), jnp.bfloat16), jnp.zeros((2, 3, 5), jnp.bfloat16).at[:, 2].set(jnp.inf)
    y = grouped_matmul(x, w, jnp.array([2, 10]), implementation="native")
    np.testing.assert_array_equal(y, np.full((12, 5), np.inf, np.float32))


@pytest.mark.parametrize(("format", "zero_points"), [(INT8, True), (INT4, False)], ids=["int8", "int4"])
def test_a_few_rows_of_packed_matrices_wider_than_vectors_are_right(format, zero_points):
    # Whole vectors and a rest of columns, whole steps and a rest of rows, scales of a step and of a part of one.
    sizes, random = np.array([1, 2, 0, 5, 8]), np.random.default_rng(0)
    x, w = random.standard_normal((17, 72), np.float32), random.standard_normal((5, 72, 77), np.float32)
    x[16] = np.nan
    for group_size in (72, 24):
        packed = quantize(jnp.asarray(w), format, group_size=group_size, zero_points=zero_points)
        y = grouped_matmul(jnp.asarray(x), packed, jnp.asarray(sizes), implementation="native")
        matrices = np.asarray(dequantize(packed), np.float64)
        expected = np.stack([x[i] @ matrices[e] for i, e in enumerate(np.repeat(np.arange(5), sizes))])
        np.testing.assert_allclose(y[:16], expected, atol=2e-6 * np.abs(expected).max())
        np.testing.assert_array_equal(y[16], 0)


def multiply_codes(x: np.ndarray, w: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product, with random scales and NaN as those of nobody's rows; and what it must be, bit by bit."""
    random = np.random.default_rng(1)
    x_scales = random.uniform(0.5, 2, (len(x), 1)).astype(np.float32)
    w_scales = random.uniform(0.5, 2, (len(w), 1, w.shape[2])).astype(np.float32)
    expected, end = np.zeros((len(x), w.shape[2]), np.float32), 0
    for group, size in enumerate(sizes):
        mine = slice(end, end := end + size)
        sums = x[mine].astype(np.int64) @ w[group].astype(np.int64)
        expected[mine] = sums.astype(np.float32) * x_scales[mine] * w_scales[group]
    x_scales[end:] = np.nan
    packed = Quantized(
        codes=jnp.asarray(w),
        scales=jnp.asarray(w_scales),
        zero_points=None,
        format=INT8,
        group_size=w.shape[1],
        dtype=jnp.dtype(jnp.float32),
    )
    rows = QuantizedRows(jnp.asarray(x), jnp.asarray(x_scales))
    try:
        y = grouped_matmul(rows, packed, jnp.asarray(sizes), implementation="native")
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    assert y.dtype == jnp.float32
    return np.asarray(y), expected


@pytest.mark.parametrize("inner", [1, 2, 3, 64, 101, 2051])
@pytest.mark.parametrize("width", [1, 77, 541])
def test_integers_are_exact_whatever_the_panels_cut(inner, width):
    sizes, random = np.array([9, 1, 0, 30, 8, 3]), np.random.default_rng(0)
    x = random.integers(-128, 128, (sizes.sum() + 4, inner), np.int8)
    w = random.integers(-128, 128, (len(sizes), inner, width), np.int8)
    np.testing.assert_array_equal(*multiply_codes(x, w, sizes))


@pytest.mark.parametrize("largest", [-128, 127])
def test_sums_of_the_largest_integers_are_exact_as_far_as_int32_goes(largest):
    # 128 * 128 * 131,071 = 2^31 - 2^14. On the way there sums pass the ends of int32, and come back.
    x, w = (np.full(shape, largest, np.int8) for shape in ((12, 131_071), (2, 131_071, 17)))
    np.testing.assert_array_equal(*multiply_codes(x, w, np.array([2, 9])))


def test_packed_rows_have_no_gradient():
    def loss(x):
        w = quantize(jnp.ones((2, 8, 3)), INT8)
        return grouped_matmul(quantize_rows(x), w, jnp.array([1, 2])).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(jnp.ones((4, 8))), 0)


def test_computations_at_once_do_not_disturb_one_another_and_give_the_same_bits():
    x, w, dy = operands()
    expected = [np.asarray(array) for array in run(x, w, dy, jnp.asarray(SIZES))]
    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(run, x, w, dy, jnp.asarray(SIZES)) for _ in range(12)]
        for future in found:
            for array, bits in zip(future.result(timeout=60), expected, strict=True):
                np.testing.assert_array_equal(array, bits)


def save_from_one_core(file: str) -> None:
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    np.savez(file, *run(*operands(), jnp.asarray(SIZES)))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to one core")
def test_results_do_not_depend_on_the_number_of_threads(run_with_devices, tmp_path):
    file = tmp_path / "found.npz"
    run_with_devices(1, save_from_one_core, str(file))
    with np.load(file) as found:
        for array, bits in zip(run(*operands(), jnp.asarray(SIZES)), found.values(), strict=True):
            np.testing.assert_array_equal(array, bits)


@pytest.fixture
def first_use(monkeypatch, tmp_path) -> Iterator[Path]:
    """As in a process that has not called it yet, with an empty cache; and so afterwards too."""
    monkeypatch.setenv(native_code.CACHE, str(tmp_path / "cache"))
    native._defect.cache_clear()
    yield tmp_path
    native._defect.cache_clear()


def test_without_a_compiler_the_default_is_another_and_says_so_once(first_use, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    x, w, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([1, 3])
    with pytest.warns(
        UserWarning, match="there is no C.. compiler: none of no-such-compiler is on PATH. On CPU the slower"
    ):
        y = grouped_matmul(x, w, sizes)
    np.testing.assert_array_equal(y, grouped_matmul(x, w, sizes, implementation="blocked"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grouped_matmul(x, w, sizes)
        with pytest.raises(NotImplementedError, match="there is no C.. compiler"):
            grouped_matmul(x, w, sizes, implementation="native")


def test_what_a_failing_compiler_says_is_repeated_and_nothing_is_left_behind(first_use, monkeypatch):
    compiler = first_use / "compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho cannot compile >&2\nexit 3\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(OSError, match=r"compiler failed \(3\): cannot compile"):
        native_code.compiled_library(native.PLAIN)
    assert list((first_use / "cache").iterdir()) == []


def test_wrong_products_are_found_out_at_first_use(first_use, monkeypatch):
    monkeypatch.delenv(native_code.CACHE)  # compiled before
    monkeypatch.setattr(native, "PREFIX", "dynamoe_wrong_")
    right = native._rows_times_matrices

    def wrong(*arguments, transposed: bool):
        return right(*arguments, transposed=transposed) + float(transposed)

    monkeypatch.setattr(native, "_rows_times_matrices", wrong)
    with pytest.warns(UserWarning, match="dx of a small product is wrong"):
        assert native._defect(None) == "the C++ of grouped_matmul is out of order here: dx of a small product is wrong"


def test_native_is_the_default_on_cpu():
    assert api.PREFERRED["cpu"][0] == "native"
