"""Random routing: uniform over sets of experts, new in training and repeated in evaluation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.moe import Random, RouterState, RoutingContext
from dynamoe.moe.routing import NO_CONTEXT

D, E = 3, 4


def built(k=2, seed=0):
    return Random(k=k).build(width=D, experts=E, key=jax.random.key(seed))


def test_all_sets_of_experts_are_equally_probable():
    tokens = 6000
    routing, _ = built()(jnp.ones((tokens, D)), RoutingContext(key=jax.random.key(1), training=True))
    pairs = np.sort(np.asarray(routing.expert).reshape(tokens, 2), axis=1)
    shares = [(pairs == pair).all(axis=1).mean() for pair in itertools.combinations(range(E), 2)]
    # Six pairs, none of an expert with itself. The standard deviation of a share is sqrt(1/6 * 5/6 / 6000) = 0.0048.
    np.testing.assert_allclose(shares, 1 / 6, atol=0.02)
    np.testing.assert_array_equal(routing.weight, np.full(2 * tokens, 0.5))
    np.testing.assert_array_equal(routing.probs, np.full((tokens, E), 0.25))


def test_a_key_draws_anew_and_no_key_repeats():
    x, router = jnp.ones((50, D)), built()

    def experts(router, key=None):
        context = NO_CONTEXT if key is None else RoutingContext(key=jax.random.key(key), training=True)
        return np.asarray(router(x, context)[0].expert)

    assert (experts(router, 1) != experts(router, 2)).any()
    np.testing.assert_array_equal(experts(router, 1), experts(built(seed=9), 1))
    np.testing.assert_array_equal(experts(router), experts(router))
    assert (experts(router) != experts(built(seed=9))).any()  # each layer has a seed of its own


def test_the_seed_is_a_state_and_there_is_no_parameter():
    router = built()
    assert not nnx.to_flat_state(nnx.state(router, nnx.Param))
    assert list(nnx.state(router, RouterState)) == ["seed"]


def test_a_number_of_experts_out_of_range_is_refused(key):
    with pytest.raises(ValueError, match=r"Random\.k is 0; it must be at least 1"):
        Random(k=0)
    with pytest.raises(ValueError, match=r"Random\.k is 5; with 4 experts it must be at most 4"):
        Random(k=5).build(width=D, experts=E, key=key)
