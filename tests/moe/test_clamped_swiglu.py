"""gpt-oss's experts by hand, sorted rows against batches, and biases on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.models import Layout, MeshShape
from dynamoe.moe import ClampedSwiGLU, MoE, RoutingContext, TopK
from dynamoe.moe.experts import expert_bias


def test_clamped_swiglu_by_hand():
    experts = ClampedSwiGLU(hidden=1, alpha=2.0, limit=3.0).build(experts=2, width=1, key=jax.random.key(0))
    for weight, values in ((experts.gate, [1.0, 9.0]), (experts.up, [0.5, -9.0]), (experts.down, [2.0, 1.0])):
        weight[...] = jnp.array(values).reshape(2, 1, 1)
    for bias, values in (
        (experts.gate_bias, [1.0, 0.0]),
        (experts.up_bias, [0.25, 0.0]),
        (experts.down_bias, [5.0, 7.0]),
    ):
        bias[...] = jnp.array(values).reshape(2, 1)
    # Expert 0 on 1: g = 2, u = 0.75; 2 * (1.75 * 2 * sigmoid(4)) + 5 = 7 * 0.98201379 + 5 = 11.874097.
    # Expert 1 on 1: g = min(9, 3) = 3, u = max(-9, -3) = -3; -2 * 3 * sigmoid(6) + 7 = 7 - 6 * 0.99752738 = 1.0148357.
    rows = jnp.ones((2, 1, 1))
    np.testing.assert_allclose(experts(rows, None).ravel(), [11.874097, 1.0148357], rtol=1e-5)
    np.testing.assert_allclose(
        experts(rows[0].repeat(2, 0), jnp.array([1, 1])).ravel(), [11.874097, 1.0148357], rtol=1e-5
    )


def test_rows_of_nobody_get_no_bias():
    bias = jnp.array([[1.0], [2.0], [4.0]])
    found = expert_bias(jnp.zeros((5, 1)), bias, jnp.array([1, 0, 2]))
    np.testing.assert_array_equal(found.ravel(), [1, 4, 4, 0, 0])


def layer_on_a_mesh():
    """Runs in a process with two devices: the hidden width is split, and biases must not count twice."""
    config = MoE(experts=3, router=TopK(k=2, gate_bias=True), expert=ClampedSwiGLU(hidden=8), losses=())
    layer = config.build(width=4, key=jax.random.key(0))
    layer.experts.down_bias[...] = jax.random.normal(jax.random.key(1), (3, 4))
    x = jax.random.normal(jax.random.key(2), (2, 6, 4))
    layout = Layout(MeshShape(data=1, tensor=2).build())
    y, _ = layer(x)
    on_mesh, _ = jax.jit(lambda x: layer(x, RoutingContext(placement=layout)))(x)
    np.testing.assert_allclose(on_mesh, y, rtol=1e-5, atol=1e-6)


def test_biases_are_added_once_where_a_mesh_splits_the_hidden_width(run_with_devices):
    run_with_devices(2, layer_on_a_mesh)


def test_the_gates_bias_chooses_experts(key):
    layer = MoE(experts=4, router=TopK(k=2, gate_bias=True)).build(width=4, key=key)
    layer.router.gate.bias[...] = jnp.array([0.0, 50.0, 0.0, 50.0])
    _, stats = layer(jax.random.normal(key, (8, 4)))
    np.testing.assert_allclose(stats.load, [0, 0.5, 0, 0.5])


@pytest.mark.parametrize("field", ["alpha", "limit"])
def test_a_bad_config_is_refused(field):
    with pytest.raises(ValueError, match=rf"ClampedSwiGLU\.{field} is 0\.0; it must be positive and finite"):
        ClampedSwiGLU(**{field: 0.0})
