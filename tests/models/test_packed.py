"""Linear maps with packed kernels do what they would with the numbers that these stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.kernels.quantized import INT4, dequantize, quantize
from dynamoe.models.linear import linear, look_up
from dynamoe.models.packed import PackedKernel, PackedTable


@pytest.mark.parametrize(
    ("shape", "into", "out", "einsum"),
    [
        ((2, 3, 8), (8,), (5,), "bsd,df->bsf"),
        ((8,), (8,), (5,), "d,df->f"),
        ((2, 3, 8), (8,), (4, 2), "bsd,dhp->bshp"),
        ((2, 3, 4, 2), (4, 2), (8,), "bshp,hpd->bsd"),  # a group of 4 rows is two heads
    ],
)
def test_a_packed_kernel_equals_the_einsum_of_its_numbers(shape, into, out, einsum, key):
    x, weight = jax.random.normal(key, shape), jax.random.normal(key, (*into, *out))
    matrix = quantize(weight.reshape(8, -1), INT4, group_size=4)
    y = jax.jit(lambda x: linear(x, PackedKernel(matrix, into, out), inputs=len(into)))(x)
    numbers = np.asarray(dequantize(matrix), np.float64).reshape(weight.shape)
    np.testing.assert_allclose(y, np.einsum(einsum, np.asarray(x, np.float64), numbers), rtol=1e-4, atol=1e-5)


def test_a_packed_head_gives_float32_for_bfloat16_activations(key):
    kernel = PackedKernel(quantize(jax.random.normal(key, (8, 6)), INT4, group_size=4), (8,), (6,))
    x = jax.random.normal(key, (3, 8), jnp.bfloat16)
    y = linear(x, kernel, dtype=jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(kernel.matrix), np.float64)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert linear(x, kernel).dtype == jnp.bfloat16


def test_gradients_pass_a_packed_kernel_to_the_activations_alone(key):
    kernel = PackedKernel(quantize(jax.random.normal(key, (8, 6)), INT4, group_size=4), (8,), (6,))
    gradient = jax.grad(lambda x: linear(x, kernel).sum())(jnp.ones((2, 8)))
    np.testing.assert_allclose(gradient[0], dequantize(kernel.matrix).sum(axis=1), rtol=1e-5, atol=1e-5)


def test_a_packed_table_gives_its_rows_and_nan_outside(key):
    matrix = quantize(jax.random.normal(key, (8, 6)), INT4, group_size=4)
    rows = look_up(PackedTable(matrix), jnp.array([[0, 5], [6, -1]]))
    np.testing.assert_array_equal(rows[0], dequantize(matrix).T[jnp.array([0, 5])])
    assert np.isnan(rows[1]).all() and rows.shape == (2, 2, 8)
    np.testing.assert_allclose(linear(jnp.eye(8), PackedTable(matrix).T), dequantize(matrix), rtol=1e-6)


def test_a_kernel_that_sums_over_other_axes_is_refused(key):
    kernel = PackedKernel(quantize(jax.random.normal(key, (8, 6)), INT4), (4, 2), (6,))
    with pytest.raises(ValueError, match=r"its last 1 axes are summed; the kernel sums over \(4, 2\)"):
        linear(jnp.ones((3, 8)), kernel)
