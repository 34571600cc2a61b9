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

SIZES = np.array([9, 1, 700, 0, 8, 30, 3], np.int32)
"""A few rows that go without panels, one row more than those, and a group of more rows than a task."""
ROWS, GROUPS, INNER, WIDTH = SIZES.sum() + 5, len(SIZES), 530, 541
"""Deeper and wider than a panel, and a multiple of nothing."""


def operands(dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w and dy; what is nobody's is NaN."""
    random = np.random.default_rng(0)
    x, w, dy = (
        random.standard_normal(shape, np.float32) for shape in ((ROWS, INNER), (GROUPS, INNER, WIDTH), (ROWS, WIDTH))
    )
    x[SIZES.sum() :] = dy[SIZES.sum() :] = np.nan
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(dy, dtype)


@jax.jit
def run(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
    """y, dx and dw."""
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="native"), x, w)
    return y, *back(dy)


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
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3"])
def test_on_cpus_of_narrower_vectors_it_is_the_same(cpu, monkeypatch, tmp_path):
    quick = {"-march=native": f"-march={cpu}", "-O3": "-O1"}
    options = tuple(quick.get(option, option) for option in native_code._options())
    monkeypatch.setattr(native_code, "_options", lambda: options)
    monkeypatch.setenv(native_code.CACHE, str(tmp_path))
    monkeypatch.setattr(native, "PREFIX", f"dynamoe_{cpu}_")
    assert native._defect.__wrapped__(None) is None
    x, w, dy = operands()
    found = jax.jit(run.__wrapped__)(x, w, dy, jnp.asarray(SIZES))
    assert_close(found, in_float64(x, w, dy), 2e-6)


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
