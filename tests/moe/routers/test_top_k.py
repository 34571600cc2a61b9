"""Top-k routing by hand and against sorting in float64. The contract of all routers is in ../test_routers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import Sigmoid, TopK
from dynamoe.moe.routing import NO_CONTEXT

T, D, E = 6, 8, 4


@pytest.fixture
def x(key):
    return jax.random.normal(jax.random.fold_in(key, 1), (T, D))


def route(config, x):
    return config.build(width=D, experts=E, key=jax.random.key(3))(x, NO_CONTEXT)[0]


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


@pytest.mark.parametrize(
    "config", [TopK(k=1, renormalize=False), TopK(k=3), TopK(k=2, renormalize=False), TopK(k=2, scores=Sigmoid())]
)
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


def test_one_renormalised_expert_is_refused_for_its_weight_would_be_a_constant():
    with pytest.raises(ValueError, match=r"TopK\.renormalize is True with k=1: .* it must be False"):
        TopK(k=1)


def test_scores_that_are_all_zero_give_zeros_and_not_nan():
    router = TopK(k=2, scores=Sigmoid()).build(width=E, experts=E, key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(E)
    routing, _ = router(jnp.full((3, E), -800.0), NO_CONTEXT)
    assert (routing.weight == 0).all() and (routing.probs == 0).all()


def test_fewer_than_one_expert_per_token_is_refused():
    with pytest.raises(ValueError, match=r"TopK\.k is 0; it must be at least 1"):
        TopK(k=0)


def test_more_experts_per_token_than_experts_are_refused():
    with pytest.raises(ValueError, match=r"TopK\.k is 5; with 4 experts it must be at most 4"):
        TopK(k=5).build(width=D, experts=4, key=jax.random.key(0))


def test_the_scale_multiplies_the_weights_and_nothing_else(x):
    scaled, plain = route(TopK(k=2, scale=2.5), x), route(TopK(k=2), x)
    np.testing.assert_array_equal(scaled.expert, plain.expert)
    np.testing.assert_allclose(scaled.weight, 2.5 * plain.weight, rtol=1e-6)
    np.testing.assert_array_equal(scaled.probs, plain.probs)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_outside_of_its_range_is_refused(scale):
    with pytest.raises(ValueError, match=rf"TopK\.scale is {scale}; it must be above 0 and finite"):
        TopK(scale=scale)
