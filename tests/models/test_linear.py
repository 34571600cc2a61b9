"""The flattened matrix product against the einsum that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.models.linear import linear


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


def test_linear_computes_in_the_dtype_of_the_activations():
    assert jax.eval_shape(linear, jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 3))).dtype == jnp.bfloat16
