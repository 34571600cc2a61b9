"""Experts: the batched form by hand, and the sorted form against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.moe import GELU, SwiGLU
from dynamoe.moe.experts import expert_matmul

E, C, D, F = 4, 3, 8, 16


@pytest.fixture(scope="module")
def experts():
    return SwiGLU(hidden=F).build(experts=E, width=D, key=jax.random.key(1))


def test_swiglu_by_hand():
    experts = SwiGLU(hidden=1).build(experts=2, width=1, key=jax.random.key(0))
    experts.gate[...] = jnp.array([1.0, 2.0]).reshape(2, 1, 1)
    experts.up[...] = jnp.array([3.0, 5.0]).reshape(2, 1, 1)
    experts.down[...] = jnp.array([7.0, -1.0]).reshape(2, 1, 1)
    # silu(z) = z / (1 + e^-z). Expert 0 on x = 1: 7 * silu(1) * 3 = 21 * 0.7310586 = 15.352230.
    # Expert 1 on x = -1: -1 * silu(-2) * -5 = 5 * (-2 * 0.1192029) = -1.192029.
    rows = jnp.array([1.0, -1.0]).reshape(2, 1, 1)
    np.testing.assert_allclose(experts(rows, None).ravel(), [15.352230, -1.192029], rtol=1e-5)


def test_gelu_by_hand():
    experts = GELU(hidden=1).build(experts=2, width=1, key=jax.random.key(0))
    experts.up[...] = jnp.array([1.0, 2.0]).reshape(2, 1, 1)
    experts.down[...] = jnp.array([3.0, -1.0]).reshape(2, 1, 1)
    # gelu(z) = z * Phi(z). Expert 0 on 1: 3 * 0.8413447 = 2.524034. Expert 1 on -1: -1 * (-2 * 0.0227501) = 0.0455003.
    rows = jnp.array([1.0, -1.0]).reshape(2, 1, 1)
    np.testing.assert_allclose(experts(rows, None).ravel(), [2.524034, 0.0455003], rtol=1e-5)


def test_every_expert_runs_on_its_own_rows(experts, key):
    rows = jax.random.normal(key, (E, C, D))
    gate, up, down = (np.asarray(w[...], np.float64) for w in (experts.gate, experts.up, experts.down))
    batches = np.asarray(rows, np.float64)
    for expert in range(E):
        inner = batches[expert] @ gate[expert]
        expected = (inner / (1 + np.exp(-inner)) * (batches[expert] @ up[expert])) @ down[expert]
        np.testing.assert_allclose(experts(rows, None)[expert], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [SwiGLU(hidden=F), GELU(hidden=F)], ids=["SwiGLU", "GELU"])
def test_sorted_rows_equal_equal_batches_in_value_and_gradient(config, key):
    experts = config.build(experts=E, width=D, key=jax.random.key(1))
    rows = jax.random.normal(key, (E, C, D))
    graph, state = nnx.split(experts)

    def loss(state, rows, group_sizes):
        return jnp.square(nnx.merge(graph, state)(rows, group_sizes)).sum()

    sizes = jnp.full(E, C, jnp.int32)
    in_batches, in_order = experts(rows, None), experts(rows.reshape(-1, D), sizes).reshape(rows.shape)
    np.testing.assert_allclose(in_order, in_batches, rtol=1e-4, atol=1e-6)
    batched, sorted_ = jax.grad(loss)(state, rows, None), jax.grad(loss)(state, rows.reshape(-1, D), sizes)
    for one, other in zip(jax.tree.leaves(batched), jax.tree.leaves(sorted_), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_one_shared_batch_equals_a_copy_of_it_for_each_expert(experts, key):
    rows = jax.random.normal(key, (1, C, D))
    graph, state = nnx.split(experts)

    @jax.jit
    def value_and_gradients(state, rows):
        def loss(state, rows):
            y = nnx.merge(graph, state)(rows, None)
            return jnp.square(y).sum(), y

        return jax.grad(loss, has_aux=True)(state, rows)

    (shared, y), (copied, expected) = value_and_gradients(state, rows), value_and_gradients(state, rows.repeat(E, 0))
    assert y.shape == (E, C, D)
    for one, other in zip(jax.tree.leaves((shared, y)), jax.tree.leaves((copied, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [[2, 0, 3, 1], [0, 0, 0, 0], [0, 6, 0, 0], [1, 1, 1, 1]])
def test_uneven_groups_equal_a_loop_and_rows_past_them_are_zero(key, sizes):
    rows, weight = jax.random.normal(key, (6, D)), jax.random.normal(jax.random.fold_in(key, 1), (E, D, F))
    owner = np.repeat(np.arange(E), sizes)
    expected = np.zeros((6, F))
    for row, expert in enumerate(owner):
        expected[row] = np.asarray(rows[row], np.float64) @ np.asarray(weight[expert], np.float64)
    np.testing.assert_allclose(expert_matmul(rows, weight, jnp.array(sizes)), expected, rtol=1e-4, atol=1e-5)


def test_weights_carry_logical_axes_and_stay_float32_for_bfloat16_rows(experts):
    axes = {path[0]: variable.get_metadata()["axes"] for path, variable in nnx.to_flat_state(nnx.state(experts))}
    inward, outward = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    assert axes == {"gate": inward, "up": inward, "down": outward}
    assert experts(jnp.ones((E, C, D), jnp.bfloat16), None).dtype == jnp.bfloat16
    assert experts.gate[...].dtype == jnp.float32


def test_one_expert_alone_is_not_split_over_devices():
    alone = GELU(hidden=F).build(experts=1, width=D, key=jax.random.key(1))
    assert alone.up.get_metadata()["axes"] == (None, "embed", "mlp")


def test_each_expert_starts_with_numbers_of_its_own_and_variance_one_over_fan_in():
    gate = np.asarray(SwiGLU(hidden=64).build(experts=2, width=64, key=jax.random.key(1)).gate[...])
    assert np.abs(gate[0] - gate[1]).max() > 0.1
    # 8192 draws: the standard error of their variance is 1.6% of it.
    np.testing.assert_allclose(gate.var() * 64, 1.0, atol=0.1)


@pytest.mark.parametrize("config", [SwiGLU, GELU])
def test_hidden_width_below_one_is_refused(config):
    with pytest.raises(ValueError, match=rf"{config.__name__}\.hidden is 0; it must be at least 1"):
        config(hidden=0)


def test_rows_that_are_no_batch_for_each_expert_are_refused(experts):
    with pytest.raises(
        ValueError, match=rf"rows have shape \(2, {C}, {D}\) .* they must be \[{E}, C, {D}\], or \[1, C"
    ):
        experts(jnp.ones((2, C, D)), None)


def test_an_implementation_that_does_not_exist_is_refused_by_name(key):
    experts = SwiGLU(hidden=F, implementation="fastest").build(experts=E, width=D, key=key)
    with pytest.raises(ValueError, match="implementation is 'fastest'"):
        experts(jnp.ones((6, D)), jnp.array([2, 2, 1, 1]))
