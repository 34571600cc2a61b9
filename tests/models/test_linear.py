"""The flattened matrix product against the einsum that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.models.linear import FEW, linear


@pytest.mark.parametrize(
    ("shape", "kernel", "inputs", "einsum"),
    [
        ((2, 3, 8), (8, 5), 1, "bsd,df->bsf"),
        ((8,), (8, 5), 1, "d,df->f"),
        ((2, 3, 8), (8, 4, 2), 1, "bsd,dhp->bshp"),
        ((2, 3, 4, 2), (4, 2, 8), 2, "bshp,hpd->bsd"),
    ],
)
def test_linear_equals_einsum(shape, kernel, inputs, einsum):
    draw = np.random.default_rng(0)
    x, weight = draw.normal(size=shape), draw.normal(size=kernel)
    y = linear(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), inputs=inputs)
    np.testing.assert_allclose(y, np.einsum(einsum, x, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [2, 3, 8])
def test_few_rows_and_their_gradients_are_those_of_any_product(rows, dtype):
    assert rows in FEW
    draw = np.random.default_rng(rows)
    x, weight, dy = (jnp.asarray(draw.normal(size=shape), dtype) for shape in ((rows, 70), (70, 37), (rows, 37)))
    y, back = jax.vjp(jax.jit(linear), x, weight)
    found = (y, *back(dy))
    x, weight, dy = (np.asarray(array, np.float64) for array in (x, weight, dy))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for array, expected in zip(found, (x @ weight, dy @ weight.T, x.T @ dy), strict=True):
        np.testing.assert_allclose(array.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance * 8)


def test_few_rows_go_the_plain_way_where_the_native_one_is_out_of_order(monkeypatch):
    def refuse(*arguments, **options):
        raise NotImplementedError("no compiler")

    monkeypatch.setattr("dynamoe.models.linear.grouped_matmul", refuse)
    x, weight = jnp.arange(6.0).reshape(2, 3), jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(linear(x, weight), np.asarray(x) @ np.asarray(weight))


def test_linear_computes_in_the_dtype_of_the_activations():
    assert jax.eval_shape(linear, jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 3))).dtype == jnp.bfloat16
