"""Dispatchers: what every one of them does, and that each agrees with a loop over assignments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import DenseDispatcher, Routing, SwiGLU

T, D, E = 5, 8, 3
DISPATCHERS = [DenseDispatcher()]
every_dispatcher = pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=str)

# Token 0 goes to experts 2 and 0, token 1 to 1, token 2 to nobody, token 3 to 0 and 1, token 4 to 2.
EXPERT = [[2, 0], [1, E], [E, E], [0, 1], [2, E]]
WEIGHT = [[0.5, 0.25], [2.0, 0.0], [0.0, 0.0], [1.0, -1.0], [0.75, 0.0]]


def routing(expert=EXPERT, weight=WEIGHT, token=None):
    flat = jnp.array(expert, jnp.int32).reshape(-1), jnp.array(weight, jnp.float32).reshape(-1)
    return Routing(*flat, token, jnp.zeros((T, E)), jnp.full((T, E), 1 / E))


@pytest.fixture
def x(key):
    return jax.random.normal(key, (T, D))


@pytest.fixture(scope="module")
def experts():
    return SwiGLU(hidden=4).build(experts=E, width=D, key=jax.random.key(1))


def through(dispatcher, x, routing, experts):
    plan = dispatcher.plan(routing)
    return dispatcher.combine(experts(dispatcher.dispatch(x, plan), plan.group_sizes), plan)


def loop(x, experts):
    """The definition: every token's sum over its assignments of weight * expert(token), in float64."""
    gate, up, down = (np.asarray(w[...], np.float64) for w in (experts.gate, experts.up, experts.down))
    y = np.zeros((T, D))
    for token in range(T):
        row = np.asarray(x[token], np.float64)
        for expert, weight in zip(EXPERT[token], WEIGHT[token], strict=True):
            if expert < E:
                inner = row @ gate[expert]
                y[token] += weight * ((inner / (1 + np.exp(-inner)) * (row @ up[expert])) @ down[expert])
    return y


@every_dispatcher
def test_output_is_the_weighted_sum_of_each_tokens_experts(dispatcher, x, experts):
    np.testing.assert_allclose(through(dispatcher, x, routing(), experts), loop(x, experts), rtol=1e-4, atol=1e-6)


@every_dispatcher
def test_a_token_without_an_expert_outputs_zero(dispatcher, x, experts):
    assert (through(dispatcher, x, routing(), experts)[2] == 0).all()


@every_dispatcher
def test_assignments_in_any_order_give_the_same_output(dispatcher, x, experts):
    order = np.array([7, 2, 0, 9, 4, 5, 1, 3, 8, 6])
    expert, weight = np.ravel(EXPERT)[order], np.ravel(WEIGHT)[order]
    shuffled = routing(expert, weight, token=jnp.array(order // 2))
    here, there = (through(dispatcher, x, r, experts) for r in (routing(), shuffled))
    np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-6)


@every_dispatcher
def test_jit_equals_eager_and_gradients_reach_weights_and_tokens(dispatcher, x, experts):
    def loss(x, weight):
        return jnp.square(through(dispatcher, x, routing()._replace(weight=weight), experts)).sum()

    weight = routing().weight
    np.testing.assert_allclose(jax.jit(loss)(x, weight), loss(x, weight), rtol=1e-5)
    to_x, to_weight = jax.grad(loss, (0, 1))(x, weight)
    reached = np.abs(to_x).max(axis=1) > 0
    np.testing.assert_array_equal(reached, [True, True, False, True, True])
    np.testing.assert_array_equal(np.abs(to_weight) > 0, np.ravel(EXPERT) < E)


@every_dispatcher
def test_the_dtype_of_the_activations_is_kept(dispatcher, x, experts):
    assert through(dispatcher, x.astype(jnp.bfloat16), routing(), experts).dtype == jnp.bfloat16


def test_dense_refuses_rows_that_are_not_one_batch_per_expert(x):
    dispatcher, plan = DenseDispatcher(), DenseDispatcher().plan(routing())
    with pytest.raises(ValueError, match=r"rows of the experts have shape \(1, 5, 8\); they must begin with \(3, 5\)"):
        dispatcher.combine(dispatcher.dispatch(x, plan), plan)


def test_dense_plan_by_hand():
    plan = DenseDispatcher().plan(routing())
    # Row by row: the weights of EXPERT and WEIGHT at their experts, zero elsewhere.
    expected = [[0.25, 0, 0.5], [0, 2, 0], [0, 0, 0], [1, -1, 0], [0, 0, 0.75]]
    np.testing.assert_array_equal(plan.weight, np.float32(expected))


def test_dense_adds_two_assignments_of_a_token_to_one_expert():
    plan = DenseDispatcher().plan(routing(expert=[[1, 1]] * T, weight=[[0.5, 0.25]] * T))
    np.testing.assert_array_equal(plan.weight, np.float32([[0, 0.75, 0]] * T))
