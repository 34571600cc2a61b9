"""Auxiliary losses: the balance loss by hand, and against the formula of another library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import BalanceLoss, Routing, RoutingContext, ZLoss
from dynamoe.moe.losses import token_mean
from dynamoe.moe.routing import NO_CONTEXT

E = 4


def routing_of(probs, k, mask=None):
    """Top-k routing of given probabilities."""
    _, expert = jax.lax.top_k(probs, k)
    expert = expert if mask is None else jnp.where(mask[:, None], expert, E)
    return Routing(expert.reshape(-1), jnp.ones(expert.size), None, jnp.log(probs), probs)


def random_probs(tokens=12):
    return jax.nn.softmax(2.0 * jax.random.normal(jax.random.key(5), (tokens, E)))


def switch_by_transformers(probs, k, mask):
    """`load_balancing_loss_func` of transformers' Mixtral, as published: K times the loss per assignment."""
    probs, mask = np.asarray(probs, np.float64), np.asarray(mask, np.float64)
    chosen = np.argsort(-probs, axis=1)[:, :k]
    one_hot = np.eye(E)[chosen]  # [T, K, E]
    tokens_per_expert = (one_hot * mask[:, None, None]).sum(axis=0) / mask.sum()  # [K, E]
    prob_per_expert = (probs * mask[:, None]).sum(axis=0) / mask.sum()  # [E]
    return (tokens_per_expert * prob_per_expert[None]).sum() * E


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_balance_loss_is_transformers_over_k(k):
    probs, mask = random_probs(), jnp.arange(12) % 5 != 2
    np.testing.assert_allclose(
        BalanceLoss()(routing_of(probs, k), NO_CONTEXT), switch_by_transformers(probs, k, np.ones(12)) / k, rtol=1e-5
    )
    np.testing.assert_allclose(
        BalanceLoss()(routing_of(probs, k, mask), RoutingContext(mask=mask)),
        switch_by_transformers(probs, k, mask) / k,
        rtol=1e-5,
    )


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_loss_is_one_when_balanced_for_every_k(k):
    # Token t prefers experts t, t+1, ... mod E: every expert gets K assignments, and every mean probability is 1/E.
    probs = jnp.stack([jnp.roll(jnp.array([0.4, 0.3, 0.2, 0.1]), t) for t in range(E)])
    np.testing.assert_allclose(BalanceLoss()(routing_of(probs, k), NO_CONTEXT), 1.0, rtol=1e-6)


def test_balance_loss_by_hand():
    # Two tokens, K = 1, both to expert 0: f = (1, 0, 0, 0). P_0 = (0.7 + 0.5) / 2 = 0.6. E * f_0 * P_0 = 4 * 0.6 = 2.4.
    probs = jnp.array([[0.7, 0.1, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]])
    np.testing.assert_allclose(BalanceLoss()(routing_of(probs, 1), NO_CONTEXT), 2.4, rtol=1e-6)


def test_balance_loss_is_highest_when_all_tokens_go_to_one_expert():
    probs = jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0, 0.0]), (6, E))
    np.testing.assert_allclose(BalanceLoss()(routing_of(probs, 1), NO_CONTEXT), E, rtol=1e-6)


def test_balance_loss_teaches_by_the_probabilities_alone():
    # d/dP of E * sum f P is E * f / T at every token: the counts are constants.
    probs = random_probs()
    gradient = jax.jit(jax.grad(lambda probs: BalanceLoss()(routing_of(probs, 2), NO_CONTEXT)))(probs)
    share = np.bincount(np.argsort(-np.asarray(probs), axis=1)[:, :2].ravel(), minlength=E) / 24
    np.testing.assert_allclose(gradient, np.broadcast_to(E * share / 12, (12, E)), rtol=1e-5)


def test_padding_takes_no_part_in_the_balance_loss():
    probs = random_probs()
    mask = jnp.arange(12) < 8
    padded = BalanceLoss()(routing_of(probs, 2, mask), RoutingContext(mask=mask))
    cut = BalanceLoss()(routing_of(probs[:8], 2), NO_CONTEXT)
    np.testing.assert_allclose(padded, cut, rtol=1e-6)


def test_z_loss_by_hand():
    # Logits (log 1, log 3) and (log 2, log 2): their sums of exponentials are 4 and 4, so the loss is (log 4)^2.
    # With the second token padding it stays; logits scaled by e add 1 to the logarithm.
    logits = jnp.log(jnp.array([[1.0, 3.0], [2.0, 2.0]]))
    routing = Routing(jnp.zeros(2, jnp.int32), jnp.ones(2), None, logits, jax.nn.softmax(logits))
    np.testing.assert_allclose(ZLoss()(routing, NO_CONTEXT), np.log(4) ** 2, rtol=1e-6)
    shifted = routing._replace(logits=logits + jnp.array([[0.0], [1.0]]))
    np.testing.assert_allclose(
        ZLoss()(shifted, RoutingContext(mask=jnp.array([False, True]))), (np.log(4) + 1) ** 2, rtol=1e-6
    )


def test_token_mean_counts_real_tokens_only():
    values = jnp.array([[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]])
    np.testing.assert_allclose(token_mean(values, jnp.array([True, True, False])), [2.0, 3.0])
    np.testing.assert_allclose(token_mean(values[:2], None), [2.0, 3.0])
    np.testing.assert_array_equal(token_mean(values, jnp.zeros(3, bool)), [0.0, 0.0])
