"""Routers: the contract of every router, and each technique against a calculation that is not ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.moe import EqualWeights, Routing, RoutingContext, Sigmoid, TopK
from dynamoe.moe.routing import NO_CONTEXT, assignment_counts, tokens_of

T, D, E = 6, 8, 4
TOP_K = [TopK(k=1, renormalize=False), TopK(k=2), TopK(k=3, renormalize=False), TopK(k=2, scores=Sigmoid())]
ROUTERS = [*TOP_K, EqualWeights(k=3)]
every_router = pytest.mark.parametrize("config", ROUTERS, ids=str)


@pytest.fixture
def x(key):
    return jax.random.normal(jax.random.fold_in(key, 1), (T, D))


def route(config, x, context=NO_CONTEXT):
    return config.build(width=D, experts=E, key=jax.random.key(3))(x, context)[0]


@every_router
def test_jit_equals_eager(config, x):
    router = config.build(width=D, experts=E, key=jax.random.key(3))
    graph, state = nnx.split(router)
    jitted, eager = jax.jit(lambda state, x: nnx.merge(graph, state)(x, NO_CONTEXT)[0])(state, x), route(config, x)
    np.testing.assert_array_equal(jitted.expert, eager.expert)
    np.testing.assert_allclose(jitted.weight, eager.weight, rtol=1e-6)
    np.testing.assert_allclose(jitted.probs, eager.probs, rtol=1e-6)


@every_router
def test_permuted_tokens_get_permuted_assignments(config, x):
    order = np.array([3, 0, 5, 1, 4, 2])
    here, there = route(config, x), route(config, x[order])
    np.testing.assert_array_equal(there.expert.reshape(T, -1), here.expert.reshape(T, -1)[order])
    np.testing.assert_allclose(there.weight.reshape(T, -1), here.weight.reshape(T, -1)[order], rtol=1e-6)


@every_router
def test_padding_is_assigned_to_nobody_and_changes_no_other_token(config, x):
    mask = jnp.array([True, False, True, True, False, True])
    free, masked = route(config, x), route(config, x, RoutingContext(mask=mask))
    expert, weight = masked.expert.reshape(T, -1), masked.weight.reshape(T, -1)
    assert (expert[~mask] == E).all() and (weight[~mask] == 0).all()
    np.testing.assert_array_equal(expert[mask], free.expert.reshape(T, -1)[mask])
    np.testing.assert_array_equal(weight[mask], free.weight.reshape(T, -1)[mask])


@every_router
def test_no_token_takes_an_expert_twice(config, x):
    expert = np.asarray(route(config, x).expert).reshape(T, -1)
    assert all(len(set(row)) == len(row) == config.experts_per_token for row in expert)


@every_router
def test_bfloat16_activations_are_routed_in_float32(config, x):
    x = x.astype(jnp.bfloat16)
    rough, exact = route(config, x), route(config, x.astype(jnp.float32))
    assert rough.logits.dtype == rough.probs.dtype == jnp.float32
    np.testing.assert_array_equal(rough.logits, exact.logits)
    np.testing.assert_array_equal(rough.expert, exact.expert)


@pytest.mark.parametrize(
    ("renormalize", "weights"),
    # Softmax of log p is p = (0.1, 0.4, 0.2, 0.3). The two largest are expert 1 with 0.4 and expert 3 with 0.3;
    # renormalised 0.4 / 0.7 and 0.3 / 0.7.
    [(False, [0.4, 0.3]), (True, [0.4 / 0.7, 0.3 / 0.7])],
)
def test_top_k_by_hand(renormalize, weights):
    router = TopK(k=2, renormalize=renormalize).build(width=4, experts=4, key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(4)
    routing, state = router(jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]])), NO_CONTEXT)
    assert state is None and routing.token is None
    np.testing.assert_array_equal(routing.expert, [1, 3])
    np.testing.assert_allclose(routing.weight, weights, rtol=1e-6)
    np.testing.assert_allclose(routing.probs, [[0.1, 0.4, 0.2, 0.3]], rtol=1e-6)


@pytest.mark.parametrize("config", TOP_K, ids=str)
def test_top_k_equals_sorting_float64_scores(config, x):
    router = config.build(width=D, experts=E, key=jax.random.key(3))
    routing, _ = router(x, NO_CONTEXT)
    logits = np.asarray(x, np.float64) @ np.asarray(router.gate.kernel[...], np.float64)
    odds = np.exp(logits)
    scores = odds / (1 + odds) if config.scores == Sigmoid() else odds / odds.sum(axis=1, keepdims=True)
    for token in range(T):
        chosen = sorted(range(E), key=lambda e: -scores[token, e])[: config.k]  # noqa: B023
        weights = scores[token, chosen] / (scores[token, chosen].sum() if config.renormalize else 1.0)
        at = slice(token * config.k, (token + 1) * config.k)
        np.testing.assert_array_equal(routing.expert[at], chosen)
        np.testing.assert_allclose(routing.weight[at], weights, rtol=1e-5)
    np.testing.assert_allclose(routing.logits, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(routing.probs, scores / scores.sum(axis=1, keepdims=True), rtol=1e-5)


def test_sigmoid_scores_by_hand():
    # sigmoid(log(p / (1 - p))) = p: the scores are (0.9, 0.6, 0.3, 0.2). The two best weigh 0.9 / 1.5 and 0.6 / 1.5.
    router = TopK(k=2, scores=Sigmoid()).build(width=4, experts=4, key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(4)
    scores = jnp.array([[0.3, 0.9, 0.2, 0.6]])
    routing, _ = router(jnp.log(scores / (1 - scores)), NO_CONTEXT)
    np.testing.assert_array_equal(routing.expert, [1, 3])
    np.testing.assert_allclose(routing.weight, [0.6, 0.4], rtol=1e-6)
    np.testing.assert_allclose(routing.probs, scores / 2.0, rtol=1e-6)


def test_equal_weights_by_hand():
    router = EqualWeights(k=2).build(width=4, experts=4, key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(4)
    routing, state = router(jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]])), NO_CONTEXT)
    assert state is None
    np.testing.assert_array_equal(routing.expert, [1, 3])
    np.testing.assert_array_equal(routing.weight, [1, 1])
    np.testing.assert_allclose(routing.probs, [[0.1, 0.4, 0.2, 0.3]], rtol=1e-6)


@every_router
def test_a_stated_sum_of_the_weights_is_every_token_s(config, x):
    sums = np.asarray(route(config, x).weight).reshape(T, -1).sum(axis=1)
    if config.weight_sum is None:
        assert sums.max() - sums.min() > 0.01
    else:
        np.testing.assert_allclose(sums, config.weight_sum, rtol=1e-6)


def test_equal_weights_refuse_a_number_of_experts_that_cannot_be():
    with pytest.raises(ValueError, match=r"EqualWeights\.k is 0; it must be at least 1"):
        EqualWeights(k=0)
    with pytest.raises(ValueError, match=r"EqualWeights\.k is 5; with 4 experts it must be at most 4"):
        EqualWeights(k=5).build(width=D, experts=4, key=jax.random.key(0))


def test_jitter_scales_the_input_in_training_alone(x):
    noisy, plain = TopK(k=2, jitter=0.1), TopK(k=2)
    draw = RoutingContext(key=jax.random.key(5), training=True)
    np.testing.assert_array_equal(route(noisy, x, draw._replace(training=False)).logits, route(plain, x).logits)
    one, other = route(noisy, x, draw), route(noisy, x, draw._replace(key=jax.random.key(6)))
    assert (one.logits != other.logits).all()
    # With the identity as kernel the logits are the input times the noise.
    router = TopK(k=1, renormalize=False, jitter=0.1).build(width=E, experts=E, key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(E)
    factors = router(jnp.ones((500, E)), draw)[0].logits
    assert 0.9 <= factors.min() < 0.91 and 1.09 < factors.max() <= 1.1
    np.testing.assert_allclose(factors.mean(), 1.0, atol=0.01)


def test_jitter_without_a_key_is_refused(x):
    with pytest.raises(ValueError, match=r"context\.key is None; a router with jitter needs a PRNG key in training"):
        route(TopK(jitter=0.1), x, RoutingContext(training=True))


@pytest.mark.parametrize("jitter", [-0.1, 1.0, float("nan")])
def test_jitter_outside_of_its_range_is_refused(jitter):
    with pytest.raises(ValueError, match=rf"TopK\.jitter is {jitter}; it must be at least 0 and below 1"):
        TopK(jitter=jitter)


def test_assignments_are_counted_per_expert_and_nobody_is_left_out():
    routing = Routing(jnp.array([0, 2, 2, E, 3, E]), jnp.ones(6), None, jnp.zeros((3, E)), jnp.zeros((3, E)))
    np.testing.assert_array_equal(assignment_counts(routing), [1, 0, 2, 1])


def weight_gradient(config, x):
    graph, state = nnx.split(config.build(width=D, experts=E, key=jax.random.key(3)))
    loss = jax.grad(lambda state: jnp.square(nnx.merge(graph, state)(x, NO_CONTEXT)[0].weight).sum())
    return np.asarray(loss(state)["gate"]["kernel"][...])


def test_the_weights_teach_the_router(x):
    assert np.abs(weight_gradient(TopK(k=2), x)).max() > 1e-3
    assert np.abs(weight_gradient(TopK(k=1, renormalize=False), x)).max() > 1e-3


def test_one_renormalised_expert_is_refused_for_its_weight_would_be_a_constant():
    with pytest.raises(ValueError, match=r"TopK\.renormalize is True with k=1: .* it must be False"):
        TopK(k=1)


def test_scores_that_are_all_zero_give_zeros_and_not_nan():
    router = TopK(k=2, scores=Sigmoid()).build(width=E, experts=E, key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(E)
    routing, _ = router(jnp.full((3, E), -800.0), NO_CONTEXT)
    assert (routing.weight == 0).all() and (routing.probs == 0).all()


def test_tokens_of_spells_out_the_token_major_order():
    def routing(token):
        return Routing(jnp.arange(6) % 3, jnp.ones(6), token, jnp.zeros((3, 4)), jnp.zeros((3, 4)))

    np.testing.assert_array_equal(tokens_of(routing(None)), [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(tokens_of(routing(jnp.array([2, 1, 0, 0, 1, 2]))), [2, 1, 0, 0, 1, 2])


def test_fewer_than_one_expert_per_token_is_refused():
    with pytest.raises(ValueError, match=r"TopK\.k is 0; it must be at least 1"):
        TopK(k=0)


def test_more_experts_per_token_than_experts_are_refused():
    with pytest.raises(ValueError, match=r"TopK\.k is 5; with 4 experts it must be at most 4"):
        TopK(k=5).build(width=D, experts=4, key=jax.random.key(0))
