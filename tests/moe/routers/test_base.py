"""BASE: by hand, and against the linear assignment of scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from dynamoe.moe import BASE, RoutingContext
from dynamoe.moe.routers.base import balanced_assignment

N, E = 22, 4
TRAINING = RoutingContext(training=True)


def route(config, logits, context):
    """Route with the identity as the gate's kernel: the input is the logits."""
    router = config.build(width=logits.shape[1], experts=logits.shape[1], key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(logits.shape[1])
    return router(logits, context)[0]


def test_by_hand():
    # Both tokens like expert 0 best. Token 0 there and token 1 at expert 1 is 3 + 0, the other way round 2 + 0.
    logits = jnp.array([[3.0, 0.0], [2.0, 0.0]])
    training, evaluation = (route(BASE(), logits, context) for context in (TRAINING, RoutingContext()))
    np.testing.assert_array_equal(training.expert, [0, 1])
    np.testing.assert_allclose(training.weight, [1 / (1 + np.exp(-3)), 0.5], rtol=1e-6)
    np.testing.assert_array_equal(evaluation.expert, [0, 0])
    np.testing.assert_allclose(evaluation.weight, [1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-2))], rtol=1e-6)


VALUES = {
    "random": lambda normal: normal,
    "all like the first expert best": lambda normal: normal + 5.0 * np.eye(E)[:1],
    "some agree": lambda normal: np.repeat(normal[: N // 2], 2, axis=0),
    "all are indifferent": lambda normal: 0.0 * normal,
    "large": lambda normal: 1000.0 + 100.0 * normal,
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("real", [20, 22, 7, 3, 0])
def test_the_assignment_is_balanced_and_as_good_as_scipys(name, real):
    values = VALUES[name](np.random.default_rng(0).normal(size=(N, E))).astype(np.float32)
    mask = np.isin(np.arange(N), np.random.default_rng(1).permutation(N)[:real])
    expert = np.asarray(balanced_assignment(jnp.array(values), jnp.array(mask), tolerance=1e-3, iterations=3000))
    places = -(-real // E)
    assert ((expert >= 0) & (expert < E)).all() and np.bincount(expert[mask], minlength=E).max() <= places
    # Scipy assigns one to one: an expert becomes as many columns as it has places.
    columns = np.repeat(values[mask].astype(np.float64), places, axis=1)
    best = columns[linear_sum_assignment(columns, maximize=True)].sum()
    found = values[mask, expert[mask]].astype(np.float64).sum()
    spread = (values[mask].max(axis=1, keepdims=True) - values[mask]).max(initial=0.0)
    assert best - 1e-3 * spread * real - 1e-4 * spread <= found <= best + 1e-4 * spread + 1e-9


def test_every_group_is_balanced():
    logits = jax.random.normal(jax.random.key(3), (N, E)) + 4.0 * jnp.eye(E)[:1]
    expert = np.asarray(route(BASE(routing_group=8), logits, TRAINING).expert)
    for start, most in ((0, 2), (8, 2), (16, 2)):  # 8, 8 and 6 tokens
        assert np.bincount(expert[start : start + 8], minlength=E).max() == most


def test_out_of_rounds_the_tokens_that_are_left_fill_the_places_that_are_left():
    logits = jnp.array(VALUES["all like the first expert best"](np.random.default_rng(0).normal(size=(N, E))))
    logits = logits.astype(jnp.float32)
    expert = np.asarray(route(BASE(iterations=1), logits[:20], TRAINING).expert)
    np.testing.assert_array_equal(np.bincount(expert), [5, 5, 5, 5])
    # After one round expert 0 has the five that lose most elsewhere, and keeps them.
    second = np.sort(np.asarray(logits[:20]), axis=1)[:, -2]
    likes = np.asarray(logits[:20, 0]) - second
    np.testing.assert_array_equal(np.sort(np.flatnonzero(expert == 0)), np.sort(np.argsort(-likes)[:5]))


def test_a_single_expert_gets_all():
    np.testing.assert_array_equal(route(BASE(), jnp.ones((3, 1)), TRAINING).expert, [0, 0, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, r"BASE\.tolerance is 0\.0; it must be from 1e-5 to 1"),
        ({"tolerance": 2.0}, r"BASE\.tolerance is 2\.0; it must be from 1e-5 to 1"),
        ({"iterations": 0}, r"BASE\.iterations is 0; it must be at least 1"),
        ({"routing_group": 0}, r"BASE\.routing_group is 0; it must be at least 1 token"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BASE(**options)
