"""Dispatchers: what every one of them does, and that each agrees with a loop over assignments."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.moe import (
    BatchPriority,
    CapacityDispatcher,
    DenseDispatcher,
    DroplessDispatcher,
    Routing,
    RoutingContext,
    SwiGLU,
)

T, D, E = 5, 8, 3
DISPATCHERS = [
    DenseDispatcher(),
    DroplessDispatcher(),
    CapacityDispatcher(capacity_factor=3.0),  # 3 experts: room for all
    CapacityDispatcher(capacity_factor=3.0, routing_group=2),
    CapacityDispatcher(capacity_factor=3.0, order=BatchPriority()),
]
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


# Routings of 12 tokens with 2 experts each of 4; E marks nobody. Every dispatcher must do with each what dense does.
MANY, EXPERTS = 12, 4
ROUTINGS = {
    "random": np.random.default_rng(0).permuted(np.tile(np.arange(EXPERTS), (MANY, 1)), axis=1)[:, :2],
    "all to one pair": np.tile([3, 1], (MANY, 1)),
    "half padding": np.where(np.arange(MANY)[:, None] % 2, EXPERTS, np.random.default_rng(1).integers(0, 4, (MANY, 2))),
    "all padding": np.full((MANY, 2), EXPERTS),
}


@pytest.fixture(scope="module")
def value_and_gradients():
    """The sum of squares of the output, its gradients in tokens, weights and experts; compiled once per dispatcher."""
    graph, state = nnx.split(SwiGLU(hidden=4).build(experts=EXPERTS, width=D, key=jax.random.key(1)))

    @functools.partial(jax.jit, static_argnums=0)
    def compute(dispatcher, x, expert, weight, token):
        def loss(x, weight, state):
            routing = Routing(expert, weight, token, jnp.zeros((MANY, EXPERTS)), jnp.zeros((MANY, EXPERTS)))
            y = through(dispatcher, x, routing, nnx.merge(graph, state))
            return jnp.square(y).sum(), y

        return jax.grad(loss, (0, 1, 2), has_aux=True)(x, weight, state)

    return compute


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("spelled_out", [False, True], ids=["token-major", "tokens spelled out"])
@pytest.mark.parametrize(
    "dispatcher",
    [
        DroplessDispatcher(),
        CapacityDispatcher(capacity_factor=4.0),
        CapacityDispatcher(capacity_factor=4.0, routing_group=5),
    ],
    ids=str,
)
def test_values_and_gradients_equal_those_of_dense(dispatcher, spelled_out, name, value_and_gradients):
    expert = jnp.array(ROUTINGS[name].reshape(-1), jnp.int32)
    weight = jnp.where(expert < EXPERTS, jax.random.normal(jax.random.key(2), expert.shape), 0.0)
    token = jnp.repeat(jnp.arange(MANY), 2) if spelled_out else None
    x = jax.random.normal(jax.random.key(3), (MANY, D))
    found = value_and_gradients(dispatcher, x, expert, weight, token)
    expected = value_and_gradients(DenseDispatcher(), x, expert, weight, None)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [None, 5])
@pytest.mark.parametrize("spelled_out", [False, True], ids=["token-major", "tokens spelled out"])
def test_with_drops_values_and_gradients_are_those_of_dense_without_the_dropped(
    spelled_out, group, value_and_gradients
):
    chosen = ROUTINGS["random"]
    kept = first_come(chosen, 2, group or MANY)
    dispatcher = CapacityDispatcher(capacity_factor=0.3 if group is None else 0.8, routing_group=group)
    expert = jnp.array(chosen.reshape(-1), jnp.int32)
    weight = jax.random.normal(jax.random.key(2), expert.shape)
    token = jnp.repeat(jnp.arange(MANY), 2) if spelled_out else None
    x = jax.random.normal(jax.random.key(3), (MANY, D))
    assert 0.2 < 1 - kept.mean() < 0.8
    found = value_and_gradients(dispatcher, x, expert, weight, token)
    without = jnp.where(kept, expert, EXPERTS), jnp.where(kept, weight, 0.0)
    expected = value_and_gradients(DenseDispatcher(), x, *without, None)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def first_come(expert, capacity, group):
    """Which assignments find a place, as the definition has it: one after another, per expert and group of tokens."""
    taken, kept = {}, []
    for token, row in enumerate(expert):
        for e in row:
            queue = (token // group, int(e))
            taken[queue] = taken.get(queue, 0) + 1
            kept.append(e < EXPERTS and taken[queue] <= capacity)
    return np.array(kept)


@pytest.mark.parametrize("group", [None, 4, 5, 100])
def test_a_place_goes_to_whom_comes_first_in_each_group(group):
    dispatcher = CapacityDispatcher(capacity_factor=0.3, routing_group=group)
    expert = ROUTINGS["half padding"]
    size = min(group or MANY, MANY)
    capacity = math.ceil(0.3 * 2 * size / EXPERTS)
    assert dispatcher.capacity(tokens=MANY, assignments=2 * MANY, experts=EXPERTS) == capacity
    zeros = jnp.zeros((MANY, EXPERTS))
    routing = Routing(jnp.array(expert.ravel(), jnp.int32), jnp.ones(2 * MANY), None, zeros, zeros)
    plan = jax.jit(dispatcher.plan)(routing)
    kept, rows = first_come(expert, capacity, size), plan.places.assignment.shape[0]
    assert rows == EXPERTS * math.ceil(MANY / size) * capacity
    np.testing.assert_array_equal(np.asarray(plan.places.row) < rows, kept)
    np.testing.assert_allclose(plan.dropped, 1 - kept.sum() / (expert < EXPERTS).sum(), atol=1e-6)
    assert 0 < plan.dropped < 1
    # Each row that is taken knows the assignment that took it, and belongs to its expert.
    for assignment, row in enumerate(np.asarray(plan.places.row)):
        if row < rows:
            assert plan.places.assignment[row] == assignment
            assert row // (rows // EXPERTS) == expert.ravel()[assignment]
    assert (np.asarray(plan.places.assignment) < 2 * MANY).sum() == kept.sum()


def test_a_dropped_assignment_adds_nothing(experts):
    # Four tokens to expert 1, then one to expert 0: ceil(1.0 * 5 / 3) = 2 places, so tokens 2 and 3 are dropped.
    chosen = routing(expert=[1, 1, 1, 1, 0], weight=[1.0] * 5)
    x = jax.random.normal(jax.random.key(4), (T, D))
    y = through(CapacityDispatcher(capacity_factor=1.0), x, chosen, experts)
    expected = through(DenseDispatcher(), x, chosen, experts)
    np.testing.assert_array_equal(np.abs(y).max(axis=1) > 0, [True, True, False, False, True])
    np.testing.assert_allclose(y[np.array([0, 1, 4])], expected[np.array([0, 1, 4])], rtol=1e-4, atol=1e-6)


def test_no_token_loses_its_place_to_a_later_one(experts):
    # What the last tokens choose changes nothing for the first three.
    dispatcher, x = CapacityDispatcher(capacity_factor=0.9), jax.random.normal(jax.random.key(4), (T, D))
    one, other = (
        through(dispatcher, x, routing(expert=[[1, 0], [1, 2], [1, 0], *last], weight=[[1.0, 0.5]] * T), experts)
        for last in ([[0, 2], [0, 1]], [[1, 0], [2, 0]])
    )
    np.testing.assert_array_equal(one[:3], other[:3])


def test_capacity_is_rounded_up_but_not_by_a_rounding_error():
    def places(factor, share):
        return CapacityDispatcher(capacity_factor=factor).capacity(tokens=2 * share, assignments=2 * share, experts=2)

    assert places(1.1, 10) == 11  # 1.1 * 10 is 11.000000000000002
    assert places(1.25, 10) == 13
    assert places(0.001, 10) == 1
    assert places(1e6, 10) == 20  # all assignments


def test_evaluation_may_have_a_capacity_factor_of_its_own():
    # Five tokens to expert 1: ceil(0.6 * 5 / 3) = 1 place in training, ceil(1.8 * 5 / 3) = 3 in evaluation.
    chosen = routing(expert=[1] * T, weight=[1.0] * T)
    for evaluation, trained, evaluated in ((1.8, 4 / 5, 2 / 5), (None, 4 / 5, 4 / 5)):
        dispatcher = CapacityDispatcher(capacity_factor=0.6, evaluation_capacity_factor=evaluation)
        np.testing.assert_allclose(dispatcher.plan(chosen, RoutingContext(training=True)).dropped, trained, rtol=1e-6)
        np.testing.assert_allclose(dispatcher.plan(chosen, RoutingContext()).dropped, evaluated, rtol=1e-6)
        np.testing.assert_allclose(dispatcher.plan(chosen).dropped, evaluated, rtol=1e-6)


@pytest.mark.parametrize("name", ["capacity_factor", "evaluation_capacity_factor"])
@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_a_capacity_factor_that_is_not_positive_and_finite_is_refused(name, factor):
    with pytest.raises(ValueError, match=rf"CapacityDispatcher\.{name} is {factor}; it must be above 0 and finite"):
        CapacityDispatcher(**{name: factor})


def test_a_routing_group_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"routing_group is 0; it must be at least 1 token"):
        CapacityDispatcher(routing_group=0)
