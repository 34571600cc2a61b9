"""Scores, sinks and dtypes of attention, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from dynamoe.models.dot_product import dot_product_attention


def test_a_sink_takes_its_share_and_adds_nothing():
    # One query, two keys, width 1. Head 0: scores 2 * (1, 3) = (2, 6) and a sink of 6: weights e^-4, 1 over e^-4 + 2.
    # Head 1, of the same key head: query 0, scores (0, 0) and a sink of -inf, which is none: the mean of the values.
    query, keys = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1), jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    values, mask = jnp.array([[10.0, 0.0], [20.0, 1.0]]).reshape(1, 2, 1, 2), jnp.ones((1, 1, 2), bool)
    found = dot_product_attention(query, keys, values, mask, scale=2.0, sinks=jnp.array([6.0, -jnp.inf]))
    low = np.exp(-4.0)
    expected = [[(10 * low + 20) / (low + 2), 1 / (low + 2)], [15.0, 0.5]]
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-6)


def test_a_query_that_sees_nothing_stays_finite():
    ones = jnp.ones((1, 2, 1, 4))
    found = dot_product_attention(ones, ones, ones, jnp.zeros((1, 2, 2), bool), scale=1.0)
    np.testing.assert_array_equal(found, ones)


def test_float32_equals_jax_own_attention(key):
    query, keys, values = (
        jax.random.normal(jax.random.fold_in(key, n), (2, 5, heads, 8)) for n, heads in enumerate((6, 2, 2))
    )
    mask = jax.random.bernoulli(key, 0.7, (2, 5, 5)).at[:, :, 0].set(True)
    found = dot_product_attention(query, keys, values, mask, scale=8**-0.5)
    expected = jax.nn.dot_product_attention(query, keys, values, mask=mask[:, None])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
