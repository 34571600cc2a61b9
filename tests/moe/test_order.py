"""Who gets a place first: the orders of a capacity, by hand and against a loop over assignments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import (
    BatchPriority,
    CapacityDispatcher,
    DenseDispatcher,
    FirstChoicesFirst,
    MoE,
    Order,
    Routing,
    TokenOrder,
)
from dynamoe.moe.dispatchers.order import choices, in_order

T, K, D, E = 12, 2, 8, 3
ORDERS = [TokenOrder(), FirstChoicesFirst(), BatchPriority()]
every_order = pytest.mark.parametrize("order", ORDERS, ids=str)


def routing_of(expert, weight, token=None):
    tokens = len(expert) if token is None else int(max(token)) + 1
    zeros = jnp.zeros((tokens, E))
    largest = np.zeros(tokens, np.float32)
    np.maximum.at(largest, np.arange(tokens).repeat(K) if token is None else np.array(token), np.ravel(weight))
    probs = zeros.at[:, 0].set(largest)  # of the probabilities, priority looks at the largest alone
    flat = jnp.array(np.ravel(expert), jnp.int32), jnp.array(np.ravel(weight), jnp.float32)
    return Routing(*flat, None if token is None else jnp.array(token, jnp.int32), zeros, probs)


@pytest.fixture(scope="module")
def crowded():
    """Experts and falling weights of each token; most like expert 0 best, and some go to nobody."""
    draw = np.random.default_rng(2)
    expert = np.stack([draw.permutation(E)[:K] for _ in range(T)])
    expert[::2, 0], expert[::2, 1] = 0, 1
    expert[5] = E
    weight = -np.sort(-draw.uniform(0.1, 1.0, (T, K)), axis=1)
    return expert, np.where(expert < E, weight, 0.0)


def kept(dispatcher, routing):
    plan = dispatcher.plan(routing)
    rows, places = plan.places.assignment.shape[0], np.asarray(plan.places.row)
    # Each row that is taken knows the assignment that took it.
    for assignment in np.flatnonzero(places < rows):
        assert plan.places.assignment[places[assignment]] == assignment
    return places < rows


@pytest.mark.parametrize(
    ("order", "expected"),
    # Expert 0 has 2 places, and is asked by token 0 as its second choice, by tokens 1, 2 and 3 as their first, with
    # weights 0.5, 0.9 and 0.6. Expert 1 has 2 places for token 0's first choice and token 1's second.
    [
        (TokenOrder(), [True, True, True, True, False, True, False, True]),
        (FirstChoicesFirst(), [True, False, True, True, True, True, False, True]),
        (BatchPriority(), [True, False, False, True, True, True, True, True]),
    ],
    ids=str,
)
def test_by_hand(order, expected):
    expert = [[1, 0], [0, 1], [0, 2], [0, 2]]
    weight = [[0.7, 0.3], [0.5, 0.5], [0.9, 0.1], [0.6, 0.4]]
    # ceil(0.75 * 8 / 3) = 2 places.
    np.testing.assert_array_equal(
        kept(CapacityDispatcher(capacity_factor=0.75, order=order), routing_of(expert, weight)), expected
    )


def serve(order, expert, weight, capacity, group):
    """The definition: sort by hand, then serve one after another, per expert and group of tokens."""
    importance = {
        TokenOrder: lambda token, choice: (token, choice),
        FirstChoicesFirst: lambda token, choice: (choice, token),
        BatchPriority: lambda token, choice: (choice, -weight[token].max(), token),
    }[type(order)]
    taken, served = {}, np.zeros((T, K), bool)
    for token, choice in sorted(((t, c) for t in range(T) for c in range(K)), key=lambda pair: importance(*pair)):
        queue = (token // group, expert[token, choice])
        taken[queue] = taken.get(queue, 0) + 1
        served[token, choice] = expert[token, choice] < E and taken[queue] <= capacity
    return served.ravel()


@every_order
@pytest.mark.parametrize("group", [None, 5])
@pytest.mark.parametrize("spelled_out", [False, True], ids=["token-major", "tokens spelled out"])
def test_equals_a_loop_that_serves_one_after_another(order, group, spelled_out, crowded):
    dispatcher = CapacityDispatcher(capacity_factor=0.6, routing_group=group, order=order)
    capacity = dispatcher.capacity(tokens=T, assignments=T * K, experts=E)
    expected = serve(order, *crowded, capacity, group or T)
    assert 0 < expected.sum() < (crowded[0] < E).sum()
    token = np.repeat(np.arange(T), K) if spelled_out else None
    found = kept(dispatcher, routing_of(*crowded, token))
    np.testing.assert_array_equal(found, expected)
    plan = dispatcher.plan(routing_of(*crowded, token))
    np.testing.assert_allclose(plan.dropped, 1 - expected.sum() / (crowded[0] < E).sum(), rtol=1e-6)


def test_rows_and_assignments_know_each_other_whatever_the_order():
    queue, order = jnp.array([2, 0, 1, 0, 2, 1, 3]), jnp.array([4, 6, 3, 1, 0, 5, 2])
    places = in_order(queue, 3, order)
    # Queue 0 holds assignments 3 and 1, queue 1 assignments 5 and 2, queue 2 assignments 4 and 0; 6 stands in none.
    np.testing.assert_array_equal(places.assignment, [3, 1, 5, 2, 4, 0, 7])
    np.testing.assert_array_equal(places.row, [5, 1, 3, 0, 4, 2, 7])
    np.testing.assert_array_equal(places.group_sizes, [2, 2, 2])


def test_a_choice_is_a_tokens_first_by_where_it_stands():
    np.testing.assert_array_equal(choices(routing_of([[0, 1], [2, 0]], [[1, 1], [1, 1]])), [0, 1, 0, 1])
    scattered = routing_of([0, 1, 2, 0, 1], [1] * 5, token=[1, 0, 1, 0, 1])
    np.testing.assert_array_equal(choices(scattered), [0, 0, 1, 1, 2])


@every_order
def test_output_and_gradients_are_those_of_dense_without_what_was_dropped(order, crowded):
    offset = jnp.arange(1.0, E + 1)[:, None, None]  # what makes the experts differ
    x = jax.random.normal(jax.random.key(0), (T, D))
    dispatcher = CapacityDispatcher(capacity_factor=0.6, order=order)
    served = jnp.array(kept(dispatcher, routing_of(*crowded)))
    routing = routing_of(*crowded)

    def through(dispatcher, routing, x, weight):
        plan = dispatcher.plan(routing._replace(weight=weight))
        y = dispatcher.combine(jnp.sin(dispatcher.dispatch(x, plan) + offset), plan)
        return jnp.square(y).sum()

    without = routing._replace(expert=jnp.where(served, routing.expert, E))
    found = jax.grad(lambda x, w: through(dispatcher, routing, x, w), (0, 1))(x, routing.weight)
    expected = jax.grad(lambda x, w: through(DenseDispatcher(), without, x, jnp.where(served, w, 0.0)), (0, 1))(
        x, routing.weight
    )
    for here, there in zip(found, expected, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)


def test_all_but_the_order_of_the_tokens_look_ahead():
    found = [CapacityDispatcher(order=order).looks_ahead for order in ORDERS]
    assert (
        found
        == [False, True, True]
        == [MoE(dispatcher=CapacityDispatcher(order=order)).looks_ahead for order in ORDERS]
    )


def test_an_order_of_ones_own_looks_ahead_unless_it_says_otherwise(crowded):
    class LastFirst(Order):
        def __call__(self, routing):
            return jnp.arange(routing.expert.shape[0])[::-1]

    dispatcher = CapacityDispatcher(capacity_factor=0.6, order=LastFirst())
    assert dispatcher.looks_ahead
    found = kept(dispatcher, routing_of(*crowded))
    expert, weight = (array[::-1, ::-1] for array in crowded)
    mirrored = kept(CapacityDispatcher(capacity_factor=0.6), routing_of(expert, weight))
    np.testing.assert_array_equal(found, mirrored[::-1])
