"""Buckets: every size against the same function on the rows alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.dynamic import Buckets, run_in_buckets

X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def test_sizes_are_powers_of_two_and_large_batches_are_cut():
    buckets = Buckets(smallest=4, largest=16)
    assert [buckets.size(rows) for rows in (1, 4, 5, 8, 9, 16)] == [4, 4, 8, 8, 16, 16]
    assert buckets.sizes(39) == [16, 16, 8]
    assert buckets.sizes(32) == [16, 16]
    assert buckets.sizes(0) == []


def test_every_bucket_equals_the_function_on_the_rows_alone_and_compiles_once():
    compiled = []

    @jax.jit
    def function(given):
        compiled.append(len(given["x"]))
        return given["x"].sum(axis=1), {"row": given["row"] * 2}

    buckets, rng = Buckets(smallest=2, largest=16), np.random.default_rng(1)
    for count in (1, 2, 3, 4, 7, 8, 9, 16, 17, 37, 7, 3):
        rows = rng.permutation(40)[:count]
        for inputs in ({"x": X, "row": np.arange(40)}, {"x": jnp.asarray(X), "row": jnp.arange(40)}):
            (total, twice), sizes = run_in_buckets(function, inputs, rows, buckets)
            np.testing.assert_allclose(np.asarray(total)[:count], X[rows].sum(axis=1), rtol=1e-5)
            np.testing.assert_array_equal(np.asarray(twice["row"])[:count], rows * 2)
            assert sum(sizes) == len(total) >= count
    assert set(compiled) == {2, 4, 8, 16}


def test_padding_repeats_a_real_row():
    (seen,), _ = run_in_buckets(lambda given: (given,), X, np.array([5, 7, 9]), Buckets(smallest=8))
    np.testing.assert_array_equal(seen, X[[5, 7, 9, 5, 5, 5, 5, 5]])


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="Buckets.smallest is 3; it must be a power of two"):
        Buckets(smallest=3)
    with pytest.raises(ValueError, match="Buckets.smallest is 8; it must be at most"):
        Buckets(smallest=8, largest=4)
    with pytest.raises(ValueError, match="rows is empty"):
        run_in_buckets(lambda x: x, X, np.array([], int), Buckets())
    with pytest.raises(ValueError, match="rows is 17; a bucket holds 1 to"):
        Buckets(largest=16).size(17)
