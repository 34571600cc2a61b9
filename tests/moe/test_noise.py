"""Noise of routers: its distribution, its place in training alone, and the chances that it gives each expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamoe.moe import Gumbel, Jitter, LearnedNoise, LossFree, RoutingContext, Sigmoid, TopK
from dynamoe.moe.noise import NoisyLogits, chance_of_top_k
from dynamoe.moe.routing import NO_CONTEXT

T, D, E = 6, 4, 4
DRAW = RoutingContext(key=jax.random.key(5), training=True)
NOISES = [Jitter(amount=0.5), Gumbel(temperature=0.5), LearnedNoise()]
every_noise = pytest.mark.parametrize("noise", NOISES, ids=str)


def built(noise, k=2, **options):
    """A router whose logits are its input."""
    router = TopK(k=k, noise=noise, renormalize=k > 1, **options).build(width=D, experts=E, key=jax.random.key(3))
    router.gate.kernel[...] = jnp.eye(D)
    return router


@pytest.fixture
def x(key):
    return jax.random.normal(jax.random.fold_in(key, 1), (T, D))


@every_noise
def test_noise_is_drawn_in_training_alone(noise, x):
    router, plain = built(noise), built(None)
    there, here = (r(x, DRAW._replace(training=False))[0]._replace(chance=None) for r in (router, plain))
    jax.tree.map(np.testing.assert_array_equal, there, here)
    draws = [router(jnp.tile(x, (20, 1)), DRAW._replace(key=jax.random.key(seed)))[0].expert for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


@every_noise
def test_noise_without_a_key_is_refused_in_training(noise, x):
    message = rf"context\.key is None; a router with {type(noise).__name__}\(.*\) needs a PRNG key in training"
    with pytest.raises(ValueError, match=message):
        built(noise)(x, RoutingContext(training=True))


def test_jitter_scales_the_input():
    factors = built(Jitter(amount=0.1))(jnp.ones((500, D)), DRAW)[0].logits
    assert 0.9 <= factors.min() < 0.91 and 1.09 < factors.max() <= 1.1
    np.testing.assert_allclose(factors.mean(), 1.0, atol=0.01)


def test_gumbel_noise_draws_experts_without_replacement():
    # Two of four experts with p = (0.4, 0.3, 0.2, 0.1): a after b has the chance p_a * p_b / (1 - p_a). At temperature
    # 2 the odds are the square roots of these.
    p, temperature = np.array([0.4, 0.3, 0.2, 0.1]), 2.0
    odds = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    draws = 20_000
    router = built(Gumbel(temperature=temperature))
    routing, _ = router(jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (draws, E)), DRAW)
    first, second = np.asarray(routing.expert).reshape(-1, 2).T
    found = np.histogram2d(first, second, bins=(range(E + 1), range(E + 1)))[0] / draws
    expected = odds[:, None] * odds[None] / (1 - odds[:, None])
    np.fill_diagonal(expected, 0.0)
    # The standard deviation of a share s of n draws is sqrt(s (1 - s) / n), here at most 0.0026.
    np.testing.assert_allclose(found, expected, atol=0.011)
    # Weights and probabilities are those without the noise.
    np.testing.assert_allclose(routing.probs[0], p, rtol=1e-5)
    np.testing.assert_allclose(
        np.asarray(routing.weight).reshape(-1, 2)[:, 0], p[first] / (p[first] + p[second]), rtol=1e-5
    )


def test_learned_noise_spreads_by_the_softplus_of_a_linear_map():
    # x = (1, 0, 0, 0) and W_noise[0] = (-2, 0, 1, 3): deviations are log(1 + exp(.)) + 0.01.
    router = built(LearnedNoise(minimum=0.01))
    router.noise.kernel[...] = router.noise.kernel[...].at[0].set(jnp.array([-2.0, 0.0, 1.0, 3.0]))
    x = jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0, 0.0]), (5000, D))
    logits = np.asarray(router(x, DRAW)[0].logits)
    np.testing.assert_allclose(logits.std(axis=0), np.log1p(np.exp([-2.0, 0.0, 1.0, 3.0])) + 0.01, rtol=0.05)
    np.testing.assert_allclose(logits.mean(axis=0), [1.0, 0.0, 0.0, 0.0], atol=0.2)


def test_weights_are_those_of_the_logits_with_the_learned_noise(x):
    routing, _ = built(LearnedNoise())(x, DRAW)
    odds = np.exp(
        np.take_along_axis(np.asarray(routing.logits, np.float64), np.asarray(routing.expert.reshape(T, 2)), 1)
    )
    np.testing.assert_allclose(routing.weight.reshape(T, 2), odds / odds.sum(axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_chances_are_those_of_the_paper(k, x):
    # Shazeer et al. 2017, eq. 8-9: Phi((mean_i - k-th best of the noisy logits without i) / deviation_i).
    router = built(LearnedNoise(), k=k)
    router.noise.kernel[...] = jax.random.normal(jax.random.key(8), (D, E))
    routing, _ = router(x, DRAW)
    deviation = np.log1p(np.exp(np.asarray(x, np.float64) @ np.asarray(router.noise.kernel[...], np.float64))) + 0.01
    for t in range(T):
        for i in range(E):
            others = np.delete(np.asarray(routing.logits[t], np.float64), i)
            score = (float(x[t, i]) - np.sort(others)[-k]) / deviation[t, i]
            expected = float(jax.scipy.stats.norm.cdf(score))
            np.testing.assert_allclose(routing.chance[t, i], expected, rtol=1e-3, atol=1e-6)


def test_chances_by_hand():
    # k = 1, logits (3, 1), noise of deviation 2 around means (2, 1). Expert 0 must beat 1: Phi((2 - 1) / 2) = 0.6915.
    # Expert 1 must beat 3: Phi((1 - 3) / 2) = Phi(-1) = 0.1587.
    noisy = NoisyLogits(jnp.array([[3.0, 1.0]]), None, jnp.array([[2.0, 1.0]]), jnp.full((1, 2), 2.0))
    np.testing.assert_allclose(chance_of_top_k(noisy, 1), [[0.6915, 0.1587]], atol=1e-4)
    np.testing.assert_array_equal(chance_of_top_k(noisy, 2), [[1.0, 1.0]])


def test_chances_teach_both_linear_maps(x):
    graph, params = nnx.split(built(LearnedNoise()))
    chance = jax.jit(jax.grad(lambda params: nnx.merge(graph, params)(x, DRAW)[0].chance[:, 0].sum()))
    for leaf in jax.tree.leaves(chance(params)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-3


def test_chances_are_known_in_evaluation_and_not_where_more_than_the_logits_decides(x):
    assert built(LearnedNoise())(x, NO_CONTEXT)[0].chance.shape == (T, E)
    assert built(LearnedNoise(), scores=Sigmoid(), balancing=LossFree())(x, DRAW)[0].chance is None
    assert built(Gumbel())(x, DRAW)[0].chance is None


@pytest.mark.parametrize(
    ("noise", "field", "value", "allowed"),
    [
        (Jitter, "amount", 0.0, "above 0 and below 1"),
        (Jitter, "amount", 1.0, "above 0 and below 1"),
        (Jitter, "amount", float("nan"), "above 0 and below 1"),
        (Gumbel, "temperature", -1.0, "above 0 and finite"),
        (LearnedNoise, "minimum", 0.0, "above 0 and finite"),
    ],
)
def test_values_outside_of_their_range_are_refused(noise, field, value, allowed):
    with pytest.raises(ValueError, match=rf"{noise.__name__}\.{field} is {value}; it must be {allowed}"):
        noise(**{field: value})
