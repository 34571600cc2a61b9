"""Null experts: by hand, and their balance loss against the paper's sum over all experts, real and null."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamoe.moe import MoE, NullExperts, RoutingContext
from dynamoe.moe.routing import NO_CONTEXT

E, N = 3, 2


def route(config, probs, context=NO_CONTEXT):
    """Route tokens of given probabilities over the real and the null experts."""
    router = config.build(width=E + N, experts=E, key=jax.random.key(0))
    router.gate.kernel[...] = jnp.eye(E + N)
    return router(jnp.log(jnp.asarray(probs, jnp.float32)), context)[0]


def test_choices_of_null_experts_go_to_nobody_and_real_ones_share_the_weight():
    # Three choices each. First token: null (0.4), expert 1 (0.3), expert 2 (0.1): weights 0.3 / 0.4 and 0.1 / 0.4.
    # Second token: both null experts and expert 0 alone, which weighs 1.
    probs = [[0.1 - 1e-3, 0.3, 0.1, 0.1 - 2e-3, 0.4 + 3e-3], [0.2, 0.05, 0.05, 0.3, 0.4]]
    routing = route(NullExperts(k=3, null_experts=N), probs)
    np.testing.assert_array_equal(routing.expert, [E, 1, 2, E, E, 0])
    np.testing.assert_allclose(routing.weight, [0, 0.75, 0.25, 0, 0, 1], rtol=1e-5)
    np.testing.assert_allclose(routing.probs, np.array(probs)[:, :E], rtol=1e-5)


def test_a_token_of_null_experts_alone_gets_nothing_and_no_nan():
    config = NullExperts(k=2, null_experts=N)

    def total(probs):
        return route(config, probs).weight.sum()

    probs = jnp.array([[0.1, 0.1, 0.1, 0.3, 0.4]])
    assert (route(config, probs).expert == E).all() and total(probs) == 0
    assert np.isfinite(jax.grad(total)(probs)).all()


def loss_by_sorting(probs, k, mask):
    """(E + n) * sum_i f_i P_i over all experts, in float64; null experts have the mean of their f."""
    probs = np.asarray(probs, np.float64)[np.asarray(mask)]
    f = np.bincount(np.argsort(-probs, axis=1)[:, :k].ravel(), minlength=E + N) / (len(probs) * k)
    f[E:] = f[E:].mean()
    return (E + N) * (f * probs.mean(axis=0)).sum()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_balance_loss_is_the_papers_sum_over_real_and_null_experts(k):
    probs = jax.nn.softmax(2 * jax.random.normal(jax.random.key(3), (12, E + N)))
    for mask in (jnp.ones(12, bool), jnp.arange(12) % 5 != 2):
        context = RoutingContext(mask=mask)
        config = NullExperts(k=k, null_experts=N, experts_per_token=1.0, coefficient=0.1)
        np.testing.assert_allclose(route(config, probs, context).loss, 0.1 * loss_by_sorting(probs, k, mask), rtol=1e-4)


def test_balance_loss_by_hand():
    # One token chooses expert 0 and a null expert: f = (1/2, 0, 0), and each of two null experts 1/4 on average.
    # P = (0.4, 0.1, 0.1), null 0.3 + 0.1. (3 + 2) * (1/2 * 0.4 + 1/4 * 0.4) = 1.5.
    routing = route(NullExperts(k=2, null_experts=N, coefficient=2.0), [[0.4, 0.1, 0.1, 0.3, 0.1]])
    np.testing.assert_allclose(routing.loss, 2.0 * 1.5, rtol=1e-5)


def test_balance_loss_of_padding_alone_is_zero():
    context = RoutingContext(mask=jnp.zeros(2, bool))
    routing = route(NullExperts(k=2, null_experts=N), [[0.4, 0.1, 0.1, 0.3, 0.1]] * 2, context)
    assert routing.loss == 0


def test_the_estimate_of_the_mean_is_what_the_costs_are_counted_by():
    assert MoE(experts=8, router=NullExperts()).active_fraction == 2.0 / 8


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (NullExperts, {"k": 1}, r"NullExperts\.k is 1; it must be at least 2"),
        (NullExperts, {"null_experts": 0}, r"NullExperts\.null_experts is 0; it must be at least 1"),
        (NullExperts, {"experts_per_token": 0.0}, r"NullExperts\.experts_per_token is 0\.0; it must be above 0"),
        (NullExperts, {"experts_per_token": 5.0}, r"experts_per_token is 5\.0; it must be above 0 and at most k, 4"),
        (NullExperts, {"coefficient": float("nan")}, r"NullExperts\.coefficient is nan; it must be finite"),
    ],
)
def test_a_bad_config_is_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        config(**arguments)


def test_more_choices_than_experts_of_both_kinds_are_refused(key):
    with pytest.raises(ValueError, match=r"k is 4; with 1 experts and 2 null experts it must be at most 3"):
        NullExperts(k=4, null_experts=2).build(width=E, experts=1, key=key)
