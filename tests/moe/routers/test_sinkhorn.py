"""Sinkhorn routing: by hand, and against the scaling of a matrix in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import RoutingContext, Sinkhorn, Softmax
from dynamoe.moe.routers.sinkhorn import balancing_bias

T, E = 14, 4
TRAINING = RoutingContext(training=True)


def route(config, logits, context):
    """Route with the identity as the gate's kernel: the input is the logits."""
    router = config.build(width=logits.shape[1], experts=logits.shape[1], key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(logits.shape[1])
    return router(logits, context)[0]


def test_by_hand():
    # exp(logits) is (e^2, 1), (e, 1): both tokens like expert 0 best. Balanced it is (a, 1 - a), (1 - a, a), with the
    # same odds, a^2 / (1 - a)^2 = e^2 * 1 / (1 * e) = e: a = 0.62, so token 0 goes to expert 0 and token 1 to 1.
    logits = jnp.array([[2.0, 0.0], [1.0, 0.0]])
    training, evaluation = (route(Sinkhorn(iterations=20), logits, c) for c in (TRAINING, RoutingContext()))
    np.testing.assert_array_equal(training.expert, [0, 1])
    np.testing.assert_array_equal(evaluation.expert, [0, 0])
    # The weights are sigmoids of the raw logits: of 2 and 0, of 2 and 1.
    np.testing.assert_allclose(training.weight, [1 / (1 + np.exp(-2)), 0.5], rtol=1e-6)
    np.testing.assert_allclose(evaluation.weight, [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1))], rtol=1e-6)
    bias = balancing_bias(logits[None], jnp.ones((1, 2), bool), 20)
    balanced = jax.nn.softmax(logits + bias, axis=1)
    a = 1 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(balanced, [[a, 1 - a], [1 - a, a]], rtol=1e-5)


def scaled(logits, iterations):
    """Sinkhorn's iteration as it is written: rows to 1, then columns to an even share; float64."""
    matrix = np.exp(np.asarray(logits, np.float64))
    for _ in range(iterations):
        matrix /= matrix.sum(axis=1, keepdims=True)
        matrix *= len(matrix) / matrix.shape[1] / matrix.sum(axis=0, keepdims=True)
    return matrix


@pytest.mark.parametrize("group", [None, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_scaling_of_a_matrix_in_each_group(group, masked):
    # A common preference for the last experts, which greedy routing would follow.
    logits = jax.random.normal(jax.random.key(3), (T, E)) + jnp.arange(E, dtype=jnp.float32)[None]
    mask = np.arange(T) % 5 != 2 if masked else np.ones(T, bool)
    config = Sinkhorn(k=2, iterations=5, routing_group=group, scores=Softmax())
    expert = np.asarray(route(config, logits, TRAINING._replace(mask=jnp.array(mask))).expert).reshape(T, 2)
    greedy = np.asarray(route(config, logits, RoutingContext(mask=jnp.array(mask))).expert).reshape(T, 2)
    assert (expert[~mask] == E).all() and (expert != greedy).any()
    for start in range(0, T, group or T):
        rows = [token for token in range(start, min(start + (group or T), T)) if mask[token]]
        np.testing.assert_array_equal(expert[rows], np.argsort(-scaled(logits[np.array(rows)], 5), axis=1)[:, :2])


def test_logits_too_large_for_an_exponential_are_balanced_all_the_same():
    logits = 300.0 * jax.random.normal(jax.random.key(3), (T, E))
    bias = balancing_bias(logits[None], jnp.ones((1, T), bool), 30)
    assert np.isfinite(bias).all()
    routing = route(Sinkhorn(iterations=30), logits + 500.0 * jnp.eye(E)[:1], TRAINING)
    assert np.bincount(np.asarray(routing.expert), minlength=E).max() < T


def test_a_group_of_padding_alone_is_no_nan():
    mask = jnp.arange(T) < 7
    routing = route(
        Sinkhorn(routing_group=7), jax.random.normal(jax.random.key(3), (T, E)), TRAINING._replace(mask=mask)
    )
    assert (np.asarray(routing.expert)[7:] == E).all() and np.isfinite(routing.weight).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"Sinkhorn\.k is 0; it must be at least 1"),
        ({"iterations": 0}, r"Sinkhorn\.iterations is 0; it must be at least 1"),
        ({"routing_group": 0}, r"Sinkhorn\.routing_group is 0; it must be at least 1 token"),
        ({"k": 5}, r"Sinkhorn\.k is 5; with 4 experts it must be at most 4"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sinkhorn(**options).build(width=8, experts=4, key=jax.random.key(0))
