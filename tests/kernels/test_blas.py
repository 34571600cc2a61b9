"""`blas`, the implementation whose products are a BLAS library's: what it refuses, and what must not happen in it."""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.kernels import cpu_ffi, grouped_matmul
from dynamoe.kernels.grouped_matmul import api, blas
from dynamoe.kernels.grouped_matmul.shapes import scaled_sizes

ROWS, GROUPS, INNER, WIDTH = 2000, 6, 64, 48
"""Enough work for several threads, and for several tiles of a group."""
SIZES = scaled_sizes([9, 0, 1, 3, 20, 2], ROWS)


def operands() -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    x, w = random.standard_normal((ROWS, INNER)), random.standard_normal((GROUPS, INNER, WIDTH))
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(SIZES)


@jax.jit
def value_and_gradients(x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="blas"), x, w)
    return y, *back(y)


@pytest.fixture
def untested() -> Iterator[None]:
    """As in a process that has not called it yet, and so afterwards too."""
    blas._defect.cache_clear()
    yield
    blas._defect.cache_clear()


def test_bfloat16_is_refused_by_name():
    x, w, sizes = operands()
    with pytest.raises(NotImplementedError, match="x has dtype bfloat16; allowed is float32"):
        grouped_matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), sizes, implementation="blas")


def test_without_its_library_the_default_is_another_and_says_so_once(untested, monkeypatch):
    def missing():
        raise ImportError("the package scipy-openblas32 is not installed")

    monkeypatch.setattr(blas, "_library", missing)
    monkeypatch.setitem(api.PREFERRED, "cpu", ("blas", "blocked"))
    x, w, sizes = operands()
    with pytest.warns(UserWarning, match="BLAS is out of order here: the package scipy-openblas32 is not installed"):
        y = grouped_matmul(x, w, sizes)
    np.testing.assert_array_equal(y, grouped_matmul(x, w, sizes, implementation="blocked"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grouped_matmul(x, w, sizes)
        with pytest.raises(NotImplementedError, match="is not installed"):
            grouped_matmul(x, w, sizes, implementation="blas")


def test_wrong_products_are_found_out_at_first_use(untested, monkeypatch):
    monkeypatch.setattr(blas, "_multiply", lambda tiles, a, b, c, **transposed: c.fill(1))
    with pytest.warns(UserWarning, match="y of a small product is wrong"):
        assert blas._defect() == "BLAS is out of order here: y of a small product is wrong"


@pytest.mark.parametrize(("define", "spoken"), [("MINOR 99", "0.99"), ("MAJOR 1", "none that can be read")])
def test_an_interface_that_was_not_tried_is_refused(monkeypatch, tmp_path, define, spoken):
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    name, number = define.split()
    copy = tmp_path / "xla/ffi/api/c_api.h"
    copy.parent.mkdir(parents=True)
    old = {"MINOR": f"MINOR {cpu_ffi.installed_version()}", "MAJOR": "MAJOR 0"}[name]
    copy.write_text(header.replace(f"XLA_FFI_API_{old}", f"XLA_FFI_API_{name} {number}"))
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    with pytest.raises(NotImplementedError, match=f"interface is {spoken}; tried were 0.3 and 0.5"):
        cpu_ffi.register("dynamoe_test_untried", lambda arguments, results: None)


@pytest.mark.smoke
def test_an_error_in_the_handler_is_an_exception_of_the_computation():
    def fail(arguments, results):
        raise KeyError("no such thing")

    cpu_ffi.register("dynamoe_test_fails", fail)
    call = jax.ffi.ffi_call("dynamoe_test_fails", jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="KeyError: 'no such thing'"):
        jax.jit(call)(jnp.zeros(3)).block_until_ready()


def test_a_dtype_without_a_view_is_an_exception_of_the_computation():
    cpu_ffi.register("dynamoe_test_takes_nothing", lambda arguments, results: None)
    call = jax.ffi.ffi_call("dynamoe_test_takes_nothing", jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a buffer has .* dtype 16"):
        jax.jit(call)(jnp.zeros(3, jnp.bfloat16)).block_until_ready()


def test_an_error_on_another_thread_is_an_exception_of_the_computation(monkeypatch):
    monkeypatch.setattr(blas, "_threads", lambda: 2)
    monkeypatch.setattr(blas, "WORTH_A_THREAD", 1.0)
    done = []

    def run(first: int, last: int) -> None:
        done.append((first, last))
        if len(done) == 3:
            raise OSError("out of order")

    with pytest.raises(OSError, match="out of order"):
        blas._spread(run, np.ones(20))


def test_every_tile_runs_once(monkeypatch):
    monkeypatch.setattr(blas, "WORTH_A_THREAD", 1.0)
    for threads in (1, 2, 5):
        monkeypatch.setattr(blas, "_threads", lambda threads=threads: threads)
        for costs in ([1.0], [1, 1, 100], [100, 1, 1], [0, 0, 5], np.ones(77)):
            ran = []
            blas._spread(lambda first, last, ran=ran: ran.extend(range(first, last)), np.asarray(costs, np.float64))
            assert sorted(ran) == list(range(len(costs)))


def test_computations_at_once_do_not_disturb_one_another_and_give_the_same_bits():
    x, w, sizes = operands()
    expected = [np.asarray(array) for array in value_and_gradients(x, w, sizes)]
    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(value_and_gradients, x, w, sizes) for _ in range(40)]
        for future in found:
            for array, bits in zip(future.result(timeout=60), expected, strict=True):
                np.testing.assert_array_equal(array, bits)


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    x, w, sizes = operands()
    expected = [np.asarray(array) for array in value_and_gradients(x, w, sizes)]
    monkeypatch.setattr(blas, "_threads", lambda: 1)
    for array, bits in zip(value_and_gradients(x, w, sizes), expected, strict=True):
        np.testing.assert_array_equal(array, bits)
