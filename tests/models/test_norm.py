"""RMSNorm by hand and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.models.norm import RMSNorm


def test_rms_norm_by_hand():
    norm = RMSNorm(2, epsilon=0.5)
    norm.scale[...] = jnp.array([1.0, 10.0])
    # Mean square of (1, 7): 25. With epsilon 0.5: sqrt(25.5) = 5.0497525. Scaled by (1, 10).
    np.testing.assert_allclose(norm(jnp.array([[1.0, 7.0]])), [[0.19802951, 13.862065]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 4, 16)])
def test_rms_norm_equals_float64(shape, reference, randomize, key):
    norm, x = randomize(RMSNorm(16, epsilon=1e-5)), 3 * jax.random.normal(key, shape)
    expected = reference.rms_norm(np.asarray(x, np.float64), np.asarray(norm.scale[...], np.float64), 1e-5)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5)


def test_bfloat16_is_normalised_in_float32(key):
    norm, x = RMSNorm(16, epsilon=1e-5), jax.random.normal(key, (4, 16)).astype(jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_zero_stays_zero_with_a_finite_gradient():
    graph, state = nnx.split(RMSNorm(8, epsilon=1e-5))
    loss = jax.jit(jax.value_and_grad(lambda x: nnx.merge(graph, state)(x).sum()))
    value, gradient = loss(jnp.zeros((1, 8)))
    assert value == 0 and np.isfinite(gradient).all()


def test_scale_carries_the_logical_axis_of_the_width():
    assert RMSNorm(8, epsilon=1e-5).scale.get_metadata()["axes"] == ("embed",)
    assert RMSNorm(8, epsilon=1e-5, axis=None).scale.get_metadata()["axes"] == (None,)
